"""The tiny VAE that decodes pictures which only become references: its files, and that it fits the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from storyadapter.checkpoint.component import Component, folder_names
from storyadapter.checkpoint.outline import defaults_of
from storyadapter.checkpoint.parts import check_folder
from storyadapter.checkpoint.paths import DIFFUSERS_STEMS, find, read_config, weight_files
from storyadapter.checkpoint.tensor_files import read_headers
from storyadapter.method.errors import CheckpointError, Field
from storyadapter.model.contract import Geometry

_KIND: Final = "AutoencoderTiny"
_EXPECTED: Final = "a tiny VAE for SDXL (AutoencoderTiny), such as madebyollin/taesdxl"
_OWN: Final = "decoder.layers."  # how the names of its tensors begin


def reference_vae_part(typed: Path | str, variant: str | None, geometry: Geometry) -> Component:
    """A tiny VAE's files, its kind checked. Nothing in them tells one for Stable Diffusion 1.5 from one for SDXL.

    Args:
        typed: a diffusers folder, a file in diffusers' layout of the published sizes, or a hub name.
        variant: of weights, see `CheckpointPaths`.
        geometry: of the model whose latents it shall decode.

    Raises:
        CheckpointError: it is another VAE, or for other latents, or files are missing.
    """
    path = find("reference_vae", typed)
    config_file, files, config = path, (path,), dict[str, Any]()
    if path.is_dir():
        check_folder("reference_vae", path, lambda config: config.get("_class_name") == _KIND)
        config_file, files = path / "config.json", weight_files(path, DIFFUSERS_STEMS, variant)
        config = read_config(config_file)
        if config.get("_class_name") != _KIND:
            raise CheckpointError(f"{config_file}: configuration of {config.get('_class_name')}", expected=_EXPECTED)
    else:
        names = list(read_headers(path))
        if not any(name.startswith(_OWN) for name in names):
            found = f"{path} is no AutoencoderTiny of diffusers: its tensors begin with {(names or ['none'])[0]}"
            raise CheckpointError(found, expected=_EXPECTED)
    _check(config_file, defaults_of(_KIND) | config, geometry)
    title = ("the VAE given with ", Field("reference_vae"))
    return Component(title, config_file, _KIND, config, files, folder_names)


def _check(path: Path, config: Mapping[str, Any], geometry: Geometry) -> None:
    """Raises CheckpointError unless it decodes the model's latents, and does nothing that isn't computed here."""
    for name, expected in (("latent_channels", geometry.latent_channels), ("out_channels", 3), ("shift_factor", 0)):
        if config[name] != expected:
            raise CheckpointError(f"{path}: {name} is {config[name]}", expected=f"{expected}, as for SDXL")
    factor, blocks = config["upsampling_scaling_factor"], config["num_decoder_blocks"]
    if (larger := factor ** (len(blocks) - 1)) != geometry.pixels_per_latent:
        found = f"{path}: pictures become {larger} times as large as latents (num_decoder_blocks)"
        raise CheckpointError(found, expected=str(geometry.pixels_per_latent))
