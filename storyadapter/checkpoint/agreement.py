"""Whether the parts of a model say the same of what shapes can't tell; what no file says is told as assumed."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from storyadapter.checkpoint.outline import Outline
from storyadapter.checkpoint.paths import CheckpointPaths, find, read_config
from storyadapter.method.constants import CLIP_MEAN, CLIP_PIXELS, CLIP_STD
from storyadapter.method.errors import CheckpointError, Field, Text
from storyadapter.model.tokenizer import TextTokenizer

SDXL_SCALING: Final = 0.13025  # of the latents of SDXL's VAE
# whose latents other factors of diffusers' VAEs are
_KNOWN_SCALINGS: Final = {0.18215: "Stable Diffusion 1.x and 2.x", 1.0: "an unscaled VAE"}
_LEGACY_END: Final = 2  # `eos_token_id` of old configurations: there transformers looks for the largest token instead


def check_scaling(paths: CheckpointPaths, folder: Path, config_file: Path, vae: Outline) -> list[Text]:
    """Compare the VAE's scaling factor with that of the base model's VAE, on whose latents the UNet was trained.

    Args:
        folder: with the base model's configurations.
        config_file: where the VAE's configuration was read.
        vae: what the network consists of.

    Returns:
        What is to be told, one line each.

    Raises:
        CheckpointError: it is no positive number, or a VAE of other latents was given.
    """
    factor, said = vae.config["scaling_factor"], "scaling_factor" in read_config(config_file)
    own_file = folder / "vae" / "config.json"
    own = read_config(own_file).get("scaling_factor") if own_file.exists() else None
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise CheckpointError(f"{config_file}: scaling_factor is {factor!r}", expected="a number above 0")
    expected = own if isinstance(own, int | float) else SDXL_SCALING
    where = str(own_file) if own is not None else "SDXL's VAE"
    if paths.vae is None:
        if not said:
            return [f"{config_file} says no scaling_factor: {factor:g} is assumed, as by diffusers"]
        if not math.isclose(factor, SDXL_SCALING):
            return [f"{config_file}: scaling_factor is {factor:g}, SDXL's is {SDXL_SCALING:g}; drawn as it says"]
        return []
    given = find("vae", paths.vae)
    if given.is_file():
        return [f"{given} doesn't say its scaling factor: {factor:g} is assumed, as {where} has"]
    if not said:
        return [f"{config_file} says no scaling_factor: {factor:g} is assumed, as by diffusers"]
    if not math.isclose(factor, expected):
        kind = next((f" ({name})" for known, name in _KNOWN_SCALINGS.items() if math.isclose(known, factor)), "")
        raise CheckpointError(
            ("the VAE given with ", Field("vae"), f": scaling_factor is {factor:g}{kind} in {config_file}"),
            expected=f"{expected:g} as in {where}: a VAE of the latents that the UNet was trained on",
        )
    return []


def check_text_end(folder: Path, tokenizer: TextTokenizer, config_file: Path, config: Mapping[str, Any]) -> list[Text]:
    """Compare a tokenizer with the configuration of its text encoder.

    Returns:
        What is to be told, one line each.

    Raises:
        CheckpointError: the encoder looks for the end of a text at another token than the tokenizer puts there.
    """
    end, found = config["eos_token_id"], tokenizer.end
    if isinstance(end, int) and end not in (_LEGACY_END, found):
        raise CheckpointError(
            f"{folder} ends a text with token {found}, {config_file} says eos_token_id {end}",
            expected="the tokenizer that belongs to the model",
        )
    if (tokens := tokenizer.size) < config["vocab_size"]:
        known = config["vocab_size"]
        return [f"{folder} has {tokens} tokens, its text encoder knows {known}: words may be read as others"]
    return []


def check_preprocessing(folder: Path) -> list[Text]:
    """What a `preprocessor_config.json` beside the image encoder says otherwise than the method does, in one line.

    Raises:
        CheckpointError: it can't be read.
    """
    path = folder / "preprocessor_config.json"
    config = read_config(path) if path.exists() else {}
    wanted = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "crop_size": CLIP_PIXELS, "size": CLIP_PIXELS}
    others = [name for name, value in wanted.items() if not _agrees(config.get(name, value), value)]
    if not others:
        return []
    return [f"{path}: {others[0]} isn't CLIP's own, which the method uses in any case"]


def _agrees(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == 3
            and all(
                isinstance(one, int | float) and math.isclose(one, other, abs_tol=1e-6)
                for one, other in zip(found, wanted, strict=True)
            )
        )
    sizes = found.values() if isinstance(found, dict) else [found]
    return all(size == wanted for size in sizes)
