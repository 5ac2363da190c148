"""What a run writes and tells."""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from PIL import Image

import storyadapter.cli
from storyadapter.__main__ import build_parser
from storyadapter.cli.drawing import draw
from storyadapter.cli.json_log import schema
from storyadapter.cli.options import model_choice, run_plan
from storyadapter.cli.reporting import Reporter
from storyadapter.cli.sessions import open_session
from storyadapter.cli.start_clock import StartClock
from storyadapter.method.constants import reference_scales
from storyadapter.method.events import Event, FrameFinished
from storyadapter.method.presets import PRESETS
from storyadapter.method.story import Story
from tests.storyadapter.cli.running import Type, files, pictures


def record(out: str = "out") -> dict:
    return json.loads(Path(out, "story.json").read_text(encoding="utf-8"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_a_story_from_pure_noise(type_in: Type, quick_run: list[str]) -> None:
    """As v-prediction models need that were trained so: the first step's time is the last of training."""
    words = [*quick_run, "--iterations", "0", "--prediction-type", "v_prediction"]
    assert type_in(*words, "--out", "usual").code == 0
    assert type_in(*words, "--zero-terminal-snr").code == 0
    assert record("out")["identity"]["plan"]["zero_terminal_snr"] is True
    first, usual = (Path(folder, "frames/000.png").read_bytes() for folder in ("out", "usual"))
    assert first != usual


def test_a_story_whose_frames_start_from_themselves_is_resumed_to_the_byte(type_in: Type, quick_run: list[str]) -> None:
    words = [*quick_run, "--steps", "4,2,2", "--strength", "0.5", "--guidance-interval", "0:0.6", "--guidance", "5,1,4"]
    assert type_in(*words).code == 0
    plan = record("out")["identity"]["plan"]
    assert (plan["steps"], plan["guidance"], plan["strength"]) == ([4, 2, 2], [5.0, 1.0, 4.0], 0.5)
    drawn = pictures(Path("out"))
    for lost in ("iteration-01/frame-002.png", "iteration-02/frame-001.png"):
        Path("out", lost).unlink()
    done = type_in(*words, "--resume")
    assert done.code == 0, done.err
    assert pictures(Path("out")) == drawn
    assert type_in(*words, "--strength", "1", "--resume").code == 2


def test_a_preset_is_recorded_as_what_it_stands_for(type_in: Type, quick_run: list[str]) -> None:
    quick = [word for word in quick_run if word not in ("--steps", "2")]
    quick[quick.index("--iterations") + 1 :] = ["0", "--seed", "7", "--out", "out"]
    done = type_in(*quick, "--preset", "lightning", "--seed", "7")
    assert done.code == 0, done.err
    decided = record()["identity"]["plan"]
    assert (decided["scheduler"], decided["timestep_spacing"], decided["steps"]) == ("euler", "trailing", 4)
    assert (decided["guidance"], decided["prediction_type"]) == (0.0, "epsilon")
    assert record()["sessions"][0]["details"]["preset"] == "lightning"
    done = type_in(*quick, "--preset", "lcm", "--out", "other")
    assert done.code == 2
    assert "--preset lcm is for a UNet that takes the guidance as an embedding" in done.err


@pytest.mark.parametrize(
    ("words", "recorded", "scales"),
    [
        ([], (), reference_scales()),
        (["--preset", "balanced"], (), PRESETS["balanced"].settings["scales"]),
        (["--preset", "balanced", "--iterations", "2"], (), reference_scales(2)),
        (["--preset", "balanced", "--scales", "0.1"], (), (0.1,)),
        (["--preset", "balanced", "--iterations", "3"], (0.1, 0.2), (0.1, 0.2, 0.2)),
    ],
)
def test_iterations_are_a_presets_unless_they_are_typed(
    words: list[str], recorded: tuple[float, ...], scales: tuple[float, ...]
) -> None:
    assert run_plan(build_parser().parse_args(["run", "--prompt", "a", *words]), 64, 7, recorded).scales == scales


def test_what_the_model_says_otherwise_is_told(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run, "--iterations", "0", "--prediction-type", "v_prediction")
    (warning,) = (line for line in done.err.splitlines() if line.startswith("warning: "))
    assert warning.startswith("warning: --prediction-type is v_prediction, but ")
    assert warning.endswith("scheduler/scheduler_config.json says epsilon; drawn as typed")


def test_everything_is_written(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run, "--style", "film")
    assert done.code == 0
    assert done.out.startswith("out/contact-sheet.png (3 frames, 3 iterations, seed 7, ")
    expected = {f"iteration-{i:02d}/frame-{f:03d}.png" for i in range(3) for f in range(3)}
    expected |= {f"frames/{f:03d}.png" for f in range(3)}
    expected |= {f".thumbnails/iteration-{i:02d}.png" for i in range(3)}
    assert set(files(Path("out"))) == expected | {"contact-sheet.png", "story.gif", "story.json", ".lock"}
    for frame in range(3):
        assert Path(f"out/frames/{frame:03d}.png").read_bytes() == (
            Path(f"out/iteration-02/frame-{frame:03d}.png").read_bytes()
        )
        assert len({Path(f"out/iteration-{i:02d}/frame-{frame:03d}.png").read_bytes() for i in range(3)}) == 3

    story = record()
    plan = story["identity"]["plan"]
    assert (plan["seed"], plan["steps"], plan["scales"], plan["height"]) == (7, 2, [0.3, 0.5], 64)
    decided = story["identity"]
    assert (decided["style"], decided["precision"], decided["vae_precision"]) == ("film", "fp32", "fp32")
    (session,) = story["sessions"]
    assert (session["details"]["split"], session["details"]["text_kept"]) == ([3], True)
    assert [iteration["split"] for iteration in story["progress"]["iterations"]] == [[3]] * 3
    assert {"torch", "python", "storyadapter-trt"} <= set(session["details"]["versions"])
    assert {"load", "text", "references", "denoise", "decode", "save"} == set(session["seconds"])
    assert session["seconds"]["denoise"] > 0
    start = session["start"]
    assert {"python", "imports", "model files", "opening", "measuring memory", "first step"} <= set(start)
    assert all(seconds >= 0 for seconds in start.values()) and start["python"] > 0 and start["first step"] > 0

    for iteration, scale in enumerate(("none", "0.3", "0.5")):
        with Image.open(f"out/iteration-{iteration:02d}/frame-001.png") as image:
            assert image.text["prompt"].startswith("best quality, high quality, cinematic film still, an owl . shallow")
            assert (image.text["seed"], image.text["scale"]) == ("7", scale)


def test_the_plan_and_each_iteration_are_told(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run)
    plan, *rounds, pictures, next_words = [line for line in done.err.splitlines() if not line.startswith("hashed ")]
    assert re.fullmatch(r"\S+tiny-model0: 3 frames of 64x64, 3 rounds, about [\d.]+ s \(seed 7\)", plan)
    told = [line.split(":")[0] for line in rounds]
    assert told == ["round 1 of 3, from text alone", "round 2 of 3", "round 3 of 3"]
    assert pictures == "pictures: out/frames, of the last round; all in a row: out/story.gif"
    assert next_words == 'next: to change a picture, storyadapter-trt edit out --frame 0 --prompt "…"'

    lines = type_in(*quick_run, "--out", "verbose", "-v").err.splitlines()
    (detail,) = (line for line in lines if "UNet rows" in line)
    assert detail.startswith("  eager fp32 on ")
    assert ": 36 UNet rows in micro-batches of 3; text projected once; " in detail and detail.endswith(" MiB in use")
    assert [line for line in lines if line in ("  text only", "  λ 0.3", "  λ 0.5")] == [
        "  text only",
        "  λ 0.3",
        "  λ 0.5",
    ]
    assert "  vae decoder: loading weights" in lines


def test_a_seed_is_drawn_shown_and_repeatable(type_in: Type, quick_run: list[str]) -> None:
    seedless = [*quick_run[: quick_run.index("--seed")], "--iterations", "0"]
    seeds = []
    for out in ("first", "second"):
        done = type_in(*seedless, "--out", out)
        seeds.append(record(out)["identity"]["plan"]["seed"])
        assert f"(seed {seeds[-1]})\n" in done.err
        assert f"seed {seeds[-1]}, " in done.out
    assert seeds[0] != seeds[1]
    assert pictures(Path("first")) != pictures(Path("second"))
    assert type_in(*seedless, "--seed", str(seeds[0]), "--out", "again").code == 0
    assert pictures(Path("again")) == pictures(Path("first"))
    # resumed without --seed, a run keeps its own
    assert type_in(*seedless, "--out", "first", "--resume").code == 0


@pytest.mark.parametrize(("frames", "max_frames", "split"), [(7, 4, [4, 3]), (10, 8, [5, 5])])
def test_frames_are_split_evenly(
    frames: int, max_frames: int, split: list[int], type_in: Type, quick_run: list[str]
) -> None:
    words = [
        *quick_run[:7],
        "--backend",
        "eager",
        "--style",
        "none",
        "--steps",
        "1",
        "--iterations",
        "0",
        "--out",
        "out",
    ]
    prompts = [f"fox {number}" for number in range(frames)]
    done = type_in(*words, "--prompt", *prompts, "--max-frames", str(max_frames), "--json-log")
    assert done.code == 0
    assert record()["sessions"][0]["details"]["split"] == split
    drawn = [event["frames"] for event in done.events if event["event"] == "step_finished"]
    assert [len(batch) for batch in drawn] == split
    assert sum(drawn, []) == list(range(frames))


def test_a_frame_that_is_told_is_on_the_disk(quick_run: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    told: list[bool] = []

    class Looking(Reporter):
        def event(self, event: Event, **fields: Any) -> None:
            if isinstance(event, FrameFinished):
                told.append(Path(fields["path"]).exists())

    args = build_parser().parse_args(quick_run)
    story, session = Story.from_prompts(args.prompt), open_session(args, model_choice(args))
    draw(args, story, "none", run_plan(args, 64, 7), session, Looking(), StartClock())
    assert told == [True] * 9


def test_batching_does_not_change_pictures(type_in: Type, quick_run: list[str]) -> None:
    words = [*quick_run, "--prompt", "a second owl", "--steps", "3"]
    for max_frames in ("1", "4"):
        assert type_in(*words, "--max-frames", max_frames, "--out", max_frames).code == 0
    for path in sorted(Path("1").glob("iteration-*/*.png")):
        difference = np.abs(pixels(path) - pixels(Path("4") / path.relative_to("1"))).max()
        assert difference <= 1, (path, difference)


def test_a_run_may_be_resumed_with_another_split(type_in: Type, quick_run: list[str]) -> None:
    assert type_in(*quick_run).code == 0
    Path("out/iteration-02/frame-001.png").unlink()
    done = type_in(*quick_run, "--max-frames", "1", "--resume", "--verbose")
    assert done.code == 0
    assert "warning: out/iteration-02/frame-001.png isn't the picture that was written: it is drawn again" in done.err
    assert ": 3 frames of 64x64, 3 rounds (2 finished), 1 of 3 pictures left, about " in done.err
    assert ": 4 UNet rows in micro-batches of 1 + 1 + 1; " in done.err
    assert [session["details"]["split"] for session in record()["sessions"]] == [[3], [1, 1, 1]]


def test_no_iterations_are_the_text_alone(type_in: Type, quick_run: list[str]) -> None:
    assert type_in(*quick_run, "--iterations", "0").code == 0
    assert [path.name for path in sorted(Path("out").glob("iteration-*"))] == ["iteration-00"]
    assert record()["progress"]["scales"] == [None]


def test_scales(type_in: Type, quick_run: list[str]) -> None:
    place = quick_run.index("--iterations")
    words = quick_run[:place] + quick_run[place + 2 :]
    assert type_in(*words, "--scales", "0.3,0.45,2", "--out", "three").code == 0
    assert record("three")["progress"]["scales"] == [None, 0.3, 0.45, 2.0]
    with Image.open("three/iteration-02/frame-000.png") as image:
        assert image.text["scale"] == "0.45"
    assert type_in(*words, "--scales", "0.3,0.5", "--out", "two").code == 0
    assert type_in(*quick_run, "--out", "published").code == 0
    assert pictures(Path("two")) == pictures(Path("published"))
    assert pixels(Path("three/iteration-02/frame-000.png")).tolist() != (
        pixels(Path("two/iteration-02/frame-000.png")).tolist()
    )


def test_keep_last(type_in: Type, quick_run: list[str]) -> None:
    assert type_in(*quick_run, "--keep", "last", "--out", "last").code == 0
    assert [path.name for path in sorted(Path("last").glob("iteration-*"))] == ["iteration-02"]
    assert type_in(*quick_run, "--out", "all").code == 0
    assert Path("last/contact-sheet.png").read_bytes() == Path("all/contact-sheet.png").read_bytes()
    assert Path("last/frames/002.png").read_bytes() == Path("all/frames/002.png").read_bytes()


def test_quiet(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert Path("out/contact-sheet.png").exists()


def test_json_log(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run, "--json-log")
    assert (done.code, done.err) == (0, "")
    events = valid(done.events)
    names = [event["event"] for event in events]
    assert names[0] == "started" and names[-2:] == ["run_finished", "drawn"]
    assert len({event["run"] for event in events}) == 1
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert events[-1]["seed"] == 7 and events[-1]["contact_sheet"] == "out/contact-sheet.png"
    (plan,) = (event for event in events if event["event"] == "plan")
    assert (plan["frames"], plan["iterations"], plan["split"], plan["unet_rows"]) == (3, 3, [3], 36)
    assert [event["scale"] for event in events if event["event"] == "iteration_started"] == [None, 0.3, 0.5]
    drawn = [(e["iteration"], e["frame"], e["path"]) for e in events if e["event"] == "frame_finished"]
    paths = "out/iteration-{:02d}/frame-{:03d}.png"
    assert drawn == [(i, frame, paths.format(i, frame)) for i in range(3) for frame in range(3)]
    assert events[-1]["cost"]["unet_rows"] == 36 and events[-1]["cost"]["seconds"] > 0
    assert names.index("plan") < names.index("step_finished")


def valid(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events, each of which the schema describes."""
    validator = Draft202012Validator(schema(), format_checker=FormatChecker())
    for event in events:
        validator.validate(event)
    return events


def test_json_log_of_what_fails(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run, "--json-log", "--lora", "gone.safetensors")
    assert done.code == 2 and done.err.startswith("storyadapter-trt: error: --lora gone.safetensors")
    *_, error = valid(done.events)
    assert (error["event"], error["exit_code"], error["field"]) == ("error", 2, "lora")
    assert error["found"] == "lora gone.safetensors: there is no such file or folder"


def test_the_schema_knows_every_event() -> None:
    Draft202012Validator.check_schema(schema())
    known = schema()["properties"]["event"]["enum"]
    names = {re.sub(r"(?<!^)([A-Z])", r"_\1", kind.__name__).lower() for kind in get_args(Event)}
    for path in Path(storyadapter.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("reporter"), "note" | "result"), [ast.Constant(str(kind)), *_]):
                    names.add(kind)
    assert names <= set(known) and len(known) == len(schema()["allOf"])


def test_published_spellings(type_in: Type, quick_run: list[str], tiny_model_dir: Path) -> None:
    rest = quick_run[quick_run.index("--style") :]
    done = type_in(
        *("run", "--base_model_path", tiny_model_dir, "--image_encoder_path", tiny_model_dir / "image_encoder"),
        *("--ip_ckpt", tiny_model_dir / "ip-adapter.safetensors", "--story", "a fox", "an owl", "a night", *rest),
    )
    assert done.code == 0
    assert type_in(*quick_run, "--out", "same").code == 0
    assert pictures(Path("out")) == pictures(Path("same"))


def test_a_story_file(type_in: Type, quick_run: list[str]) -> None:
    Path("tale.yaml").write_text(
        "title: A tale\nstyle: realistic\ncharacters: {Ren: a small red fox}\nprompts: [Ren reads, Ren sleeps]\n"
    )
    place = quick_run.index("--prompt")
    words = quick_run[:place] + quick_run[place + 6 :]  # without prompts and style
    assert type_in(*words, "--iterations", "0", "--story", "tale.yaml").code == 0
    with Image.open("out/iteration-00/frame-001.png") as image:
        assert image.text["prompt"] == "best quality, high quality, a small red fox sleeps"
    assert record()["identity"]["story"]["title"] == "A tale"


def test_a_long_prompt_that_is_cut_is_a_warning(type_in: Type, quick_run: list[str]) -> None:
    long = " ".join(["fox"] * 75)
    words = [*quick_run, "--iterations", "0", "--prompt-chunks", "1"]
    done = type_in(*words, "--prompt", f"{long} owl wolf")
    assert done.code == 0
    assert 'warning: frame 3: the prompt is over 77 tokens; cut off: "' in done.err
    (warning,) = (line for line in done.err.splitlines() if line.startswith("warning: "))
    assert warning.endswith(' owl wolf"')
    done = type_in(*words, "--prompt", f"{long} owl wolf", "--json-log", "--out", "json")
    (event,) = (event for event in done.events if event["event"] == "prompt_truncated")
    assert event["frame"] == 3 and f'cut off: "{event["words"]}"' in warning
    # the words named are those that don't count, and the word before them does
    kept = f"{long} owl wolf".removesuffix(event["words"]).strip()
    assert type_in(*words, "--prompt", kept, "--out", "kept").code == 0
    assert pixels(Path("kept/frames/003.png")).tolist() == pixels(Path("out/frames/003.png")).tolist()


def test_half_precision_draws_nearly_the_same(type_in: Type, quick_run: list[str]) -> None:
    assert type_in(*quick_run, "--iterations", "0").code == 0
    for precision in ("fp16", "bf16"):
        assert type_in(*quick_run, "--iterations", "0", "--precision", precision, "--out", precision).code == 0
        difference = np.abs(pixels(Path("out/frames/000.png")) - pixels(Path(precision, "frames/000.png")))
        assert difference.max() > 0 and difference.mean() < 4


def test_the_vae_alone_in_half_precision(type_in: Type, quick_run: list[str]) -> None:
    words = [*quick_run, "--iterations", "0"]
    assert type_in(*words).code == 0
    done = type_in(*words, "--vae-precision", "bf16", "--out", "bf16", "-v")
    assert done.code == 0 and "  eager fp32 (VAE bf16) on " in done.err
    assert json.loads(Path("bf16/story.json").read_text())["identity"]["vae_precision"] == "bf16"
    difference = np.abs(pixels(Path("out/frames/000.png")) - pixels(Path("bf16/frames/000.png")))
    assert 0 < difference.max() <= 4


def test_guidance_of_one_computes_no_unconditional_rows(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run, "--iterations", "0", "--guidance", "1", "--json-log")
    (plan,) = (event for event in done.events if event["event"] == "plan")
    assert plan["unet_rows"] == 6


def test_schedulers(type_in: Type, quick_run: list[str]) -> None:
    drawn = set()
    for scheduler in ("ddim", "euler", "dpmpp_2m", "lcm"):
        assert type_in(*quick_run, "--iterations", "0", "--scheduler", scheduler, "--out", scheduler).code == 0
        drawn.add(Path(scheduler, "frames/000.png").read_bytes())
    assert len(drawn) == 4


def test_events_come_in_order(type_in: Type, quick_run: list[str]) -> None:
    events = [e for e in type_in(*quick_run, "--json-log", "--max-frames", "2").events if "step" in e]
    places = [(e["iteration"], e["frames"][0], e["step"]) for e in events]
    assert len(places) == 3 * 2 * 2
    assert all(before < after for before, after in pairwise(places))


def test_words_that_the_demo_model_does_not_know(type_in: Type) -> None:
    words = ("--backend", "eager", "--precision", "fp32", "--steps", "1", "--iterations", "0", "--out", "out")
    done = type_in("run", *words, "--prompt", "a dragon in a castle", "--height", "32", "--width", "32")
    assert done.code == 0
    assert [line for line in done.err.splitlines() if line.startswith("warning: ")] == [
        'warning: the demo model doesn\'t know "dragon"; animals it knows: fox, rabbit, bear, cat, owl, elephant. '
        "Others need an SDXL checkpoint",
        'warning: the demo model doesn\'t know "castle"; places it knows: in the forest, on the beach, on a snowy '
        "mountain, in a cosy room, at night, in the desert, in a meadow, under the sea. Others need an SDXL checkpoint",
    ]
