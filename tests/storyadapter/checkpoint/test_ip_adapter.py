"""The IP-Adapter: its tensors by layer, and every kind of file that isn't the plain one for SDXL."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storyadapter.checkpoint import Checkpoint
from tests.storyadapter.checkpoint.spoil import cut_short, edit_config, edit_tensors, refuses, tiny_paths

EXPECTED = "expected the plain 4-token IP-Adapter for SDXL"
Tensors = dict[str, Tensor]


def nested(tensors: Tensors) -> dict[str, Tensors]:
    """The form of the published `.bin`: {"image_proj": {…}, "ip_adapter": {…}}."""
    result: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        result.setdefault(part, {})[rest] = tensor
    return result


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_by_layer(tiny_model_dir: Path, tmp_path: Path, suffix: str) -> None:
    tensors = load_file(tiny_model_dir / "ip-adapter.safetensors")
    path = tmp_path / f"adapter.{suffix}"
    if suffix == "bin":
        torch.save(nested(tensors), path)
    else:
        save_file(tensors, path)
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, ip_adapter=path))
    weights = checkpoint.load_ip_adapter(torch.float32)
    for field in ("proj", "norm"):
        for part in ("weight", "bias"):
            got = getattr(weights, f"{'projection' if field == 'proj' else field}_{part}")
            assert torch.equal(got, tensors[f"image_proj.{field}.{part}"])
    processors = list(checkpoint.load("unet", torch.float32).attn_processors)
    assert len(weights.layers) == len(processors) // 2
    for layer in weights.layers:
        index = processors.index(f"{layer.module}.processor")
        assert torch.equal(layer.to_k, tensors[f"ip_adapter.{index}.to_k_ip.weight"])
        assert torch.equal(layer.to_v, tensors[f"ip_adapter.{index}.to_v_ip.weight"])
    order = [processors.index(f"{layer.module}.processor") for layer in weights.layers]
    assert order == sorted(order)
    assert checkpoint.load_ip_adapter(torch.float16).layers[0].to_k.dtype == torch.float16


def refuses_adapter(pattern: str, folder: Path, change: Callable[[Tensors], object]) -> None:
    edit_tensors(folder / "ip-adapter.safetensors", change)
    refuses(pattern, tiny_paths(folder))


def test_plus(model_dir: Path) -> None:
    def plus(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("image_proj.")]:
            del tensors[name]
        tensors |= {"image_proj.latents": torch.zeros(1, 16, 64), "image_proj.proj_in.weight": torch.zeros(64, 32)}

    refuses_adapter(f"is an IP-Adapter Plus with 16 tokens per image (a resampler); {EXPECTED}", model_dir, plus)


def test_face_id(model_dir: Path) -> None:
    def face_id(tensors: Tensors) -> None:
        tensors["ip_adapter.0.to_q_lora.down.weight"] = torch.zeros(4, 32)

    refuses_adapter(f"is a FaceID IP-Adapter (for face recognition embeddings); {EXPECTED}", model_dir, face_id)


def test_face_id_plus(model_dir: Path) -> None:
    def face_id(tensors: Tensors) -> None:
        tensors["image_proj.perceiver_resampler.proj_in.weight"] = torch.zeros(4, 32)

    refuses_adapter(f"is a FaceID IP-Adapter (for face recognition embeddings); {EXPECTED}", model_dir, face_id)


@pytest.mark.parametrize("kind", ["FaceID", "full-face"])
def test_projection_of_several_layers(model_dir: Path, kind: str) -> None:
    def several(tensors: Tensors) -> None:
        tensors["image_proj.proj.0.weight"] = tensors.pop("image_proj.proj.weight")
        if kind == "full-face":
            del tensors["image_proj.norm.weight"]

    refuses_adapter(f"is a {kind} IP-Adapter (its image projection has several layers); {EXPECTED}", model_dir, several)


def test_stable_diffusion_1_5(model_dir: Path) -> None:
    def old(tensors: Tensors) -> None:
        tensors.clear()
        for index in range(16):
            for part in "kv":
                tensors[f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight"] = torch.zeros(32, 768)
        tensors |= {"image_proj.proj.weight": torch.zeros(4 * 768, 32), "image_proj.norm.weight": torch.zeros(768)}

    refuses_adapter(
        "made for Stable Diffusion 1.5: 16 layers with image tokens 768 wide; the UNet has 7 cross-attention layers "
        "with text 64 wide",
        model_dir,
        old,
    )


def test_another_number_of_layers(model_dir: Path) -> None:
    def fewer(tensors: Tensors) -> None:
        for part in "kv":
            del tensors[f"ip_adapter.1.to_{part}_ip.weight"]

    refuses_adapter("6 layers with image tokens 64 wide; the UNet has 7 cross-attention layers", model_dir, fewer)


def test_layers_at_self_attentions(model_dir: Path) -> None:
    def shifted(tensors: Tensors) -> None:
        layers = {name: tensors.pop(name) for name in list(tensors) if name.startswith("ip_adapter.")}
        for name, tensor in layers.items():
            _, index, rest = name.split(".", 2)
            tensors[f"ip_adapter.{int(index) - 1}.{rest}"] = tensor

    refuses_adapter(
        "doesn't fit the UNet: 14 tensors missing ( … ); 14 tensors unexpected (ip_adapter.0.", model_dir, shifted
    )


def test_missing_tensor(model_dir: Path) -> None:
    refuses_adapter(
        "doesn't fit the UNet: 1 tensor missing (image_proj.norm.bias)",
        model_dir,
        lambda tensors: tensors.pop("image_proj.norm.bias"),
    )


def test_unexpected_tensor(model_dir: Path) -> None:
    refuses_adapter(
        "doesn't fit the UNet: 1 tensor unexpected (image_proj.extra)",
        model_dir,
        lambda tensors: tensors.update({"image_proj.extra": torch.zeros(1)}),
    )


def test_layer_of_another_width(model_dir: Path) -> None:
    name = "ip_adapter.1.to_v_ip.weight"
    refuses_adapter(
        f"doesn't fit the UNet: 1 tensor of another shape ({name} is [48, 64], expected [32, 64])",
        model_dir,
        lambda tensors: tensors.update({name: torch.zeros(48, 64)}),
    )


def test_whole_numbers(model_dir: Path) -> None:
    name = "ip_adapter.1.to_v_ip.weight"
    refuses_adapter(
        f"doesn't fit the UNet: 1 tensor of whole numbers ({name}: a quantized checkpoint; expected",
        model_dir,
        lambda tensors: tensors.update({name: torch.zeros(32, 64, dtype=torch.int8)}),
    )


def test_another_number_of_tokens(model_dir: Path) -> None:
    refuses_adapter(
        f"makes 16 tokens per image; {EXPECTED}",
        model_dir,
        lambda tensors: tensors.update({"image_proj.proj.weight": torch.zeros(16 * 64, 32)}),
    )


def test_image_encoder_of_another_width(model_dir: Path) -> None:
    refuses_adapter(
        "takes image embeddings 48 wide, the image encoder in … gives 32; give the one that belongs to the adapter "
        "with --image-encoder",
        model_dir,
        lambda tensors: tensors.update({"image_proj.proj.weight": torch.zeros(4 * 64, 48)}),
    )


def test_projection_of_no_known_shape(model_dir: Path) -> None:
    refuses_adapter(
        "1 tensor of another shape (image_proj.proj.weight is [5], expected [256, 32])",
        model_dir,
        lambda tensors: tensors.update({"image_proj.proj.weight": torch.zeros(5)}),
    )


def test_no_adapter_at_all(model_dir: Path) -> None:
    paths = tiny_paths(model_dir, ip_adapter=model_dir / "unet" / "diffusion_pytorch_model.safetensors")
    refuses(f"is no IP-Adapter: it lacks image_proj and ip_adapter parts and begins with … ; {EXPECTED}", paths)


def test_layers_of_unknown_names(model_dir: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("ip_adapter.")]:
            tensors[name.replace("to_", "into_")] = tensors.pop(name)

    refuses_adapter(
        f"has no layers named ip_adapter.<i>.to_k_ip.weight, but ip_adapter. … ; {EXPECTED}", model_dir, rename
    )


def test_corrupt(model_dir: Path) -> None:
    cut_short(model_dir / "ip-adapter.safetensors")
    refuses("ip-adapter.safetensors is not a whole .safetensors file", tiny_paths(model_dir))


def test_missing_file(tiny_model_dir: Path) -> None:
    refuses(
        "--ip-adapter /nowhere/a.bin: there is no such file", tiny_paths(tiny_model_dir, ip_adapter="/nowhere/a.bin")
    )


def test_folder(tiny_model_dir: Path) -> None:
    paths = tiny_paths(tiny_model_dir, ip_adapter=tiny_model_dir)
    refuses("--ip-adapter … is a folder; expected a .safetensors or .bin file", paths)


def test_adapter_and_unet_of_another_text_width(model_dir: Path) -> None:
    edit_config(model_dir / "unet" / "config.json", cross_attention_dim=2048)
    refuses("the UNet in … doesn't fit … of another shape", tiny_paths(model_dir))
