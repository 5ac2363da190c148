"""Compiled networks on the CPU: what a GPU runs, without kernels and graphs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storyadapter import Checkpoint, RunPlan, Story, StoryPipeline
from storyadapter.engine.inductor import package_name
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.networks import InductorNetwork
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import EngineMismatchError
from storyadapter.method.events import FrameFinished
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.examples import example_inputs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics
from tests.conftest import WITHOUT_ONNX

PROMPTS = ("a red fox runs in the snow", "a small owl sleeps in a tree at night", "the fox and the owl share soup")
SIZES = Range(64, 64)
RANGES = ShapeRanges(2, 8, SIZES, SIZES)


@pytest.fixture(scope="module")
def networks(checkpoint: Checkpoint, tiny_inductor_dir: Path) -> Networks:
    return open_networks(checkpoint, backend="inductor", ranges=RANGES, engine_dir=tiny_inductor_dir)


def engine_folder(store: Path) -> Path:
    (folder,) = (path for path in store.iterdir() if path.is_dir())
    return folder


def prepared(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    ((_, module),) = iterate_modules(checkpoint, Numerics("fp32"), grca, (name,))
    return prepare(module, torch.device("cpu"))


def pictures(networks: Networks, checkpoint: Checkpoint, guidance: float = 5.0, prompts=PROMPTS) -> list[Image.Image]:
    plan = RunPlan(height=64, width=64, seed=3, steps=3, scales=(0.3, 0.5), max_frames=2, guidance=guidance)
    events = StoryPipeline(networks, checkpoint.load_tokenizers()).run(Story(prompts), plan)
    return [event.picture for event in events if isinstance(event, FrameFinished)]


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.square(np.asarray(one, float) - np.asarray(other, float)).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


# without guidance a single frame is one row, one prompt, one reference: all that is compiled for 2 and more
@pytest.mark.parametrize(("guidance", "prompts"), [(5.0, PROMPTS), (1.0, PROMPTS[:1])])
def test_draws_what_eager_draws(networks: Networks, checkpoint: Checkpoint, guidance: float, prompts) -> None:
    expected = pictures(open_networks(checkpoint, device="cpu"), checkpoint, guidance, prompts)
    drawn = pictures(networks, checkpoint, guidance, prompts)
    assert len(drawn) == 3 * len(prompts)
    assert min(psnr(one, other) for one, other in zip(drawn, expected, strict=True)) >= 50
    # the comparison sees a difference: a frame against the same frame of the iteration before
    assert psnr(drawn[-1], expected[-1 - len(prompts)]) < 45


def test_a_fresh_process_runs_what_another_built(tiny_model_dir: Path, tiny_inductor_dir: Path, tmp_path: Path) -> None:
    """Nothing that a package needs is only there because the builder had it loaded; and no ONNX package is needed."""
    hidden = subprocess.run([sys.executable, "-c", "import onnx"], capture_output=True, text=True, env=WITHOUT_ONNX)
    assert "No module named 'onnx'" in hidden.stderr
    run = [
        *(sys.executable, "-m", "storyadapter", "run", "--base-model", str(tiny_model_dir)),
        *("--image-encoder", str(tiny_model_dir / "image_encoder")),
        *("--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--backend", "inductor"),
        *("--precision", "fp32", "--steps", "2", "--iterations", "1", "--prompt", "a fox", "an owl", "a hill"),
        *("--style", "none", "--engine-dir", str(tiny_inductor_dir), "--out", str(tmp_path / "out")),
    ]
    # 3 frames where the engine takes 2 at once: without --max-frames as many as it takes
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=WITHOUT_ONNX)
    assert done.returncode == 0, done.stderr
    story = json.loads((tmp_path / "out" / "story.json").read_text())
    assert [iteration["split"] for iteration in story["progress"]["iterations"]] == [[2, 1], [2, 1]]
    another = [*run, "--height", "96", "--out", str(tmp_path / "other")]
    other = subprocess.run(another, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "differs: height is 64, 96 asked for; build it: storyadapter-trt build " in other.stderr


def test_the_engine_is_code_and_each_weight_is_held_once(
    tiny_inductor_dir: Path, networks: Networks, checkpoint: Checkpoint
) -> None:
    folder = engine_folder(tiny_inductor_dir)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["identity"]["architecture"].startswith("cpu-")
    assert manifest["identity"]["weights"] == manifest["identity"]["loras"] == []
    (record,) = (json.loads(path.read_text()) for path in folder.glob("uses/*.json"))
    assert record["model"] == checkpoint.label
    assert max(record["details"]["relative_error_against_eager"].values()) < 1e-4
    names = network_specs(checkpoint.geometry).keys()
    assert record["details"]["relative_error_against_eager"].keys() == names
    assert manifest["files"].keys() == {package_name(name) for name in names}
    for name in names:
        addresses = [value.data_ptr() for value in networks[name].weights.values()]
        assert len(set(addresses)) == len(addresses) > 0
        # the package itself holds none: it is a few MB of code
        assert (folder / package_name(name)).stat().st_size < 6e6
    held = sum(value.nbytes for name in names for value in networks[name].weights.values())
    assert held == manifest["details"]["weight_bytes"]


def test_a_view_is_refused_because_a_package_would_misread_it(networks: Networks) -> None:
    inputs = {"latents": torch.randn(2, 4, 8, 16)[..., ::2]}
    with pytest.raises(ValueError, match=r"^vae_decoder: input latents has strides \[512, 128, 16, 2\]; "):
        networks["vae_decoder"](inputs)


def test_a_size_out_of_range_is_told_by_its_letter(networks: Networks) -> None:
    letters = {"B": 5, "P": 2, "G": 2, "R": 4, "M": 1, "h": 8, "w": 8}
    inputs = example_inputs(networks["denoiser"].spec, letters, "fp32")
    with pytest.raises(ValueError, match=r"^denoiser: B = 5 is outside the engine's range 1..4$"):
        networks["denoiser"](inputs)


def test_more_frames_than_the_decoder_takes_at_once_come_one_by_one(networks: Networks) -> None:
    latents = torch.randn(2, 4, 8, 8)
    both = networks["vae_decoder"]({"latents": latents})["image"]
    one = networks["vae_decoder"]({"latents": latents[1:].clone()})["image"]
    assert torch.equal(both[1:], one)


def test_weights_on_the_host_give_the_same(networks: Networks, tiny_inductor_dir: Path, checkpoint: Checkpoint) -> None:
    folder, spec = engine_folder(tiny_inductor_dir), networks["text_projection"].spec
    weights = prepared(checkpoint, spec.name)
    letters = RANGES.letters(checkpoint.geometry.pixels_per_latent)
    network = InductorNetwork(spec, folder, "fp32", torch.device("cpu"), letters, weights, offloaded=True)
    inputs = example_inputs(spec, {"P": 3, "M": 1}, "fp32")
    expected = networks["text_projection"](inputs)
    others = []
    for _ in range(3):
        assert all(torch.equal(value, expected[name]) for name, value in network(inputs).items())
        # a package holds on to what was bound to it: the memory must be gone all the same
        assert not any(value.untyped_storage().nbytes() for value in network._bound.values())
        others += [torch.full_like(value, torch.nan) for value in weights.values()]  # takes the place it had


def test_other_frames_at_once_need_another_engine(checkpoint: Checkpoint, tiny_inductor_dir: Path) -> None:
    wanted = ShapeRanges(3, 8, SIZES, SIZES)
    with pytest.raises(EngineMismatchError, match="max frames is 2, 3 asked for"):
        open_networks(checkpoint, backend="inductor", ranges=wanted, engine_dir=tiny_inductor_dir)


def test_a_weight_that_is_not_there_is_an_error(
    tiny_inductor_dir: Path, checkpoint: Checkpoint, networks: Networks
) -> None:
    spec, folder = networks["text_encoder"].spec, engine_folder(tiny_inductor_dir)
    letters = RANGES.letters(checkpoint.geometry.pixels_per_latent)
    with pytest.raises(KeyError):
        InductorNetwork(spec, folder, "fp32", torch.device("cpu"), letters, prepared(checkpoint, "vae_decoder"))
