// The API in short, from its OpenAPI description.

const described = await (await fetch("/openapi.json")).json();

function row(...cells) {
  const line = document.createElement("tr");
  line.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  return line;
}

for (const [path, operations] of Object.entries(described.paths)) {
  for (const [method, { description }] of Object.entries(operations)) {
    document.getElementById("operations").append(row(`${method.toUpperCase()} ${path}`, description ?? ""));
  }
}

for (const name of ["StoryRequest", "FrameRequest", "CharacterRequest", "Settings", "EditRequest", "FrameChange", "ImagesRequest"]) {
  const table = document.createElement("table");
  table.append(Object.assign(document.createElement("caption"), { textContent: name }));
  for (const [member, { description }] of Object.entries(described.components.schemas[name].properties)) {
    table.append(row(member, description ?? ""));
  }
  document.getElementById("schemas").append(table);
}
