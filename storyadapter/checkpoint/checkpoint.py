"""A checkpoint: everything the user's model files hold, checked when opened and loaded network by network."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storyadapter.checkpoint.agreement import check_preprocessing, check_scaling, check_text_end
from storyadapter.checkpoint.component import Component
from storyadapter.checkpoint.controlnets import control_geometry, controlnet_part
from storyadapter.checkpoint.ip_adapter import (
    CrossAttention,
    IPAdapterWeights,
    check_ip_adapter,
    cross_attentions,
    load_ip_adapter,
)
from storyadapter.checkpoint.loras import Lora, fuse_lora, lora_file, open_lora
from storyadapter.checkpoint.outline import Outline, empty_network
from storyadapter.checkpoint.parts import base_parts, check_widths, image_encoder_part
from storyadapter.checkpoint.paths import CheckpointPaths, LoraSpec, below, find, give
from storyadapter.checkpoint.reference_vae import reference_vae_part
from storyadapter.checkpoint.sampling import read_sampling
from storyadapter.checkpoint.tokenizer_files import check_tokenizer, tokenizer_files
from storyadapter.method.errors import CheckpointError, Field, Text
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.model.contract import Geometry, LayerWidth, controlnet_name
from storyadapter.model.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}


@dataclass(frozen=True)
class Checkpoint:
    """An SDXL base model with image encoder, IP-Adapter, VAE and LoRAs, whose files were found to fit each other.

    Made by `Checkpoint.open`. No weights are kept: `load` and the like read the files anew.

    Attributes:
        paths: as typed.
        geometry: the sizes of the model.
        loras: the LoRA files that were found, with their scales, which `load` fuses.
        configuration: of every network, the settings that its code depends on, as plain data.
        sampling: what the files say of how the model is sampled.
        notices: what was assumed where files say nothing, and where they contradict each other; one line each.
        rewrites: by network, what rewrites it in place when it is loaded; others are left as the files have them.
    """

    paths: CheckpointPaths
    geometry: Geometry
    loras: tuple[LoraSpec, ...]
    configuration: Mapping[str, Mapping[str, Any]]
    sampling: ModelSampling
    notices: tuple[Text, ...]
    _components: Mapping[str, Component]
    _adapter: Path
    _cross_attentions: tuple[CrossAttention, ...]
    _config_folder: Path
    _opened_loras: tuple[Lora, ...]
    _tokenizers: tuple[TextTokenizer, ...]
    rewrites: "Mapping[str, Callable[[nn.Module], None]]" = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        paths: CheckpointPaths | None = None,
        *,
        base_model: Path | str | None = None,
        image_encoder: Path | str | None = None,
        ip_adapter: Path | str | None = None,
        base_config: Path | str | None = None,
        unet: Path | str | None = None,
        vae: Path | str | None = None,
        loras: tuple[LoraSpec, ...] = (),
        controlnets: tuple[Path | str, ...] = (),
        reference_vae: Path | str | None = None,
        variant: str | None = None,
    ) -> "Checkpoint":
        """Find all files and check that they are whole and fit, from configurations and headers; no weights are read.

        Args:
            paths: what to open; or give the fields of `CheckpointPaths` as keywords, or nothing for the demo model.

        Raises:
            InputError: only some of a model's three parts are named.
            CheckpointError: a file is missing or corrupt, the model isn't an SDXL base model, the adapter is of another
                kind, tensors are missing or unexpected, or shapes don't fit. One line says what was found and expected.
        """
        paths = paths or CheckpointPaths.given(
            base_model,
            image_encoder,
            ip_adapter,
            base_config=base_config,
            unet=unet,
            vae=vae,
            loras=loras,
            controlnets=controlnets,
            reference_vae=reference_vae,
            variant=variant,
        )
        components, config_folder = base_parts(paths)
        components["image_encoder"] = image_encoder_part(paths)
        adapter = find("ip_adapter", paths.ip_adapter)
        if adapter.is_dir():
            files = below(adapter, lambda path: path.suffix in (".safetensors", ".bin") and "ip-adapter" in path.name)
            found, expected = f" {adapter} is a folder", "a .safetensors or .bin file"
            raise CheckpointError(Field("ip_adapter"), found, expected=expected, advice=give(files))
        loras = tuple(LoraSpec(lora_file(find("lora", spec.path)), spec.scale) for spec in paths.loras)
        outlines = {name: component.check() for name, component in components.items()}
        notices = check_scaling(paths, config_folder, components["vae"].config_file, outlines["vae"])
        tokenizers: list[TextTokenizer] = []
        for part, encoder in _TOKENIZERS.items():
            config = outlines[encoder].config
            tokenizers.append(check_tokenizer(config_folder / part, config["vocab_size"]))
            notices += check_text_end(config_folder / part, tokenizers[-1], components[encoder].config_file, config)
        layers = cross_attentions(outlines["unet"])
        geometry = _geometry(components["unet"].config_file, outlines, layers)
        for index, typed in enumerate(paths.controlnets):
            name, scale = controlnet_name(index), geometry.pixels_per_latent
            components[name] = controlnet_part(typed, paths.variant, outlines["unet"], scale)
            outlines[name] = components[name].check()
            widths = _layer_widths(components[name].config_file, cross_attentions(outlines[name]))
            control = control_geometry(outlines[name], widths)
            geometry = replace(geometry, controls=(*geometry.controls, control))
        if paths.reference_vae is not None:
            components["reference_vae"] = reference_vae_part(paths.reference_vae, paths.variant, geometry)
            outlines["reference_vae"] = components["reference_vae"].check()
            geometry = replace(geometry, reference_vae=True)
        image_encoder = components["image_encoder"].config_file.parent
        notices += check_preprocessing(image_encoder)
        text_width = geometry.text_width + geometry.text_width_2
        check_ip_adapter(adapter, layers, text_width, geometry.image_embedding_width, image_encoder)
        opened = tuple(open_lora(lora.path, outlines) for lora in loras)
        configuration = {name: outline.config for name, outline in outlines.items()}
        unet_path = find("base_model" if paths.unet is None else "unet", paths.unet or paths.base_model)
        sampling, told = read_sampling(config_folder, None if unet_path.is_dir() else unet_path, loras)
        sampling = replace(sampling, embeds_guidance=geometry.guidance_embedding > 0)
        return cls(
            paths,
            geometry,
            loras,
            configuration,
            sampling,
            (*told, *notices),
            components,
            adapter,
            layers,
            config_folder,
            opened,
            tuple(tokenizers),
        )

    @property
    def files_by_component(self) -> dict[str, tuple[Path, ...]]:
        """Every file that what is loaded depends on, except LoRAs, by the part of the model that reads it.

        A single file is in several parts. LoRAs and their scales are in `loras`; what lies beside them is here.
        """
        files = {name: tuple(dict.fromkeys((part.config_file, *part.files))) for name, part in self._components.items()}
        files |= {part: tokenizer_files(self._config_folder / part) for part in _TOKENIZERS}
        beside = tuple(lora.settings for lora in self._opened_loras if lora.settings)
        return {**files, "ip_adapter": (self._adapter,), **({"lora": beside} if beside else {})}

    def weight_files(self, part: str) -> list[tuple[Path, str]]:
        """The files with the weights of a part as in `files_by_component`, each with how the names of its tensors in it
        begin."""
        component = self._components.get(part)
        if component is None:
            return [(self._adapter, "")]
        return [(path, component.prefix) for path in component.files if path.suffix != ".json"]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its paths: another process opens the same files."""
        return _reopened, (self.paths, self.rewrites)

    def rewritten(self, rewrites: "Mapping[str, Callable[[nn.Module], None]]") -> "Checkpoint":
        """The same files, of which these networks, and no others, are rewritten when they are loaded; can be pickled
        if `rewrites` can."""
        return replace(self, rewrites=rewrites)

    @property
    def label(self) -> str:
        """The base model, its LoRAs, ControlNets and reference VAE in few words, for people."""
        base = "the demo model" if self.paths.is_demo else Path(self.paths.base_model).name
        unet = () if self.paths.unet is None else (f"UNet {Path(self.paths.unet).name}",)
        loras = (f"{lora.path.stem}:{lora.scale:g}" for lora in self.loras)
        controlnets = (f"ControlNet {Path(typed).name}" for typed in self.paths.controlnets)
        tiny = () if self.paths.reference_vae is None else (f"reference VAE {Path(self.paths.reference_vae).name}",)
        return " + ".join((base, *unet, *loras, *controlnets, *tiny))

    def load(self, part: str, dtype: "torch.dtype", device: "torch.device | None" = None) -> Any:
        """A network in `dtype` on `device`, or else the CPU, LoRAs fused, in evaluation mode, without gradients.

        Args:
            part: "unet", "text_encoder", "text_encoder_2", whose projection gives the pooled text, "image_encoder",
                "vae", "reference_vae", or a ControlNet's `controlnet_name`.

        Raises:
            CheckpointError: a file changed since the checkpoint was opened.
        """
        network = self.empty_network(part)
        network.load_state_dict(self.load_tensors(part, dtype, device), assign=True)
        return network.to(device).requires_grad_(False)  # only buffers are left to be moved

    def load_tensors(
        self, name: str, dtype: "torch.dtype", device: "torch.device | None" = None
    ) -> "dict[str, Tensor]":
        """The weights of the network that `load` gives, by the network's names, LoRAs fused; no modules."""
        tensors = self._components[name].tensors(dtype, device)
        for spec, lora in zip(self.loras, self._opened_loras, strict=True):
            if lora.changes.get(name):
                fuse_lora(name, tensors, lora, spec.scale)
        return tensors

    def shapes(self, name: str) -> Mapping[str, list[int]]:
        """Of what `load_tensors` gives."""
        return self._components[name].outline.shapes

    def empty_network(self, name: str) -> "nn.Module":
        """The network that `load` gives, its weights on the meta device in fp32."""
        component = self._components[name]
        return empty_network(component.kind, component.config)

    def load_ip_adapter(self, dtype: "torch.dtype", device: "torch.device | None" = None) -> IPAdapterWeights:
        """The IP-Adapter's tensors."""
        return load_ip_adapter(self._adapter, self._cross_attentions, dtype, device)

    def load_tokenizers(self) -> tuple[TextTokenizer, TextTokenizer]:
        """The tokenizers of text encoder 1 and 2, as they were when the checkpoint was opened."""
        first, second = self._tokenizers
        return first, second


def _reopened(paths: CheckpointPaths, rewrites: "Mapping[str, Callable[[nn.Module], None]]") -> Checkpoint:
    return replace(Checkpoint.open(paths), rewrites=rewrites)


def _geometry(unet_config: Path, outlines: Mapping[str, Outline], layers: tuple[CrossAttention, ...]) -> Geometry:
    """Raises CheckpointError unless the networks fit each other."""
    unet, text, text_2, image, vae = (
        outlines[name].config for name in ("unet", "text_encoder", "text_encoder_2", "image_encoder", "vae")
    )
    check_widths(unet_config, unet, text["hidden_size"], text_2["hidden_size"], text_2["projection_dim"])
    return Geometry(
        widths=_layer_widths(unet_config, layers),
        time_embedding=outlines["unet"].shapes["time_embedding.linear_2.weight"][0],
        text_width=text["hidden_size"],
        text_width_2=text_2["hidden_size"],
        pooled_width=text_2["projection_dim"],
        image_embedding_width=image["projection_dim"],
        sample_size=unet["sample_size"],
        latent_channels=vae["latent_channels"],
        pixels_per_latent=2 ** (len(vae["block_out_channels"]) - 1),
        vae_in_fp32=bool(vae["force_upcast"]),
        guidance_embedding=unet["time_cond_proj_dim"] or 0,
    )


def _layer_widths(config: Path, layers: tuple[CrossAttention, ...]) -> tuple[LayerWidth, ...]:
    """Raises CheckpointError unless layers of one width are alike."""
    counts = Counter((layer.channels, layer.heads) for layer in layers)
    widths = tuple(LayerWidth(channels, count, heads) for (channels, heads), count in sorted(counts.items()))
    if len({width.channels for width in widths}) < len(widths):
        raise CheckpointError(f"{config}: layers of one width have different head counts", expected="one, as in SDXL")
    return widths
