"""One network of the checkpoint: its configuration and files, their two layouts, and the check that they fit.

SDXL in one `.safetensors` file of the original layout is converted by diffusers' own functions: the same ones convert
the header's shapes for the check and the weights for loading.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storyadapter.checkpoint.tensor_files import read_headers, read_tensors
from storyadapter.method.errors import CheckpointError, Field, Text, said

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Names of a file turned into names of the network; given the empty network too. Works on the meta device.
Convert = Callable[["nn.Module", "dict[str, Tensor]"], "dict[str, Tensor]"]

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "conditioner.embedders.0.transformer."
TEXT_PREFIX_2 = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."

_WHOLE = "a whole SDXL checkpoint"

# What diffusers calls the kinds of single files, in words.
_KINDS = {
    "v1": "Stable Diffusion 1.x or an unknown layout",
    "v2": "Stable Diffusion 2.x",
    "xl_refiner": "the SDXL refiner",
    "xl_inpaint": "an SDXL inpainting model",
    "inpainting": "a Stable Diffusion 1.x inpainting model",
}


@dataclass(frozen=True)
class Component:
    """One network of the checkpoint."""

    title: Text  # what messages call it, such as "the UNet"
    config_file: Path  # where its sizes come from
    build: "Callable[[], nn.Module]"  # makes the network without weights; called on an empty-weights context
    files: tuple[Path, ...]  # weights; a shard index may be among them
    convert: Convert  # from the tensors of the files to those of the network
    prefix: str = ""  # only tensors whose names start with it are read: a single file holds several networks
    # the empty network that was checked, until it is loaded: to make one takes a second
    _checked: list[Any] = field(default_factory=list, compare=False)

    def check(self) -> Any:
        """Compare names and shapes in the files' headers with the network, and return the empty network.

        Raises:
            CheckpointError: the configuration doesn't describe such a network, a file is corrupt, or tensors are
                missing, unexpected, of other shapes, or quantized.
        """
        network, _ = self._read(read_headers)
        self._checked.append(network)
        return network

    def load(self, dtype: "torch.dtype", device: "torch.device | None" = None) -> "nn.Module":
        """The network on `device`, or else the CPU, its weights in `dtype`, in evaluation mode without gradients.

        Raises:
            CheckpointError: the files no longer are what was checked.
        """
        network, tensors = self._read(lambda path: read_tensors(path, dtype, self._wanted, device))
        network.load_state_dict(tensors, assign=True)
        return network.to(device).requires_grad_(False)  # only buffers are left to be moved

    def _wanted(self, name: str) -> bool:
        return name.startswith(self.prefix)

    def _read(self, read: "Callable[[Path], dict[str, Tensor]]") -> "tuple[Any, dict[str, Tensor]]":
        """The empty network, and what `read` finds in its files, by the network's names, if that fits."""
        network = self._checked.pop() if self._checked else self._empty()
        found: dict[str, Tensor] = {}
        paths = [path for path in self.files if path.suffix != ".json"]
        for path in paths:
            found |= {name: tensor for name, tensor in read(path).items() if self._wanted(name)}
        where = (self.title, f" in {paths[0].parent if len(paths) > 1 else paths[0]}")
        try:
            found = self.convert(network, found)
        except KeyError as error:  # the conversions of diffusers look some names up
            raise CheckpointError(where, f" lacks the tensor {error}", expected=_WHOLE) from error
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # … and take names apart
            raise CheckpointError(where, f" can't be converted: {said(error)}", expected=_WHOLE) from error
        expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        compare(where, str(self.config_file), expected, found)
        return network, found

    def _empty(self) -> Any:
        """The network with all its parameters on the meta device, in evaluation mode."""
        from accelerate import init_empty_weights
        from transformers.initialization import no_init_weights

        try:
            with init_empty_weights(include_buffers=False), no_init_weights():
                return self.build().eval().requires_grad_(False)
        except Exception as error:  # anything a nonsensical configuration makes the constructors raise
            raise CheckpointError(f"{self.config_file} doesn't describe ", self.title, f": {said(error)}") from error


def compare(where: Text, target: str, expected: Mapping[str, list[int]], found: "Mapping[str, Tensor]") -> None:
    """Raises CheckpointError unless `found` has exactly the expected names and shapes and is all floating point."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    reshaped = [name for name in both if expected[name] != list(found[name].shape)]
    quantized = [name for name in both if not found[name].is_floating_point()]
    faults = [_count(missing, "missing"), _count(unexpected, "unexpected")]
    if reshaped:
        name = reshaped[0]
        faults.append(_count(reshaped, "of another shape", f" is {list(found[name].shape)}, expected {expected[name]}"))
    faults.append(_count(quantized, "of whole numbers", ": a quantized checkpoint; expected fp32, fp16 or bf16"))
    if any(faults):
        raise CheckpointError(where, f" doesn't fit {target}: {'; '.join(filter(None, faults))}")


def _count(names: list[str], kind: str, note: str = "") -> str:
    if not names:
        return ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {kind} ({names[0]}{note})"


def folder_names(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Names in today's spelling.

    transformers 5.6 dropped the prefix "text_model." of `CLIPTextModel`, older files hold `position_ids`, which are no
    weights, and VAEs saved before diffusers 0.17 spell the attention's layers in another way.
    """
    prefixed = any(name.startswith("text_model.") for name in network.state_dict())
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):
            continue
        if not prefixed:
            name = name.removeprefix("text_model.")
        if ".mid_block.attentions." in name:
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor  # a 1x1 convolution of old
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                name = name.replace(f".{old}.", f".{new}.")
        result[name] = tensor
    return result


def check_single_file(path: Path, needs_vae: bool) -> None:
    """Raises CheckpointError unless the file holds a whole SDXL base model (its VAE only if that is needed)."""
    headers = read_headers(path)
    missing = [
        f"{title} ({prefix}*)"
        for title, prefix, needed in (
            ("the UNet", UNET_PREFIX, True),
            ("text encoder 1", TEXT_PREFIX, True),
            ("text encoder 2", TEXT_PREFIX_2, True),
            ("the VAE", VAE_PREFIX, needs_vae),
        )
        if needed and not any(name.startswith(prefix) for name in headers)
    ]
    if len(missing) == 1 and missing[0].startswith("the VAE"):
        raise CheckpointError(f"{path} holds no VAE ({VAE_PREFIX}*)", advice=("give one with ", Field("vae")))
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: it looks like {_kind(headers)}",
            expected="an SDXL base model in the original single-file layout",
        )
    if (first := headers.get(f"{UNET_PREFIX}input_blocks.0.0.weight")) is not None and first.shape[1] == 9:
        raise CheckpointError(f"{path} is an inpainting model with 9 input channels", expected="an SDXL base model")


def _kind(headers: "dict[str, Tensor]") -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if not any(name.startswith((UNET_PREFIX, "cond_stage_model.", "conditioner.")) for name in headers):
        return f"no Stable Diffusion model ({len(headers)} tensors, the first is {next(iter(headers), 'absent')})"
    kind = infer_diffusers_model_type(headers)
    return _KINDS.get(kind, kind)


def convert_unet(network: Any, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return _nothing_lost(tensors, convert_ldm_unet_checkpoint(tensors, config=dict(network.config)))


def convert_unet_file(network: Any, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Of a UNet alone, in diffusers' layout or the original one without its prefix."""
    if any(name.startswith("down_blocks.") for name in tensors):
        return folder_names(network, tensors)
    return convert_unet(network, {UNET_PREFIX + name: tensor for name, tensor in tensors.items()})


def convert_controlnet(network: Any, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Of a ControlNet alone, in diffusers' layout or the original one."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_controlnet_checkpoint

    if "time_embedding.linear_1.weight" in tensors:
        return folder_names(network, tensors)
    tensors = {name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}
    converted = convert_controlnet_checkpoint(dict(tensors), config=dict(network.config))
    # the conversion leaves SDXL's size and text embedding out
    added = DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"]
    converted |= {name: tensors.get(old) for name, old in added.items()}
    return _nothing_lost(tensors, {name: tensor for name, tensor in converted.items() if tensor is not None})


def convert_vae(network: Any, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Of a single file's VAE, or of a VAE alone, in the original layout or in diffusers' own."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return folder_names(network, tensors)
    # Training leftovers that some files keep beside the VAE.
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("loss.", "model_ema."))}
    return _nothing_lost(tensors, convert_ldm_vae_checkpoint(tensors, config=dict(network.config)))


def convert_text_encoder(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    return folder_names(network, convert_ldm_clip_checkpoint(tensors))


def convert_text_encoder_2(network: "nn.Module", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    converted = convert_open_clip_checkpoint(network, tensors, prefix=TEXT_PREFIX_2)
    kept = {id(tensor) for tensor in converted.values()}
    # The conversion splits and transposes these, and has no use for CLIP's temperature.
    used = tuple(TEXT_PREFIX_2 + name for name in ("transformer.", "text_projection", "logit_scale"))
    dropped = {name: t for name, t in tensors.items() if id(t) not in kept and not name.startswith(used)}
    return {**converted, **dropped}


def _nothing_lost(before: "dict[str, Tensor]", after: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """`after`, with what the conversion dropped under its old name, so that the comparison reports it.

    The conversions rename tensor by tensor and pass over names they don't know. A renamed tensor stays the same object,
    except for the matrices of a VAE's attention, which lose their 1x1 dimensions.
    """
    if len(before) == len(after):
        return after
    kept = {id(tensor) for tensor in after.values()}
    dropped = {name: t for name, t in before.items() if id(t) not in kept and ".attn_1." not in name}
    return {**after, **dropped}
