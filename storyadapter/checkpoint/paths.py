"""What the user typed: which files and folders make up the model."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from storyadapter.method.errors import Field, InputError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA and how much of it is fused into the model.

    `path` is a file, or a folder or hub name with a `pytorch_lora_weights.safetensors` in it.
    """

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoraSpec":
        """Read "P" or "P:scale". What follows the last colon is the scale if it is a number, else part of the path.

        A path that itself ends in a colon and a number needs its scale spelled out: "a:1:1.0". `str()` gives such a
        text back.

        Raises:
            InputError: the path is empty, or the scale is too large for a number.
        """
        path, colon, number = text.rpartition(":")
        if not colon or not _NUMBER.fullmatch(number):
            path, number = text, "1"
        if not path:
            expected = "PATH or PATH:SCALE, such as style.safetensors:0.8"
            raise InputError(Field("lora"), f" {text!r} has no path", expected=expected)
        scale = float(number)
        if not math.isfinite(scale):
            found = f" {text!r}: the scale {number} is too large"
            raise InputError(Field("lora"), found, expected="a number such as 0.8")
        return cls(Path(path), scale)

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"


@dataclass(frozen=True)
class CheckpointPaths:
    """The model files of a run, as typed. A name that is no path is looked up in the local Hugging Face cache.

    Attributes:
        base_model: a diffusers SDXL folder, or a single `.safetensors` file in the original layout.
        image_encoder: a folder with a CLIP vision model with projection (transformers).
        ip_adapter: the plain 4-token IP-Adapter for SDXL, `.bin` or `.safetensors`.
        base_config: for a single file: a diffusers folder with its configuration files and tokenizers.
        vae: another VAE: a diffusers folder, or a `.safetensors` file.
        loras: fused into the UNet and the text encoders, in this order.
        variant: take `*.<variant>.safetensors` and the like where a network has both; without it, the plain files.
    """

    base_model: Path | str
    image_encoder: Path | str
    ip_adapter: Path | str
    base_config: Path | str | None = None
    vae: Path | str | None = None
    loras: tuple[LoraSpec, ...] = ()
    variant: str | None = None
