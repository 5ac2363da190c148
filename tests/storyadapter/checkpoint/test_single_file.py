"""A single file of the original layout, and a VAE of one's own: the same weights as the folder's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from tests.storyadapter.checkpoint.original_layout import original_unet, original_vae, single_file
from tests.storyadapter.checkpoint.spoil import cut_short, edit_tensors, refuses, tiny_paths

NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Checkpoint) -> Tensors:
    return single_file(*(tiny_checkpoint.load(name, torch.float32) for name in NETWORKS))


@pytest.fixture
def file(whole: Tensors, tmp_path: Path) -> Path:
    save_file(whole, tmp_path / "sdxl.safetensors")
    return tmp_path / "sdxl.safetensors"


@pytest.fixture
def paths(file: Path, tiny_model_dir: Path) -> CheckpointPaths:
    return tiny_paths(tiny_model_dir, base_model=file, base_config=tiny_model_dir)


def assert_same(checkpoint: Checkpoint, other: Checkpoint, names: tuple[str, ...] = NETWORKS) -> None:
    for name in names:
        state = checkpoint.load(name, torch.float32).state_dict()
        expected = other.load(name, torch.float32).state_dict()
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), f"{name}.{key}"


def test_same_weights_as_the_folder(paths: CheckpointPaths, tiny_checkpoint: Checkpoint) -> None:
    checkpoint = Checkpoint.open(paths)
    assert_same(checkpoint, tiny_checkpoint)
    assert checkpoint.geometry == tiny_checkpoint.geometry
    assert paths.base_model in checkpoint.files_by_component["unet"]
    half = checkpoint.load("text_encoder_2", torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_same_unet_as_diffusers_reads(paths: CheckpointPaths) -> None:
    from diffusers import UNet2DConditionModel

    expected = UNet2DConditionModel.from_single_file(
        str(paths.base_model), config=str(paths.base_config), subfolder="unet", local_files_only=True
    )
    state = Checkpoint.open(paths).load("unet", torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_configuration_folder_without_weights(model_dir: Path, file: Path, tiny_checkpoint: Checkpoint) -> None:
    paths = tiny_paths(model_dir, base_model=file, base_config=model_dir)
    for name in NETWORKS:
        for weights in (model_dir / name).glob("*.safetensors"):
            weights.unlink()
    assert_same(Checkpoint.open(paths), tiny_checkpoint)


def test_training_leftovers_are_passed_over(paths: CheckpointPaths, file: Path, tiny_checkpoint: Checkpoint) -> None:
    edit_tensors(file, lambda t: t.update({"denoiser.sigmas": torch.zeros(9), "model_ema.decay": torch.zeros(1)}))
    assert_same(Checkpoint.open(paths), tiny_checkpoint)


# ---- a UNet of one's own ----


@pytest.mark.parametrize("layout", ["folder", "pipeline", "diffusers file", "pickle", "original file", "with prefix"])
def test_another_unet(tiny_model_dir: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, layout: str) -> None:
    unet = tiny_checkpoint.load("unet", torch.float32)
    with torch.no_grad():
        unet.conv_out.bias += 1
    path = tmp_path / ("unet.bin" if layout == "pickle" else "unet.safetensors")
    match layout:
        case "folder" | "pipeline":
            path = tmp_path / "given"
            unet.save_pretrained(path / "unet" if layout == "pipeline" else path)
        case "diffusers file":
            save_file(unet.state_dict(), path)
        case "pickle":
            torch.save(unet.state_dict(), path)
        case _:
            prefix = "model.diffusion_model." if layout == "with prefix" else ""
            save_file({prefix + name: t.contiguous() for name, t in original_unet(unet).items()}, path)
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, unet=path))
    state = checkpoint.load("unet", torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in unet.state_dict().items())
    assert any(path == file or path in file.parents for file in checkpoint.files_by_component["unet"])
    assert checkpoint.label.endswith(f" + UNet {path.name}")


def test_a_unet_of_other_sizes(tiny_model_dir: Path, demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_file(demo_checkpoint.load("unet", torch.float32).state_dict(), tmp_path / "unet.safetensors")
    refuses(
        "the UNet given with --unet in … unet.safetensors doesn't fit … of another shape",
        tiny_paths(tiny_model_dir, unet=tmp_path / "unet.safetensors"),
    )


# ---- a VAE of one's own ----


def brighter(vae: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    return vae


@pytest.mark.parametrize("layout", ["folder", "diffusers file", "original file", "original file with prefix"])
def test_another_vae(tiny_model_dir: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, layout: str) -> None:
    vae = brighter(tiny_checkpoint.load("vae", torch.float32))
    path = tmp_path / "vae.safetensors"
    if layout == "folder":
        path = tmp_path / "vae"
        vae.save_pretrained(path)
    elif layout == "diffusers file":
        save_file(vae.state_dict(), path)
    else:
        prefix = "first_stage_model." if "prefix" in layout else ""
        save_file({prefix + name: t.contiguous() for name, t in original_vae(vae).items()}, path)
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, vae=path))
    state = checkpoint.load("vae", torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in vae.state_dict().items())
    assert not torch.equal(
        state["decoder.conv_out.bias"], tiny_checkpoint.load("vae", torch.float32).decoder.conv_out.bias
    )


def test_another_vae_for_a_file_that_has_none(
    paths: CheckpointPaths, file: Path, tiny_model_dir: Path, tiny_checkpoint: Checkpoint
) -> None:
    edit_tensors(file, _drop("first_stage_model."))
    refuses("holds no VAE (first_stage_model.*); give one with --vae", paths)
    typed = {"base_model": file, "base_config": tiny_model_dir, "vae": tiny_model_dir / "vae"}
    assert_same(Checkpoint.open(tiny_paths(tiny_model_dir, **typed)), tiny_checkpoint)


def test_vae_of_training_has_a_loss(tiny_model_dir: Path, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in original_vae(tiny_checkpoint.load("vae", torch.float32)).items()}
    save_file(tensors | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
    assert_same(
        Checkpoint.open(tiny_paths(tiny_model_dir, vae=tmp_path / "vae.safetensors")), tiny_checkpoint, ("vae",)
    )


def test_vae_that_is_neither(tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "vae.ckpt")
    paths = tiny_paths(tiny_model_dir, vae=tmp_path / "vae.ckpt")
    refuses("--vae … vae.ckpt is a PyTorch file; expected a diffusers folder, or one .safetensors file", paths)


def test_vae_that_is_something_else(tiny_model_dir: Path) -> None:
    paths = tiny_paths(tiny_model_dir, vae=tiny_model_dir / "ip-adapter.safetensors")
    refuses("the VAE given with --vae in … ip-adapter.safetensors doesn't fit … tensors missing", paths)


def test_vae_folder_that_is_another_model(tiny_model_dir: Path) -> None:
    paths = tiny_paths(tiny_model_dir, vae=tiny_model_dir / "unet")
    refuses("configuration of UNet2DConditionModel; expected AutoencoderKL", paths)


# ---- what is refused ----


def _drop(prefix: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return drop


def test_no_base_config(tiny_model_dir: Path, file: Path) -> None:
    refuses(
        "is a single file, which has no tokenizers and no configurations; give --base-config DIR",
        tiny_paths(tiny_model_dir, base_model=file),
    )


def test_base_config_that_is_a_file(tiny_model_dir: Path, file: Path) -> None:
    refuses(
        "--base-config … is a file; expected a diffusers SDXL folder",
        tiny_paths(tiny_model_dir, base_model=file, base_config=file),
    )


def test_variant_of_a_single_file(tiny_model_dir: Path, file: Path) -> None:
    paths = tiny_paths(tiny_model_dir, base_model=file, base_config=tiny_model_dir, variant="fp16")
    refuses("the variant fp16 belongs to a diffusers folder", paths)


def test_pickled_single_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "sdxl.ckpt")
    paths = tiny_paths(tiny_model_dir, base_model=tmp_path / "sdxl.ckpt", base_config=tiny_model_dir)
    refuses("--base-model … sdxl.ckpt is a PyTorch file; expected a diffusers folder, or one .safetensors", paths)


def test_cut_short(paths: CheckpointPaths, file: Path) -> None:
    cut_short(file)
    refuses("sdxl.safetensors is not a whole .safetensors file", paths)


def test_stable_diffusion_1(paths: CheckpointPaths, file: Path) -> None:
    def old(tensors: Tensors) -> None:
        _drop("conditioner.")(tensors)
        tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(768)

    edit_tensors(file, old)
    refuses(
        "lacks text encoder 1 (conditioner.embedders.0.transformer.*), text encoder 2 (conditioner.embedders.1.model.*)"
        ": it looks like Stable Diffusion 1.x or an unknown layout; expected an SDXL base model",
        paths,
    )


def test_refiner(paths: CheckpointPaths, file: Path) -> None:
    def refiner(tensors: Tensors) -> None:
        _drop("conditioner.")(tensors)
        tensors["conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"] = torch.zeros(8)

    edit_tensors(file, refiner)
    refuses("looks like the SDXL refiner; expected an SDXL base model", paths)


def test_inpainting_model(paths: CheckpointPaths, file: Path) -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    edit_tensors(file, lambda tensors: tensors.update({first: torch.zeros(32, 9, 3, 3)}))
    refuses("is an inpainting model with 9 input channels; expected an SDXL base model", paths)


def test_lora_in_place_of_the_model(paths: CheckpointPaths, file: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2)}, file)
    refuses("looks like no Stable Diffusion model (1 tensors, the first is lora_unet_x.lora_down.weight)", paths)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("model.diffusion_model.input_blocks.3.1.proj_in.weight", "the UNet"),
        ("model.diffusion_model.label_emb.0.0.weight", "the UNet"),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.bias", "text encoder 1"),
        ("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight", "text encoder 2"),
        ("conditioner.embedders.1.model.text_projection", "text encoder 2"),
        ("first_stage_model.decoder.conv_in.weight", "the VAE"),
        ("first_stage_model.encoder.mid.attn_1.q.weight", "the VAE"),
    ],
)
def test_missing_tensor(paths: CheckpointPaths, file: Path, name: str, title: str) -> None:
    edit_tensors(file, lambda tensors: tensors.pop(name))
    refuses(f"{title} in … sdxl.safetensors", paths)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.extra.weight",
        "model.diffusion_model.input_blocks.3.1.extra",
        "conditioner.embedders.0.transformer.text_model.extra",
        "conditioner.embedders.1.model.transformer.resblocks.1.extra",
        "conditioner.embedders.1.model.extra",
        "first_stage_model.extra",
        "first_stage_model.decoder.extra",
    ],
)
def test_unexpected_tensor(paths: CheckpointPaths, file: Path, name: str) -> None:
    edit_tensors(file, lambda tensors: tensors.update({name: torch.zeros(1)}))
    refuses("1 tensor unexpected ( … extra", paths)


def test_tensor_of_another_shape(paths: CheckpointPaths, file: Path) -> None:
    name = "model.diffusion_model.input_blocks.3.1.proj_in.weight"
    edit_tensors(file, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    refuses("1 tensor of another shape (down_blocks.1.attentions.0.proj_in.weight is [3, 3], expected [32, 32])", paths)
