"""Scales of a network's activations as data: `recipe.json` and `scales.safetensors` in a folder of their own."""

import hashlib
import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from storyadapter.method.errors import InputError
from storyadapter.quantization.layers import QuantizedLayer
from storyadapter.quantization.recipe import Recipe

RECIPE_NAME: Final = "recipe.json"
SCALES_NAME: Final = "scales.safetensors"
_SMOOTHING: Final = ".smoothing"  # behind a layer's name
_KEY_DIGITS: Final = 32
_AGAIN: Final = "calibrate this model again"


@dataclass(frozen=True)
class CalibrationStory:
    """A story of the user's by which scales were found: `digest` of all that decided what was drawn of it, `title` for
    people, and where its file lay, "" for one that had none."""

    digest: str
    title: str
    path: str = ""


@dataclass(frozen=True)
class Scales:
    """What calibration found for one network of one model.

    Attributes:
        recipe: how the network is quantized.
        model: the key of its weights, LoRAs included.
        inputs: the scale of the input of every layer that the recipe names.
        smoothing: of each of its linear layers, if it smooths: what the input's channels are multiplied by, [K].
        story: by which they were found; None for the built-in ones.

    Raises:
        InputError: a scale or factor that isn't a finite number over 0; names the layer.
    """

    recipe: Recipe
    model: str
    inputs: Mapping[str, float]
    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    story: CalibrationStory | None = None

    def __post_init__(self) -> None:
        scales = (("scale", name, scale) for name, scale in self.inputs.items())
        factors = (("smoothing factor", name, factor) for name, own in self.smoothing.items() for factor in own)
        for what, name, value in (*scales, *factors):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"the {what} of {name} is {value:g}", expected="a finite number over 0")

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits; equal for equal recipes, models and scales."""
        smoothing = {name: array("d", own).tobytes().hex() for name, own in self.smoothing.items()}
        scales = {name: scale.hex() for name, scale in self.inputs.items()}
        data = [self.recipe.as_dict(), self.model, scales, smoothing]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]

    def save(self, folder: Path) -> None:
        """Write both files into an existing folder. Raises OSError: it can't be written."""
        described = {"model": self.model, "key": self.key, **self.recipe.as_dict()}
        described |= {"story": asdict(self.story)} if self.story else {}
        (folder / RECIPE_NAME).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        lists: dict[str, Sequence[float]] = {name: (scale,) for name, scale in self.inputs.items()}
        lists |= {name + _SMOOTHING: factors for name, factors in self.smoothing.items()}
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in sorted(lists.items())}
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
            story = CalibrationStory(**described.pop("story")) if "story" in described else None
            recipe = Recipe.from_dict(described)
            tensors = load_file(folder / SCALES_NAME)
            factors = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_SMOOTHING)}
            inputs = {name: float(value.item()) for name, value in tensors.items()}
            smoothing = {
                name.removesuffix(_SMOOTHING): tuple(own.double().flatten().tolist()) for name, own in factors.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"the scales in {folder} can't be read: {' '.join(str(error).split())}") from error
        if theirs != model:
            raise InputError(f"the scales in {folder} are of model {str(theirs)[:8]}", expected=f"model {model[:8]}")
        scales = cls(recipe, model, inputs, smoothing, story)
        if scales.key != key:
            raise InputError(f"the scales in {folder} are damaged", advice="build again")
        return scales

    def apply(self, network: nn.Module) -> None:
        """Put `QuantizedLayer`s in place of a network's layers, one by one: memory for one at a time is enough.

        Raises:
            InputError: a layer without a scale, or a scale without a layer, or not as many smoothing factors as a layer
                has input channels; names the first.
        """
        layers = self.recipe.layers(network)
        for name, layer in layers.items():
            if name not in self.inputs:
                raise InputError(f"layer {name} has no scale", advice=_AGAIN)
            width = layer.in_features if self.recipe.smoothing and isinstance(layer, nn.Linear) else 0
            if (factors := len(self.smoothing.get(name, ()))) != width:
                raise InputError(f"layer {name} has {factors} smoothing factors", expected=str(width), advice=_AGAIN)
        for name in (*self.inputs, *self.smoothing):
            if name not in layers:
                raise InputError(f"there is a scale of {name}, but no layer", advice=_AGAIN)
        del layers
        for name in self.inputs:
            parent, _, child = name.rpartition(".")
            holder = network.get_submodule(parent)
            smoothing = self.smoothing.get(name, ())
            made = QuantizedLayer(getattr(holder, child), self.recipe.number_format, self.inputs[name], smoothing)
            setattr(holder, child, made)
