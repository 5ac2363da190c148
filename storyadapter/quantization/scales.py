"""Scales of a model's activations as data: `recipe.json` and `scales.safetensors` in a folder of their own."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from storyadapter.method.errors import InputError
from storyadapter.quantization.layers import Fp8Layer
from storyadapter.quantization.recipe import Recipe

RECIPE_NAME: Final = "recipe.json"
SCALES_NAME: Final = "scales.safetensors"
_KEY_DIGITS: Final = 32


@dataclass(frozen=True)
class Scales:
    """What calibration found for one model.

    Attributes:
        recipe: how the model is quantized.
        model: the key of its weights, LoRAs included.
        inputs: the scale of the input of every layer that the recipe names.

    Raises:
        InputError: a scale that isn't a finite number over 0; names the layer.
    """

    recipe: Recipe
    model: str
    inputs: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, scale in self.inputs.items():
            if not (math.isfinite(scale) and scale > 0):
                raise InputError(f"the scale of {name} is {scale:g}", expected="a finite number over 0")

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits; equal for equal recipes, models and scales."""
        data = [self.recipe.as_dict(), self.model, {name: scale.hex() for name, scale in self.inputs.items()}]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]

    def save(self, folder: Path) -> None:
        """Write both files into an existing folder. Raises OSError: it can't be written."""
        described = {"model": self.model, "key": self.key, **self.recipe.as_dict()}
        (folder / RECIPE_NAME).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        tensors = {name: torch.tensor([scale], dtype=torch.float64) for name, scale in sorted(self.inputs.items())}
        save_file(tensors, folder / SCALES_NAME)

    @classmethod
    def load(cls, folder: Path, model: str) -> "Scales":
        """The scales of a model.

        Raises:
            InputError: they are another model's, a scale can't be used, or a file can't be read or was changed.
        """
        try:
            described = json.loads((folder / RECIPE_NAME).read_text(encoding="utf-8"))
            theirs, key = described.pop("model"), described.pop("key")
            recipe = Recipe.from_dict(described)
            tensors = load_file(folder / SCALES_NAME)
            inputs = {name: float(value.item()) for name, value in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"the scales in {folder} can't be read: {' '.join(str(error).split())}") from error
        if theirs != model:
            raise InputError(f"the scales in {folder} are of model {str(theirs)[:8]}", expected=f"model {model[:8]}")
        scales = cls(recipe, model, inputs)
        if scales.key != key:
            raise InputError(f"the scales in {folder} are damaged", advice="build again")
        return scales

    def apply(self, denoiser: nn.Module) -> None:
        """Put `Fp8Layer`s in place of a denoiser's layers, one after the other: memory for one at a time is enough.

        Raises:
            InputError: a layer without a scale, or a scale without a layer; names the first.
        """
        layers = self.recipe.layers(denoiser)
        for names, missing in (
            (layers, "layer {} has no scale"),
            (self.inputs, "there is a scale of {}, but no layer"),
        ):
            for name in names:
                if name not in (self.inputs if names is layers else layers):
                    raise InputError(missing.format(name), advice="calibrate this model again")
        del layers
        for name in self.inputs:
            parent, _, child = name.rpartition(".")
            holder = denoiser.get_submodule(parent)
            layer = getattr(holder, child)
            setattr(holder, child, Fp8Layer(layer, self.inputs[name]))
