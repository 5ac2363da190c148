"""`build`, and runs with what it built."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel

from tests.storyadapter.cli.running import Type, files, pictures


@pytest.fixture
def engine_run(quick_run: list[str], tiny_engine_dir: Path) -> list[str]:
    return [*quick_run, "--backend", "onnxruntime", "--max-frames", "3", "--engine-dir", str(tiny_engine_dir)]


def psnr(first: Path, second: Path) -> float:
    with Image.open(first) as a, Image.open(second) as b:
        error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_onnxruntime_draws_what_eager_draws(type_in: Type, engine_run: list[str], quick_run: list[str]) -> None:
    done = type_in(*engine_run)
    assert done.code == 0, done.err
    assert ": 3 frames of 64x64, 3 rounds, about " in done.err
    assert type_in(*quick_run, "--out", "eager").code == 0
    paths = sorted(Path("out").glob("iteration-*/*.png"))
    assert len(paths) == 9
    assert min(psnr(path, "eager" / path.relative_to("out")) for path in paths) >= 50
    # the comparison sees a difference: a frame against the same frame of the iteration before
    assert psnr(Path("out/iteration-02/frame-000.png"), Path("eager/iteration-01/frame-000.png")) < 40


def test_a_run_goes_on_with_another_backend_and_says_so(
    type_in: Type, engine_run: list[str], quick_run: list[str]
) -> None:
    """What was drawn stays; which backend drew is recorded."""
    assert type_in(*engine_run, "--iterations", "1").code == 0
    first = pictures(Path("out/iteration-01"))
    Path("out/iteration-01/frame-002.png").unlink()
    done = type_in(*quick_run, "--iterations", "1", "--resume")
    assert done.code == 0
    assert "warning: begun with backend onnxruntime, going on with eager: frames differ, by rounding, " in done.err
    record = json.loads(Path("out/story.json").read_text())
    assert [session["details"]["backend"] for session in record["sessions"]] == ["onnxruntime", "eager"]
    assert [session["details"]["weights_hashed"] for session in record["sessions"]][1] == "as they were loaded"
    kept = pictures(Path("out/iteration-01"))
    assert {"frame-000.png", "frame-001.png"} <= {name for name in first if kept[name] == first[name]}


def test_an_engine_serves_fewer_frames_at_once(type_in: Type, engine_run: list[str]) -> None:
    """Five frames by four are 3 + 2, so the engine for three serves."""
    done = type_in(*engine_run, "--prompt", "a sea", "a hill", "--max-frames", "4", "--iterations", "0")
    assert done.code == 0
    assert json.loads(Path("out/story.json").read_text())["sessions"][0]["details"]["split"] == [3, 2]


def test_by_default_an_engine_says_how_many_frames_it_takes(type_in: Type, engine_run: list[str]) -> None:
    done = type_in(*engine_run, "--prompt", "a sea", "a hill", "--max-frames", "auto", "--iterations", "0")
    assert done.code == 0
    assert json.loads(Path("out/story.json").read_text())["sessions"][0]["details"]["split"] == [3, 2]


def test_frames_that_attend_to_none_need_no_engine_for_so_many(type_in: Type, engine_run: list[str]) -> None:
    """More frames than the engine takes references."""
    words = [*engine_run, "--steps", "1", "--prompt", *(f"a hill {n}" for n in range(98))]
    done = type_in(*words, "--iterations", "1")
    assert done.code == 2 and "max references is 100, 101 asked for" in done.err
    done = type_in(*words, "--iterations", "0")
    assert done.code == 0, done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA GPU the default is another backend")
def test_onnxruntime_is_the_default_without_a_gpu(type_in: Type, engine_run: list[str]) -> None:
    done = type_in(*engine_run, "--backend", "auto", "--precision", "auto", "--iterations", "0", "--verbose")
    assert done.code == 0
    assert "  onnxruntime fp32 on cpu: " in done.err


def test_building_again_takes_what_is_there(type_in: Type, tiny_model: list[str], tiny_engine_dir: Path) -> None:
    build = ["build", *tiny_model, "--backend", "onnxruntime", "--precision", "fp32", "--max-frames", "3"]
    build += ["--engine-dir", str(tiny_engine_dir)]
    (folder,) = (path for path in tiny_engine_dir.iterdir() if path.is_dir())
    done = type_in(*build)
    assert done.code == 0
    assert done.out.startswith(f"engine {folder} (") and done.out.endswith(" MiB, was there already)\n")
    (*_, built) = type_in(*build, "--json-log").events
    assert (built["event"], built["folder"], built["new"]) == ("built", str(folder), False)
    done = type_in(*build, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_manifest_says_how_far_each_network_is_from_eager(tiny_engine_dir: Path) -> None:
    (path,) = tiny_engine_dir.glob("*/manifest.json")
    errors = json.loads(path.read_text())["details"]["relative_error_against_eager"]
    assert len(errors) == 7
    assert min(errors.values()) >= 0 and max(errors.values()) < 1e-3


def test_no_engine(type_in: Type, engine_run: list[str], tiny_model: list[str]) -> None:
    done = type_in(*engine_run, "--engine-dir", "my engines", "--lora", "style.safetensors:0.5")
    assert (done.code, done.err) == (
        2,
        "storyadapter-trt: error: --lora style.safetensors: there is no such file or folder\n",
    )
    done = type_in(*engine_run, "--engine-dir", "my engines")
    assert done.code == 2
    words = ["storyadapter-trt", "build", *tiny_model, "--backend", "onnxruntime", "--precision", "fp32"]
    words += [
        "--vae-precision",
        "fp32",
        "--height",
        "64",
        "--width",
        "64",
        "--max-frames",
        "3",
        "--max-references",
        "100",
    ]
    told = shlex.join([*words, "--engine-dir", "my engines"])
    assert done.err.endswith(f"storyadapter-trt: error: no engine in my engines; build it: {told}\n")
    assert files(Path()) == {} and list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--prompt 4 5 6 7 --max-frames 4", "max frames is 3, 4 asked for"),
        ("--height 96", "height is 64, 96 asked for"),
        ("--vae-precision fp32 --precision fp16", "precision is fp32 in the store, fp16 asked for"),
        ("--vae-precision fp16", "VAE precision is fp32 in the store, fp16 asked for"),
    ],
)
def test_no_engine_that_fits(words: str, reason: str, type_in: Type, engine_run: list[str]) -> None:
    done = type_in(*engine_run, *shlex.split(words))
    assert done.code == 2
    message = done.err.splitlines()[-1]
    assert " fits; the closest, onnxruntime fp32 for 3 frames of 64x64 and 100 references (" in message
    assert f" differs: {reason}; build it: storyadapter-trt build " in message
    build = shlex.split(message.partition("build it: ")[2])
    option, value = shlex.split(words)[-2:]
    assert build[build.index(option) + 1] == value
    assert not Path("out").exists()


def test_no_engine_with_these_loras(type_in: Type, engine_run: list[str], tiny_model_dir: Path) -> None:
    """What is told builds the right one: the LoRAs with their scales are in the command."""
    query = "text_model.encoder.layers.0.self_attn.q_proj"
    weight = CLIPTextModel.from_pretrained(tiny_model_dir / "text_encoder").get_parameter(f"{query[11:]}.weight")
    pair = {"lora_A": torch.randn(2, weight.shape[1]), "lora_B": torch.randn(weight.shape[0], 2)}
    save_file({f"text_encoder.{query}.{part}.weight": matrix for part, matrix in pair.items()}, "ink.safetensors")
    words = ["--lora", "ink.safetensors:0.5", "--lora", "ink.safetensors:-0.25"]
    message = type_in(*engine_run, *words).err.splitlines()[-1]
    assert " differs: LoRA is none in the store, ink.safetensors:0.5 (blake3 " in message
    build = shlex.split(message.partition("build it: ")[2])
    assert [build[at + 1] for at, word in enumerate(build) if word == "--lora"] == words[1::2]


def test_a_backend_that_needs_no_build(type_in: Type, tiny_model: list[str]) -> None:
    done = type_in("build", *tiny_model, "--backend", "eager", "--engine-dir", "engines")
    assert (done.code, done.err) == (0, "")
    assert done.out == "backend eager needs no build: run uses the checkpoint itself\n"
    assert list(Path().iterdir()) == []
