"""A quantized model: build finds its scales, run draws with them, and what can't be is told."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import storyadapter
from storyadapter.checkpoint import Checkpoint
from storyadapter.engine import calibration
from storyadapter.engine.backends import find_backend
from storyadapter.engine.calibration import calibration_stories, find_or_make_scales, find_scales
from storyadapter.engine.identity import engine_key, model_weights
from storyadapter.engine.opening import open_networks
from storyadapter.method.errors import EngineMismatchError, InputError, UnavailableError
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.modules import VaeDecoder
from storyadapter.model.numerics import NUMBER_FORMATS, NumberFormat, Numerics, Quantization
from storyadapter.quantization.layers import QuantizedLayer
from storyadapter.quantization.recipe import RECIPES, VAE_FP8
from storyadapter.quantization.scales import Scales
from tests.storyadapter.cli.running import Type

pytest.importorskip("modelopt", reason="needs nvidia-modelopt")

VAE = {"vae_decoder": Quantization("fp8")}


@pytest.fixture
def few_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    """One story of two steps is drawn to calibrate."""
    story = next(calibration_stories())
    monkeypatch.setattr(calibration, "calibration_stories", lambda: iter([story]))
    monkeypatch.setitem(find_or_make_scales.__kwdefaults__, "steps", 2)


def _decoder(checkpoint: Checkpoint) -> VaeDecoder:
    return VaeDecoder(checkpoint.load("vae", torch.float32)).eval()


def _pixels(folder: str) -> np.ndarray:
    with Image.open(Path(folder, "frames/000.png")) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def _in(form: NumberFormat, words: list[str]) -> list[str]:
    return [*words, "--precision", form, "--engine-dir", "engines"]


@pytest.mark.parametrize("form", NUMBER_FORMATS)
def test_build_calibrates_and_run_draws(
    type_in: Type, quick_run: list[str], tiny_model: list[str], few_stories: None, form: NumberFormat
) -> None:
    missing = type_in(*_in(form, quick_run))
    assert missing.code == 2
    assert "no scales of " in missing.err and "in the engine store; build it: storyadapter-trt build" in missing.err
    assert f"--precision {form}" in missing.err and "Traceback" not in missing.err

    build = _in(form, ["build", *tiny_model, "--backend", "eager", "--json-log"])
    built = type_in(*build)
    assert built.code == 0 and " layers calibrated in " in built.out
    again = type_in(*build)
    assert again.code == 0 and "calibrated in" not in again.out

    assert type_in(*_in(form, quick_run), "--out", "quantized").code == 0
    assert type_in(*quick_run, "--out", "exact").code == 0
    identity = json.loads(Path("quantized/story.json").read_text(encoding="utf-8"))["identity"]
    assert identity["precision"] == form and len(identity["scales"]) == 32
    difference = np.abs(_pixels("quantized") - _pixels("exact")).mean()
    assert 0 < difference < 20  # of 255: near, and not the same


@pytest.mark.parametrize(
    ("capability", "found"), [(None, "cpu"), ((8, 6), "compute capability 8.6"), ((8, 9), ""), ((12, 0), "")]
)
def test_a_device_without_fp8_is_told(
    capability: tuple[int, int] | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu" if capability is None else "cuda")
    monkeypatch.setattr("storyadapter.engine.inductor.backend.default_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    numerics, backend = Numerics.of("fp16", Quantization("fp8")), find_backend("inductor")
    if not found:
        backend.check(numerics)
        return
    with pytest.raises(
        UnavailableError,
        match=f"^backend inductor can't serve here: it can't run in fp8 on {found}; expected a CUDA GPU",
    ):
        backend.check(numerics)


def test_a_device_without_fp8_is_told_of_the_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storyadapter.engine.inductor.backend.default_device", lambda: torch.device("cpu"))
    numerics = Numerics.of("fp16", vae_decoder=Quantization("fp8"))
    with pytest.raises(UnavailableError, match="it can't run the VAE in fp8 on cpu; expected a CUDA GPU of") as raised:
        find_backend("inductor").check(numerics)
    assert raised.value.field == "vae_precision" and "type another vae_precision" in str(raised.value)


def test_a_backend_without_a_quantized_vae_is_told(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*quick_run, "--vae-precision", "fp8", "--backend", "onnxruntime")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1
    told = "backend onnxruntime can't serve here: it can't run the VAE in fp8; expected --vae-precision fp32 or fp16"
    assert told in done.err
    assert find_backend("auto", torch.device("cpu"), vae_precision="fp8").name in ("eager", "inductor")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_it_is_told_in_one_line_before_anything_is_read(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*_in("fp8", quick_run), "--backend", "inductor")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1
    told = "it can't run in fp8 on cpu; expected a CUDA GPU of compute capability 8.9 or later"
    assert told in done.err and "type another --precision, or backend eager" in done.err


def test_a_backend_without_a_number_format_is_told(type_in: Type, quick_run: list[str]) -> None:
    done = type_in(*_in("int8", quick_run), "--backend", "inductor")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1
    told = "backend inductor can't serve here: it can't run in int8; expected --precision fp32 or fp16 or bf16 or fp8"
    assert told in done.err


def test_the_server_and_the_api_ask_for_scales_too(
    type_in: Type, tiny_model: list[str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    told = "no scales of .* in the engine store; build it: storyadapter-trt build .*--precision fp8"
    parts = (tiny_model_dir, tiny_model_dir / "image_encoder", tiny_model_dir / "ip-adapter.safetensors")
    with pytest.raises(EngineMismatchError, match=told):
        storyadapter.open(*parts, backend="eager", precision="fp8", engine_dir=tmp_path)
    pytest.importorskip("fastapi", reason="needs the extra serve")
    done = type_in(*_in("fp8", ["serve", *tiny_model, "--backend", "eager", "--data", "data"]))
    assert done.code == 2 and re.search(told, done.err)


def test_numerics_say_what_the_checkpoint_must_do(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="^the checkpoint's denoiser isn't quantized; expected scales applied to it"):
        open_networks(checkpoint, numerics=Numerics.of("fp32", Quantization("fp8")))
    with pytest.raises(ValueError, match="^the checkpoint's vae_decoder isn't quantized; expected scales applied to"):
        open_networks(checkpoint, numerics=Numerics.of("fp32", vae_decoder=Quantization("fp8")))


def test_code_is_keyed_apart_from_scales_and_what_holds_weights_is_not(checkpoint: Checkpoint) -> None:
    numerics = [Numerics.of("fp32", Quantization("fp8", key)) for key in ("one", "other")]
    for backend, apart in (("inductor", True), ("onnxruntime", False)):
        first, second = (find_backend(backend).identity(checkpoint, each) for each in numerics)
        assert (first == second) == apart
        assert first.numerics.name == "fp8" and first != find_backend(backend).identity(checkpoint, Numerics("fp32"))
    of_vae = (Numerics.of("fp16", vae_decoder=Quantization("fp8", key)) for key in ("one", "other"))
    first, second = (find_backend("inductor").identity(checkpoint, each) for each in of_vae)
    plain = find_backend("inductor").identity(checkpoint, Numerics.of("fp16", vae_decoder="bf16"))
    assert first == second != plain
    assert plain.differences(first) == ["VAE precision is bf16 in the store, fp8 asked for"]
    ranges = ShapeRanges(1, 1, Range(64, 64), Range(64, 64))
    assert engine_key(first, ranges) != engine_key(plain, ranges)
    holding = replace(plain, numerics=Numerics.of("fp16", vae_decoder=Quantization("fp8", "one")))
    assert engine_key(holding, ranges) != engine_key(first, ranges)  # of an engine that holds them


@torch.no_grad()
@pytest.mark.parametrize("form", NUMBER_FORMATS)
def test_scales_are_those_of_their_model_and_format(
    checkpoint: Checkpoint, few_stories: None, tmp_path: Path, form: NumberFormat
) -> None:
    key, told, asked = model_weights(checkpoint).key, [], {"denoiser": Quantization(form)}
    assert find_scales(tmp_path, key, asked) is None
    made = find_or_make_scales(checkpoint, key, asked, tmp_path, on_fraction=told.append)
    own = made["denoiser"]
    assert find_scales(tmp_path, key, asked) == made and own.recipe == RECIPES[form] and own.model == key
    others = [{"denoiser": Quantization(other)} for other in NUMBER_FORMATS if other != form]
    assert [find_scales(tmp_path, key, other) for other in (*others, asked | VAE)] == [None, None]
    assert told == sorted(told) and told[-1] == 1.0
    find_or_make_scales(checkpoint, key, asked, tmp_path, on_fraction=told.clear)  # nothing is drawn again
    assert told
    (tmp_path / f".scales-{form}-{'0' * 32}").symlink_to(tmp_path / f".scales-{form}-{key}")
    with pytest.raises(InputError, match="are of model"):
        find_scales(tmp_path, "0" * 32, asked)


@torch.no_grad()
def test_one_drawing_calibrates_the_denoiser_and_the_vae(
    checkpoint: Checkpoint, few_stories: None, tmp_path: Path
) -> None:
    key, told = model_weights(checkpoint).key, []
    alone = find_or_make_scales(checkpoint, key, VAE, tmp_path / "alone")["vae_decoder"]
    assert alone.recipe == VAE_FP8 and alone.inputs.keys() == VAE_FP8.layers(_decoder(checkpoint)).keys() != set()
    both = {"denoiser": Quantization("fp8"), **VAE}
    made = find_or_make_scales(checkpoint, key, both, tmp_path / "both", on_fraction=told.append)
    assert made["vae_decoder"].inputs == alone.inputs and made["denoiser"].recipe == RECIPES["fp8"]
    assert told.count(1.0) == 1 and find_scales(tmp_path / "both", key, both) == made
    assert find_scales(tmp_path / "alone", key, both) is None
    # what the store has is taken from there, and only the other is found
    shutil.copytree(tmp_path / "alone", tmp_path / "some")
    assert find_or_make_scales(checkpoint, key, both, tmp_path / "some") == made


def test_build_calibrates_the_vae_and_run_decodes_with_its_scales(
    type_in: Type, quick_run: list[str], tiny_model: list[str], few_stories: None
) -> None:
    own = ["--vae-precision", "fp8", "--engine-dir", "engines"]
    missing = type_in(*quick_run, *own)
    assert missing.code == 2 and len(missing.err.strip().splitlines()) == 1
    assert "no scales of " in missing.err and "--vae-precision fp8" in missing.err

    build = ["build", *tiny_model, "--backend", "eager", "--json-log", *own]
    built = type_in(*build)
    assert built.code == 0 and " layers calibrated in " in built.out
    again = type_in(*build)
    assert again.code == 0 and "calibrated in" not in again.out

    assert type_in(*quick_run, *own, "--out", "quantized").code == 0
    assert type_in(*quick_run, "--vae-precision", "bf16", "--out", "exact").code == 0
    identity = json.loads(Path("quantized/story.json").read_text(encoding="utf-8"))["identity"]
    assert (identity["precision"], identity["vae_precision"]) == ("fp32", "fp8") and len(identity["vae_scales"]) == 32
    assert "scales" not in identity
    difference = np.abs(_pixels("quantized") - _pixels("exact")).mean()
    assert 0 < difference < 20  # of 255: near, and not the same

    edited = type_in("edit", "quantized", "--frame", "0", "--seed", "5", "--engine-dir", "engines", "--out", "other")
    assert edited.code == 0  # decoded in the run's own arithmetic
    after = json.loads(Path("other/story.json").read_text(encoding="utf-8"))["identity"]
    assert after["vae_scales"] == identity["vae_scales"]


@torch.no_grad()
def test_a_frame_that_is_decoded_again_is_decoded_in_plain_fp32(checkpoint: Checkpoint) -> None:
    inputs = dict.fromkeys(VAE_FP8.layers(_decoder(checkpoint)), 1.0)
    scales = {"vae_decoder": Scales(VAE_FP8, "model", inputs)}
    model, numerics = calibration.quantized(checkpoint, Numerics.of("fp32", vae_decoder=VAE["vae_decoder"]), scales)
    networks = open_networks(model, numerics=numerics)
    count = [
        sum(isinstance(part, QuantizedLayer) for part in each["vae_decoder"].module.modules())
        for each in (networks, networks.load_fp32("vae_decoder"))
    ]
    assert count == [len(inputs), 0] and networks["vae_decoder"].precision == "bf16"


def test_stories_have_64_different_prompts() -> None:
    prompts = [prompt for story in calibration_stories() for prompt in story.prompts]
    assert len(set(prompts)) == 64


def test_a_story_of_the_users_calibrates(
    type_in: Type, quick_run: list[str], tiny_model: list[str], few_stories: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_LEAST", 4)
    Path("tale.yaml").write_text("title: A tale\nstyle: none\nprompts: [a zebra, {prompt: a robot, seed: 5}]\n")
    build = _in("fp8", ["build", *tiny_model, "--backend", "eager"])
    run = _in("fp8", quick_run)

    def scales_of(out: str, told: str) -> str:
        done = type_in(*run, "--iterations", "0", "--out", out)
        assert done.code == 0 and done.err.count(f"8-bit products calibrated by {told}\n") == 1, done.err
        return json.loads(Path(out, "story.json").read_text(encoding="utf-8"))["identity"]["scales"]

    assert type_in(*build).code == 0
    built_in = scales_of("one", "the built-in stories")
    done = type_in(*build, "--calibration-story", "tale.yaml", "--json-log")
    assert done.code == 0 and " layers calibrated in " in done.out
    fractions = [event["done"] for event in done.events if event["event"] == "building"]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    (folder,) = (path for path in Path("engines").glob(".scales-fp8-*-*") if path.is_dir())
    story = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["story"]
    assert story == {"digest": folder.name[-32:], "title": "A tale", "path": str(Path("tale.yaml").absolute())}
    by_tale = scales_of("two", '"A tale"')
    assert by_tale != built_in
    done = type_in(*run, "--iterations", "1", "--backend", "onnxruntime")  # whose engine holds the scales
    told = shlex.split(done.err.partition("build it: ")[2])
    assert done.code == 2 and told[told.index("--calibration-story") + 1] == story["path"]

    # each is found again, without drawing, and run takes the one that was typed last
    done = type_in(*build, "--json-log")
    assert done.code == 0 and "calibrated in" not in done.out
    assert scales_of("three", "the built-in stories") == built_in
    done = type_in(*build, "--calibration-story", "tale.yaml", "--json-log")
    assert done.code == 0 and "calibrated in" not in done.out
    assert scales_of("four", '"A tale"') == by_tale
    # a story that draws something else finds scales of its own
    Path("tale.yaml").write_text("title: A tale\nstyle: none\nprompts: [a zebra, {prompt: a robot, seed: 6}]\n")
    assert " layers calibrated in " in type_in(*build, "--calibration-story", "tale.yaml", "--json-log").out
    assert scales_of("five", '"A tale"') not in (built_in, by_tale)
    (choice,) = Path("engines").glob(".scales-fp8-*.chosen")
    choice.write_text("../elsewhere")
    done = type_in(*run, "--out", "six")
    assert done.code == 2 and ".chosen is damaged; build again" in done.err and not Path("six").exists()
    assert type_in(*build).code == 0
    assert scales_of("seven", "the built-in stories") == built_in


def test_stories_that_can_not_calibrate_are_refused(
    type_in: Type, tiny_model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ["build", *tiny_model, "--backend", "eager", "--engine-dir", "engines"]
    done = type_in(*build, "--calibration-story", "tale.yaml")
    told = "expected --precision fp8 or int8, or --vae-precision fp8 with it"
    assert done.code == 2 and f"--calibration-story calibrates 8-bit products; {told}" in done.err
    build += ["--precision", "fp8", "--calibration-story"]
    done = type_in(*build, "tale.yaml")
    assert done.code == 2 and "tale.yaml" in done.err and len(done.err.splitlines()) == 1
    Path("tale.yaml").write_text("prompts: [a fox, {prompt: an owl, seeed: 3}]\n")
    done = type_in(*build, "tale.yaml")
    assert done.code == 2 and "tale.yaml, line 1: prompt 2 has the unknown key 'seeed'" in done.err
    Path("tale.yaml").write_text("prompts: [a fox, {prompt: an owl, control: pose.png}]\n")
    done = type_in(*build, "tale.yaml")
    assert done.code == 2 and "frame 1 has a control picture, and there is no ControlNet" in done.err
    Path("tale.yaml").write_text("prompts: [a fox]\n")
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    done = type_in(*build, "tale.yaml")
    assert done.code == 2 and "nvidia-modelopt, which calibrates; type: pip install" in done.err
    assert not Path("engines").exists()
