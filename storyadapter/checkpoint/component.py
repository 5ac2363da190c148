"""One network of the checkpoint: its configuration and files, their two layouts, and the check that they fit.

SDXL in one `.safetensors` file of the original layout is converted by diffusers' own functions: what they do to the
header's shapes is recorded for the check, and done to the weights for loading.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from storyadapter.checkpoint.outline import Outline, outline_of
from storyadapter.checkpoint.remembered import digest_of, remembered
from storyadapter.checkpoint.tensor_files import read_headers, read_tensors
from storyadapter.method.errors import CheckpointError, Field, Text, said

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Names of a file turned into names of the network; given what that consists of. Looks at no values.
Convert = Callable[[Outline, "dict[str, Tensor]"], "dict[str, Tensor]"]

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
    kind: str  # its class in diffusers or transformers
    config: Mapping[str, Any]  # what the class is made of
    files: tuple[Path, ...]  # weights; a shard index may be among them
    convert: Convert  # from the tensors of the files to those of the network
    prefix: str = ""  # only tensors whose names start with it are read: a single file holds several networks
    _outline: list[Outline] = field(default_factory=list, compare=False)  # when it was found

    @property
    def outline(self) -> Outline:
        """What the network consists of.

        Raises:
            CheckpointError: the configuration doesn't describe such a network.
        """
        if not self._outline:
            try:
                self._outline.append(outline_of(self.kind, self.config))
            except Exception as error:  # anything a nonsensical configuration makes the constructors raise
                raise CheckpointError(
                    f"{self.config_file} doesn't describe ", self.title, f": {said(error)}"
                ) from error
        return self._outline[0]

    def check(self) -> Outline:
        """Compare names and shapes in the files' headers with the network's, which are given.

        Raises:
            CheckpointError: the configuration doesn't describe such a network, a file is corrupt, or tensors are
                missing, unexpected, of other shapes, or quantized.
        """
        self._read(read_headers)
        return self.outline

    def tensors(self, dtype: "torch.dtype", device: "torch.device | None" = None) -> "dict[str, Tensor]":
        """The weights by the network's names, in `dtype` on `device`, or else the CPU.

        Raises:
            CheckpointError: the files no longer are what was checked.
        """
        return self._read(lambda path: read_tensors(path, dtype, self._wanted, device))

    def _wanted(self, name: str) -> bool:
        return name.startswith(self.prefix)

    def _read(self, read: "Callable[[Path], dict[str, Tensor]]") -> "dict[str, Tensor]":
        """What `read` finds in the files, by the network's names, if that fits."""
        found: dict[str, Tensor] = {}
        paths = [path for path in self.files if path.suffix != ".json"]
        for path in paths:
            found |= {name: tensor for name, tensor in read(path).items() if self._wanted(name)}
        where = (self.title, f" in {paths[0].parent if len(paths) > 1 else paths[0]}")
        try:
            found = self._converted(found)
        except KeyError as error:  # the conversions of diffusers look some names up
            raise CheckpointError(where, f" lacks the tensor {error}", expected=_WHOLE) from error
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # … and take names apart
            raise CheckpointError(where, f" can't be converted: {said(error)}", expected=_WHOLE) from error
        compare(where, str(self.config_file), self.outline.shapes, found)
        return found

    def _converted(self, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """As `convert` does it; what it does to tensors of these names and shapes is recorded once."""
        if self.convert is folder_names or not tensors:
            return self.convert(self.outline, tensors)
        from storyadapter.checkpoint.recipes import follow, record

        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        key = digest_of(
            *(self.convert.__name__, Path(__file__).read_bytes(), self.kind, dict(self.config)),
            *([name, shape, str(tensors[name].dtype)] for name, shape in shapes.items()),
        )

        def make() -> Any:
            empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
            return record(lambda known: self.convert(self.outline, dict(known)), empty)

        return follow(remembered("conversion", key, make), dict(tensors))


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


def folder_names(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Names in today's spelling.

    transformers 5.6 dropped the prefix "text_model." of `CLIPTextModel`, older files hold `position_ids`, which are no
    weights, and VAEs saved before diffusers 0.17 spell the attention's layers in another way.
    """
    prefixed = any(name.startswith("text_model.") for name in network.shapes)
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
    first = headers.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if first is not None and list(first.shape[1:2]) == [9]:
        raise CheckpointError(f"{path} is an inpainting model with 9 input channels", expected="an SDXL base model")


def _kind(headers: "dict[str, Tensor]") -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if not any(name.startswith((UNET_PREFIX, "cond_stage_model.", "conditioner.")) for name in headers):
        return f"no Stable Diffusion model ({len(headers)} tensors, the first is {next(iter(headers), 'absent')})"
    try:
        kind = infer_diffusers_model_type(headers)
    except Exception:  # it takes shapes apart that any file may have
        kind = "v1"
    return _KINDS.get(kind, kind)


def convert_unet(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return _nothing_lost(tensors, convert_ldm_unet_checkpoint(tensors, config=dict(network.config)))


def convert_unet_file(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Of a UNet alone, in diffusers' layout or the original one without its prefix."""
    if any(name.startswith("down_blocks.") for name in tensors):
        return folder_names(network, tensors)
    return convert_unet(network, {UNET_PREFIX + name: tensor for name, tensor in tensors.items()})


def convert_controlnet(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
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


def convert_vae(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Of a single file's VAE, or of a VAE alone, in the original layout or in diffusers' own."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return folder_names(network, tensors)
    # Training leftovers that some files keep beside the VAE.
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("loss.", "model_ema."))}
    return _nothing_lost(tensors, convert_ldm_vae_checkpoint(tensors, config=dict(network.config)))


def convert_text_encoder(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    return folder_names(network, convert_ldm_clip_checkpoint(tensors))


def convert_text_encoder_2(network: Outline, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = SimpleNamespace(config=SimpleNamespace(**network.config))  # of which it asks for sizes
    converted = convert_open_clip_checkpoint(model, tensors, prefix=TEXT_PREFIX_2)
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
