"""ControlNets as they are typed: what a run records, and one line for every picture or network that can't be used."""

import json
import shlex
from pathlib import Path

import pytest
from diffusers import ControlNetModel
from PIL import Image

from tests.control_models import poses, write_controlnet
from tests.oracle.comparison import errors_of_frames
from tests.storyadapter.checkpoint.spoil import edit_config
from tests.storyadapter.cli.running import Type, files, pictures


@pytest.fixture
def control_run(tiny_model_dir: Path, quick_run: list[str]) -> list[str]:
    """A run with a ControlNet `net` and pictures in `poses`, none for its last frame."""
    write_controlnet(tiny_model_dir, Path("net"))
    Path("poses").mkdir()
    for number, picture in enumerate(poses(2)):
        picture.save(f"poses/{number}.png")
    return [*quick_run, "--controlnet", "net:0.8:0-0.9", "--control-images", "poses"]


def test_a_run_records_settings_and_pictures_and_goes_on_with_them(type_in: Type, control_run: list[str]) -> None:
    assert type_in(*control_run).code == 0
    record = json.loads(Path("out/story.json").read_text())
    identity = record["identity"]
    settings = {"scale": 0.8, "start": 0.0, "end": 0.9, "preprocess": "none"}
    assert identity["plan"]["controls"] == [settings]
    assert [len(keys) for keys in identity["control"]] == [1, 1, 0]
    assert identity["story"]["prompts"] == ["a fox", "an owl", "a night"]
    assert {name for name in identity["weights"] if name.startswith("controlnet_0/")}
    lie = [[str(Path.cwd() / f"poses/{number}.png")] for number in range(2)]
    assert record["sessions"][0]["details"]["control_pictures"] == [*lie, None]
    # the same pictures elsewhere are the same run; another picture, or scale, is another
    whole = pictures(Path("out"))
    Path("out/iteration-02/frame-001.png").unlink()
    Path("poses").rename("elsewhere")
    moved = [*control_run[:-1], "elsewhere", "--resume"]
    assert type_in(*moved).code == 0
    assert pictures(Path("out")) == whole
    poses(3)[2].save("elsewhere/0.png")
    assert "out holds another run: control[0][0] is " in type_in(*moved).err
    poses(2)[0].save("elsewhere/0.png")
    told = type_in(*moved, "--controlnet", "net").err
    assert "--control-images: 1 for 2 ControlNets; expected one folder for each --controlnet" in told
    words = [word.replace("net:0.8", "net:0.7") for word in moved]
    assert "out holds another run: --controlnet[0].scale is 0.8 there, 0.7 here" in type_in(*words).err


def test_the_story_file_names_pictures_beside_it(type_in: Type, control_run: list[str]) -> None:
    Path("tales").mkdir()
    Path("poses").rename("tales/poses")
    Path("tales/tale.yaml").write_text("prompts: [{prompt: a fox, control: poses/0.png}, an owl]")
    words = control_run[: control_run.index("--control-images")]
    place = words.index("--prompt")
    words[place : place + 4] = ["--story", "tales/tale.yaml", "--preprocess", "canny"]
    assert type_in(*words).code == 0
    told = type_in("story", "check", "tales/tale.yaml").out
    assert "control tales/poses/0.png" in told.splitlines()[1]
    words[words.index("out")] = "plain"
    words[words.index("canny")] = "none"
    assert type_in(*words).code == 0
    drawn, plain = (pictures(Path(folder)) for folder in ("out", "plain"))
    assert drawn["iteration-00/frame-000.png"] != plain["iteration-00/frame-000.png"]
    first, second = (Image.open(f"{folder}/iteration-00/frame-001.png").tobytes() for folder in ("out", "plain"))
    assert first == second
    # the same as a table; what can't be used is told with the frame, and what it is
    Path("tales/tale.csv").write_text("prompt,control\na fox,poses/0.png\nan owl\n")
    words[words.index("plain")], words[words.index("tales/tale.yaml")] = "table", "tales/tale.csv"
    assert type_in(*words).code == 0
    assert pictures(Path("table")) == plain
    Path("tales/tale.csv").write_text("prompt,control\na fox,\nan owl,poses/7.png\n")
    words[words.index("table")] = "none"
    done = type_in(*words)
    assert done.code == 2 and not Path("none").exists()
    assert "frame 1: the control picture tales/poses/7.png: there is no such file; expected a picture" in done.err


def test_what_cant_be_used_is_told_and_nothing_is_written(
    type_in: Type, control_run: list[str], tiny_model_dir: Path
) -> None:
    good = Path("poses/0.png").read_bytes()
    wide = Image.new("1", (20_000, 8))
    wide.save("wide.png")
    for name, data, told in (
        ("0.png", good[:120], "frame 0: the control picture poses/0.png can't be read: "),
        ("0.png", b"no picture", "frame 0: the control picture poses/0.png is no picture that can be read; expected"),
        ("0.png", Path("wide.png").read_bytes(), "poses/0.png has 20,000x8 pixels; expected at most 10,000 a side"),
        ("2.png", good, ""),
        ("3.png", good, "--control-images poses has 4 pictures; expected 1 to 3, one per frame in their order"),
    ):
        Path("poses", name).write_bytes(data)
        if told:
            done = type_in(*control_run)
            assert done.code == 2 and done.err.splitlines()[-1].startswith("storyadapter-trt: error: ")
            assert told in done.err and not Path("out").exists()
        if name == "0.png":
            Path("poses/0.png").write_bytes(good)
    Path("poses/3.png").unlink()
    plain = control_run[: control_run.index("--controlnet")]
    ControlNetModel.from_pretrained("net").save_pretrained("old")
    edit_config(Path("old/config.json"), cross_attention_dim=768)
    for words, told in (
        ((*plain, "--controlnet", "net"), "--controlnet is given, and no frame has a picture for it; name one in the"),
        ((*plain, "--control-images", "poses"), "--control-images is given; expected --controlnet with it"),
        ((*plain, "--preprocess", "canny"), "--preprocess is given; expected --controlnet with it"),
        (
            (*control_run, "--preprocess", "canny", "--preprocess", "none"),
            "--preprocess is given 2 times; expected",
        ),
        ((*control_run[:-1], "gone"), "--control-images gone can't be read: No such file or directory; expected a fol"),
        ((*plain, "--controlnet", "old", "--control-images", "poses"), "a ControlNet for Stable Diffusion 1.5, which"),
        (
            (*plain, "--controlnet", "net:2,5", "--control-images", "poses"),
            "--controlnet 'net:2,5': 2,5 has a comma; expected 2.5",
        ),
    ):
        done = type_in(*words)
        assert done.code == 2 and told in done.err and done.err.count("error: ") == 1, done.err
    assert not Path("out").exists()
    assert "out" not in files(Path())


def test_the_build_command_that_is_told_has_the_controlnet(type_in: Type, control_run: list[str]) -> None:
    done = type_in(*control_run, "--backend", "onnxruntime", "--engine-dir", "engines")
    assert done.code == 2
    command = shlex.split(done.err.partition("build it: ")[2])
    assert command[command.index("--controlnet") + 1] == "net"


def test_an_edit_keeps_pictures_or_takes_another(type_in: Type, control_run: list[str], tmp_path: Path) -> None:
    assert type_in(*control_run).code == 0
    before = files(Path("out"))
    poses(3)[2].save("new.png")
    done = type_in("edit", "out", "--frame", "0", "--control", "new.png", "--frame", "1", "--prompt", "two owls")
    assert done.code == 0, done.err
    after = files(Path("out-edited"))
    changed = {name for name in before if name.startswith("iteration-") and after[name] != before[name]}
    assert changed == {f"iteration-{iteration:02d}/frame-00{n}.png" for iteration in range(3) for n in range(2)}
    old, new = (json.loads(Path(out, "story.json").read_text()) for out in ("out", "out-edited"))
    assert old["identity"]["control"][1:] == new["identity"]["control"][1:]
    assert old["identity"]["control"][0] != new["identity"]["control"][0]
    assert new["identity"]["story"]["prompts"] == ["a fox", "two owls", "a night"]
    assert new["sessions"][-1]["details"]["control_pictures"][0] == [str(tmp_path / "new.png")]
    # as drawn so from the first: text alone sees no others
    first = Path("poses/0.png").read_bytes()
    Path("new.png").rename("poses/0.png")
    words = [word if word != "an owl" else "two owls" for word in control_run]
    assert type_in(*words, "--out", "anew").code == 0
    for number in range(2):
        name = f"iteration-00/frame-00{number}.png"
        assert errors_of_frames([Image.open(f"anew/{name}")], [Image.open(f"out-edited/{name}")])[0] < 0.05
    done = type_in("edit", "out-edited", "--frame", "1", "--control", "none", "--out", "without")
    assert done.code == 2 and "new.png: there is no such file" in done.err and not Path("without").exists()
    done = type_in("edit", "out", "--frame", "1", "--control", "none", "--out", "without")
    assert done.code == 2 and "out holds another run: control[0][0] is " in done.err and not Path("without").exists()
    Path("poses/0.png").write_bytes(first)
    done = type_in("edit", "out", "--frame", "1", "--control", "none", "--out", "without")
    assert done.code == 0, done.err
    assert json.loads(Path("without/story.json").read_text())["identity"]["control"][1] == []
