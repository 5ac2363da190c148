// The page: submits stories, lists them, and follows one by its events.

const $ = (id) => document.getElementById(id);
let shown = null; // the story that is followed
let source = null;
let follows = true; // whether the newest iteration is shown
let edited = 0; // the frame that is being edited
let known = {}; // references of the story that is drawn again, by name

async function call(path, method = "GET", body = undefined) {
  const isFile = body instanceof File;
  const headers = body === undefined ? {} : { "Content-Type": isFile ? body.type : "application/json" };
  const answer = await fetch(path, { method, headers, body: isFile ? body : body && JSON.stringify(body) });
  if (answer.status === 401) $("sign-in").hidden = false;
  const told = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(told.detail);
  return told;
}

function attempt(work) {
  return async (event) => {
    event?.preventDefault();
    $("message").textContent = "";
    try {
      await work(event);
    } catch (error) {
      $("message").textContent = error.message;
    }
  };
}

function inWords(story) {
  const words = { queued: "waits", in_progress: "is being drawn", completed: "done", failed: "failed", cancelled: "cancelled" };
  const parts = [words[story.state], `${story.frames_done} of ${story.frames_total} frames`];
  if (story.place !== null) parts.push(`${story.place} before it`);
  if (story.seconds_left !== null) parts.push(`about ${Math.ceil(story.seconds_left)} s left`);
  if (story.cost !== null) parts.push(`cost so far ${story.cost.toFixed(4)}`);
  if (story.error) parts.push(story.error.detail);
  return parts.join(", ");
}

const titleOf = (story) => story.title ?? story.prompts[0];

async function list() {
  const { stories } = await call("/v1/stories");
  $("empty").hidden = stories.length > 0;
  $("stories").replaceChildren(
    ...stories.map((story) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `${titleOf(story)}: ${inWords(story)}`;
      button.setAttribute("aria-current", String(story.id === shown?.id));
      button.addEventListener("click", attempt(() => show(story.id, true)));
      item.append(button);
      return item;
    }),
  );
}

function newest(story) {
  return Math.min(story.iterations - 1, Math.floor(story.frames_done / story.prompts.length));
}

function editButton(number, prompt) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Edit";
  button.setAttribute("aria-label", `Edit frame ${number + 1}: ${prompt}`);
  button.addEventListener("click", () => {
    edited = number;
    $("edit-title").textContent = `Frame ${number + 1}`;
    $("edit-prompt").value = prompt;
    $("edit-seed").value = "";
    $("edit-control").value = "";
    $("edit-guide").hidden = !shown.settings.controls;
    $("edit").hidden = false;
    $("edit-prompt").focus();
  });
  return button;
}

function draw() {
  const iteration = Number($("iteration").value);
  const place = `${iteration} of ${shown.iterations - 1}`;
  $("iteration-shown").textContent = place;
  $("iteration").setAttribute("aria-valuetext", place);
  $("frames").replaceChildren(
    ...shown.prompts.map((prompt, number) => {
      const [item, figure, caption] = ["li", "figure", "figcaption"].map((name) => document.createElement(name));
      const picture = document.createElement("img");
      picture.alt = prompt;
      picture.src = `/v1/stories/${shown.id}/iterations/${iteration}/frames/${number}.png`;
      picture.addEventListener("error", () => {
        const missing = document.createElement("div");
        missing.className = "missing";
        missing.setAttribute("role", "img");
        missing.setAttribute("aria-label", `${prompt}: not drawn yet`);
        picture.replaceWith(missing);
      });
      caption.textContent = prompt;
      figure.append(picture, caption);
      if (shown.state === "completed") figure.append(editButton(number, prompt));
      item.append(figure);
      return item;
    }),
  );
}

async function refresh() {
  shown = await call(`/v1/stories/${shown.id}`);
  const open = ["queued", "in_progress"].includes(shown.state);
  $("story-title").textContent = titleOf(shown);
  $("state").textContent = inWords(shown);
  $("progress").value = shown.progress;
  $("cancel").disabled = !open;
  $("sheet").hidden = shown.state !== "completed";
  $("sheet").href = `/v1/stories/${shown.id}/contact-sheet.png`;
  $("archive").href = shown.links["archive.zip"];
  $("iteration").max = shown.iterations - 1;
  if (follows) $("iteration").value = newest(shown);
}

async function show(id, focus = false) {
  source?.close();
  $("edit").hidden = true;
  shown = { id };
  follows = true;
  await refresh();
  draw();
  $("story").hidden = false;
  if (focus) $("story").focus();
  source = new EventSource(shown.links.events);
  const changed = attempt(async () => {
    await refresh();
    draw();
    await list();
  });
  for (const kind of ["started", "frame_finished", "iteration_finished"]) source.addEventListener(kind, changed);
  for (const kind of ["completed", "failed", "cancelled"]) {
    source.addEventListener(kind, () => {
      source.close();
      changed();
    });
  }
  await list();
}

function lines(id) {
  return $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
}

$("new").addEventListener("submit", attempt(async () => {
  const settings = {};
  for (const name of ["iterations", "steps", "seed"]) if ($(name).value) settings[name] = Number($(name).value);
  const story = { prompts: lines("prompts"), style: $("style").value, settings };
  if ($("title").value) story.title = $("title").value;
  const pairs = lines("characters").map((line) => line.split(/:(.*)/s).slice(0, 2).map((part) => part.trim()));
  story.characters = Object.fromEntries(pairs.map(([name, definition]) => [name, { definition }]));
  for (const [name, references] of Object.entries(known)) story.characters[name] = { ...story.characters[name], references };
  if ($("pictures").files.length) {
    const name = $("who").value.trim();
    if (!name) throw new Error("whose pictures are these? Write the name that prompts use");
    const sent = await Promise.all([...$("pictures").files].map((file) => call("/v1/uploads", "POST", file)));
    story.characters[name] = { ...story.characters[name], references: sent.map((picture) => picture.id) };
  }
  await show((await call("/v1/stories", "POST", story)).id, true);
}));

$("sign-in").addEventListener("submit", attempt(async () => {
  await call("/session", "POST", { key: $("key").value });
  $("key").value = "";
  $("sign-in").hidden = true;
  await list();
}));

$("cancel").addEventListener("click", attempt(async () => {
  await call(`/v1/stories/${shown.id}`, "DELETE");
  await refresh();
  await list();
}));

$("again").addEventListener("click", () => {
  $("prompts").value = shown.prompts.join("\n");
  $("title").value = shown.title ?? "";
  $("style").value = shown.style ?? "none";
  const definitions = Object.entries(shown.characters).map(([name, who]) => [name, who.definition ?? who]);
  $("characters").value = definitions.filter((pair) => typeof pair[1] === "string").map((pair) => pair.join(": ")).join("\n");
  known = Object.fromEntries(Object.entries(shown.characters).filter(([, who]) => who.references).map(([name, who]) => [name, who.references]));
  $("iterations").value = shown.iterations - 1;
  $("steps").value = shown.settings.steps;
  $("seed").value = shown.settings.seed;
  $("prompts").focus();
});

$("edit").addEventListener("submit", attempt(async () => {
  const change = { prompt: $("edit-prompt").value };
  if ($("edit-seed").value) change.seed = Number($("edit-seed").value);
  if ($("edit-control").files.length) {
    const sent = await Promise.all([...$("edit-control").files].map((file) => call("/v1/uploads", "POST", file)));
    change.control = sent.map((picture) => picture.id);
    while (change.control.length < shown.settings.controls.length) change.control.push(null);
  }
  const asked = { frames: { [edited]: change }, follow: $("edit-follow").checked };
  await show((await call(`/v1/stories/${shown.id}/edits`, "POST", asked)).id, true);
}));

$("iteration").addEventListener("input", () => {
  follows = Number($("iteration").value) >= newest(shown);
  draw();
});

attempt(list)();
setInterval(attempt(list), 10000);
