"""What can't be drawn as typed: one line, exit code 2, nothing written."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storyadapter.output.files import lock_folder
from tests.permissions import without_permission
from tests.storyadapter.cli.running import Type, files


@pytest.fixture
def refused(type_in: Type, tmp_path: Path):
    """Type a command that must be refused; gives the reason."""

    def call(*words: str | Path) -> str:
        before = files(tmp_path), sorted(tmp_path.rglob("*"))
        done = type_in(*words)
        assert done.code == 2, done
        assert done.out == ""
        match = re.fullmatch(r"(?:hashed .+ of weights, once\n)?storyadapter-trt: error: (.+)\n", done.err)
        assert match, done.err
        assert (files(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return match[1]

    return call


def words_without(words: list[str], option: str, values: int = 1) -> list[str]:
    place = words.index(option)
    return words[:place] + words[place + 1 + values :]


STORY_FILES = {
    "empty.yaml": ("prompts: []\n", ", line 1: the story is empty"),
    "empty.json": ("{}", ": the story is empty"),
    "empty.txt": ("\n  \n", ": the story is empty"),
}


@pytest.mark.parametrize("name", STORY_FILES)
def test_an_empty_story(name: str, refused, quick_run: list[str]) -> None:
    text, reason = STORY_FILES[name]
    Path(name).write_text(text)
    assert refused(*words_without(quick_run, "--prompt", 3), "--story", name) == (
        f"{name}{reason}, expected one prompt per frame; type --prompt TEXT once per frame, or list them in the story "
        "file"
    )


def test_a_story_file_with_a_wrong_type(refused, quick_run: list[str]) -> None:
    Path("tale.yaml").write_text("title: A tale\nprompts:\n  - a fox\n  - 7\n")
    Path("tale.json").write_text('{"prompts": ["a fox", 7]}')
    words = words_without(quick_run, "--prompt", 3)
    reason = "prompt 2 is a number (7), expected text; put it in quotes"
    assert refused(*words, "--story", "tale.yaml") == f"tale.yaml, line 4: {reason}"
    assert refused(*words, "--story", "tale.json") == f"tale.json, line 1: {reason}"


def test_no_story_for_an_own_model(refused, quick_run: list[str]) -> None:
    words = words_without(quick_run, "--prompt", 3)
    assert refused(*words) == "no story; type --story FILE, or --prompt TEXT with a text per frame"
    assert refused(*words, "--story", "tale.yaml") == (
        "tale.yaml: no such file, expected a story (.yaml, .yml, .json, .csv, .tsv, .txt, .md); if it is meant as a "
        "prompt, type --prompt TEXT"
    )


# what is typed after a run that would work -> the reason
SETTINGS = {
    "--prompt a '  '": "prompt 5 is only white space, expected words; write some, or take it out",
    "--height 100": "--height is 100; expected a multiple of 32, such as 96 or 128",
    "--width 0": "--width is 0; expected a multiple of 32, such as 32 or 64",
    "--style commic": ("unknown style 'commic', expected comic, film, realistic or none; did you mean 'comic'?"),
    "--max-frames 0": "--max-frames is 0; expected 1 or more",
    "--max-frames all": (
        "argument --max-frames: 'all' is not a number of frames such as 8, or auto; for all options type "
        "storyadapter-trt run --help"
    ),
    "--iterations -1": "--iterations is -1; expected 0 (text only) or more",
    "--steps 0": "--steps is 0; expected 1 to 999 with --scheduler ddim",
    "--steps 1001": "--steps is 1001; expected 1 to 999 with --scheduler ddim",
    "--steps 1001 --base-model gone": "--steps is 1001; expected 1 to 999 with --scheduler ddim",
    "--steps 51 --scheduler lcm": "--steps is 51; expected 1 to 50 with --scheduler lcm",
    "--steps 2,x": (
        "argument --steps: '2,x' is no whole number such as 50, nor a list such as 9,5,5; for all options type "
        "storyadapter-trt run --help"
    ),
    "--guidance-interval 0.5": (
        "argument --guidance-interval: '0.5' is not two shares of the steps such as 0.1:0.6; for all options type "
        "storyadapter-trt run --help"
    ),
    "--timesteps 499,999 --steps 50": (
        "--timesteps is 499,999; expected whole numbers from 999 to 0, each less than the one before"
    ),
    "--strength 0": "--strength is 0; expected more than 0 and at most 1, and a share of 2 steps that is at least one",
    "--eta 0.5": "--eta with ddim; expected --scheduler tcd with it",
    "--scheduler lcm --timestep-spacing trailing": (
        "--timestep-spacing: lcm takes the steps that it was trained with; leave it out, or give --timesteps"
    ),
    "--unet gone": "--unet gone: there is no such file or folder",
    "--seed -1": "--seed is -1; expected 0 to 2^63 - 1",
    "--guidance nan": "--guidance is nan; expected 0 to 100",
    "--karras": "Karras steps are not defined for ddim; expected one of euler, dpmpp_2m with them",
    "--zero-terminal-snr": (
        "DDIMScheduler can't start from pure noise (--zero-terminal-snr) with epsilon prediction, which divides by the "
        "signal; expected --prediction-type v_prediction or sample, or --zero-terminal-snr off"
    ),
    "--backend onnxruntime --precision bf16": (
        "backend onnxruntime can't serve here: it can't run in bf16; expected --precision fp32 or fp16"
    ),
    "--backend onnxruntime --vae-precision bf16": (
        "backend onnxruntime can't serve here: it can't run the VAE in bf16; expected --vae-precision fp32 or fp16"
    ),
    "--lora :0.5": "--lora ':0.5' has no path; expected PATH or PATH:SCALE, such as style.safetensors:0.8",
    "--lora ink.safetensors:0,8": (
        "--lora 'ink.safetensors:0,8': the scale 0,8 has a comma; expected ink.safetensors:0.8, written with a point"
    ),
    "--eta 0,5": (
        "argument --eta: '0,5' is not a number such as 7.5: it is written with a point, 0.5; for all options type "
        "storyadapter-trt run --help"
    ),
    "--font gone.ttf": "--font gone.ttf can't be opened as a font; expected a .ttf, .otf or .ttc file",
    "--lora gone.safetensors": "--lora gone.safetensors: there is no such file or folder",
    "--base-model gone": "--base-model gone: there is no such file or folder",
    "--scales 0.3": (
        "argument --scales: not allowed with argument --iterations; for all options type storyadapter-trt run --help"
    ),
    "--stepz 3": "unknown: --stepz 3 (did you mean --steps?); for all options type storyadapter-trt run --help",
}


@pytest.mark.parametrize("words", SETTINGS)
def test_settings(words: str, refused, quick_run: list[str]) -> None:
    assert refused(*quick_run, *shlex.split(words)) == SETTINGS[words]


def test_a_negative_prompt_is_checked_as_prompts_are(refused, quick_run: list[str]) -> None:
    reason = "holds U+001B, which is no printable character; take it out"
    assert refused(*quick_run, "--negative-prompt", "a\x1bb") == f"--negative-prompt {reason}"
    assert refused(*quick_run, "--prompt", "a\x1bb") == f"prompt 4 {reason}"


# quick to type and quick to refuse: the model isn't there
ANYTHING = st.text(st.characters(exclude_characters="\0"), max_size=40).filter(lambda text: text != "-")


@given(
    option=st.sampled_from(["--prompt", "--negative-prompt", "--style", "--story", "--language", "--lora"]),
    text=ANYTHING,
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_refused_in_one_line_and_leaves_nothing(type_in: Type, option: str, text: str) -> None:
    done = type_in("run", f"{option}={text}", "--base-model", "gone", "--image-encoder", "gone", "--ip-adapter", "gone")
    assert done.code == 2 and done.out == ""
    assert re.fullmatch(r"(?:\.\.\. [^\n]+\n)*storyadapter-trt: error: [^\n]+\n", done.err), done.err
    assert "\x1b" not in done.err
    assert list(Path().iterdir()) == []


# what may be typed is drawn as it is, or refused in one line with nothing left behind
LONG = ("fox " * 25_000, "\u202e" + "א" * 300, "a\ud800b", "e\u0301" * 200, "\U0001f98a" * 90)
TYPED = st.text(st.characters(exclude_characters="\0/"), max_size=40) | st.sampled_from(LONG)


@given(place=st.sampled_from(["--prompt", "--negative-prompt", "--style", "--out", "title", "characters"]), text=TYPED)
@example(place="--prompt", text=LONG[0])
@example(place="characters", text=LONG[0])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_drawn_or_refused(type_in: Type, quick_run: list[str], place: str, text: str) -> None:
    words = words_without(quick_run, "--prompt", 3)[: -len(("--out", "out"))]
    story = {"prompts": ["a fox named X"], "title": "t", "characters": {"X": "red"}}
    out = "out"
    if place in story:
        story[place] = {"X": text} if place == "characters" else text
    Path("tale.json").write_text(json.dumps(story))
    if place.startswith("--"):
        words.append(f"{place}={text}")
    if place == "--out":
        out = text
    else:
        words.append("--out=out")
    if place != "--prompt":
        words += ["--story", "tale.json"]
    done = type_in(*words, "--steps", "1", "--iterations", "0", "--height", "32", "--width", "32")
    if done.code == 0:
        assert len(done.out) + len(done.err) < 10_000
        assert Path(out, "frames", "000.png").is_file() and Path(out, "contact-sheet.png").is_file()
        shutil.rmtree(out)
    else:
        assert done.code == 2 and done.out == ""
        assert re.fullmatch(r"(?:warning: [^\n]+\n|hashed [^\n]+\n)*storyadapter-trt: error: [^\n]+\n", done.err), (
            done.err
        )
        assert len(done.err) < 4000
    Path("tale.json").unlink()
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ("0.3,2.5", "--scales has 2.5; expected each λ from 0 to 2"),
        ("-0.1", "--scales has -0.1; expected each λ from 0 to 2"),
        ("nan", "--scales has nan; expected each λ from 0 to 2"),
        (
            "0.3;0.4",
            "argument --scales: '0.3;0.4' is not a list of numbers such as 0.3,0.4,0.5; for all options type "
            "storyadapter-trt run --help",
        ),
    ],
)
def test_scales(scales: str, reason: str, refused, quick_run: list[str]) -> None:
    assert refused(*words_without(quick_run, "--iterations"), "--scales", scales) == reason


@pytest.mark.parametrize("option", ["--backend", "--precision", "--vae-precision"])
def test_a_backend_or_precision_that_is_unknown(option: str, refused, quick_run: list[str]) -> None:
    reason = refused(*quick_run, option, "quantum")
    assert reason.startswith(f"argument {option}: invalid choice: 'quantum' (choose from 'auto', ")


def test_what_a_benchmark_does_not_know(refused) -> None:
    of = "for all options type storyadapter-trt bench"
    assert refused("bench") == f"the following arguments are required: BENCHMARK; {of} --help"
    assert refused("bench", "soak", "--story=9") == f"unknown: --story=9 (did you mean --stories?); {of} soak --help"
    assert refused("bench", "soak", "--qqq") == f"unknown: --qqq; {of} soak --help"


def test_some_of_the_model_options(refused, quick_run: list[str]) -> None:
    all_of = "expected all of --base-model, --image-encoder and --ip-adapter"
    words = words_without(quick_run, "--ip-adapter")
    assert refused(*words) == f"--ip-adapter missing; {all_of}, or none for the demo model"
    words = words_without(words, "--base-model")
    assert refused(*words) == f"--base-model and --ip-adapter missing; {all_of}, or none for the demo model"
    words = words_without(words, "--image-encoder")
    assert refused(*words, "--vae", "vae") == f"--vae was given without --base-model; {all_of}"


def test_a_corrupt_checkpoint_file(refused, quick_run: list[str], tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, "model")
    weights = Path("model/unet/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    reason = refused(*quick_run, "--base-model", "model")
    assert str(weights) in reason and "incomplete" in reason
    weights.write_bytes(b"<html>404</html>" * 100)
    reason = refused(*quick_run, "--base-model", "model")
    assert str(weights) in reason


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_an_output_folder_that_holds_something_else(resume: list[str], refused, quick_run: list[str]) -> None:
    Path("photos").mkdir()
    Path("photos/cat.jpg").write_bytes(b"cat")
    words = [*quick_run, *resume, "--out"]
    assert refused(*words, "photos") == (
        "photos holds other files (cat.jpg, …), expected a new or empty folder, or a run's; choose another one with "
        "--out"
    )
    assert refused(*words, "photos/cat.jpg") == (
        "photos/cat.jpg is a file, expected a folder; choose another one with --out"
    )
    assert refused(*words, "photos/cat.jpg/out") == (
        f"photos/cat.jpg/out can't be made: {Path.cwd()}/photos/cat.jpg is no folder; choose another folder with --out"
    )


def test_an_output_folder_that_the_system_refuses(type_in: Type, refused, quick_run: list[str], tmp_path: Path) -> None:
    """Before anything is loaded, in the system's own words."""
    loop = Path("loop")
    loop.symlink_to(loop)
    another = "; choose another folder with --out"
    gone = [*quick_run, "--base-model", "gone", "--out"]
    assert refused(*gone, "loop") == f"loop can't be read: Too many levels of symbolic links{another}"
    assert refused(*gone, "x" * 300) == f"{'x' * 300} can't be read: File name too long{another}"
    Path("locked").mkdir()
    with without_permission(tmp_path / "locked"):
        done = type_in(*gone, "locked/out")
    assert (done.code, done.err) == (
        2,
        f"storyadapter-trt: error: locked/out can't be read: Permission denied{another}\n",
    )


def test_an_output_folder_that_holds_another_story(type_in: Type, refused, quick_run: list[str]) -> None:
    assert type_in(*quick_run, "--iterations", "0").code == 0
    again = [*quick_run, "--iterations", "0"]
    assert refused(*again) == "out already holds this run, finished; choose another folder with --out to make it again"
    assert refused(*again, "--prompt", "a second owl") == (  # with --resume it would be gone on with
        "out holds another run: story.prompts has 3 items there, 4 here; choose another folder with --out"
    )
    for resume in ([], ["--resume"]):
        assert refused(*again, "--seed", "8", *resume) == (
            "out holds another run: --seed is 7 there, 8 here; choose another folder with --out"
        )
        assert refused(*again, "--vae-precision", "bf16", *resume) == (
            "out holds another run: vae_precision is 'fp32' there, 'bf16' here; choose another folder with --out"
        )
    record = json.loads(Path("out/story.json").read_text())
    assert record["progress"]["status"] == "finished"


def test_a_folder_that_another_run_works_in(type_in: Type, refused, quick_run: list[str]) -> None:
    assert type_in(*quick_run, "--iterations", "0").code == 0
    lock = lock_folder(Path("out"))
    try:
        assert refused(*quick_run, "--iterations", "0", "--resume") == (
            "out is in use by another run; wait until that has ended, or choose another folder with --out"
        )
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--height", "100"], "--height is 100; expected a multiple of 32, such as 96 or 128"),
        (["--max-frames", "0"], "--max-frames is 0; expected 1 or more"),
        (["--max-references", "0"], "--max-references is 0; expected 1 or more"),
        (
            ["--width", "64:32"],
            "argument --width: '64:32' is not a number of pixels such as 1024, or a range such as 768:1024; for all "
            "options type storyadapter-trt build --help",
        ),
        (
            ["--backend", "inductor", "--precision", "fp32", "--height", "32:64"],
            "--height is 32..64; backend inductor expects a range from 64 on: a compiler takes a size of 1 for a "
            "constant, and at 32 pixels the UNet's innermost layers have it",
        ),
    ],
)
def test_build(words: list[str], reason: str, refused, tiny_model: list[str]) -> None:
    assert refused("build", *tiny_model, "--engine-dir", "engines", *words) == reason
    assert not Path("engines").exists()


def test_a_story_that_is_missing_is_told_before_pytorch_is_imported() -> None:
    code = (
        "import sys; from storyadapter.__main__ import main; "
        "code = main(['run', '--story', 'gone.yaml']); "
        "print(code, [name for name in ('torch', 'diffusers', 'transformers', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
