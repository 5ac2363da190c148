"""Calibration by nvidia-modelopt: the largest magnitude of every layer's input while a model draws."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from storyadapter.method.errors import InputError, UnavailableError
from storyadapter.quantization.layers import LARGEST
from storyadapter.quantization.recipe import Recipe


def calibrate(denoiser: nn.Module, recipe: Recipe, draw: Callable[[], Any]) -> dict[str, float]:
    """The scale of the input of every layer that a recipe names.

    Args:
        denoiser: as the checkpoint gave it; of no other use afterwards, as its layers keep what measures them.
        draw: calls this denoiser with all that it has to expect: every time step, with references and without, λ from
            least to largest, conditional and unconditional rows.

    Raises:
        UnavailableError: nvidia-modelopt isn't installed.
        InputError: a layer that `draw` never called, or whose inputs aren't finite, or all zero.
    """
    try:
        import modelopt.torch.quantization as modelopt
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{error.name} is not installed",
            expected="nvidia-modelopt, which calibrates",
            advice="type: pip install 'storyadapter-trt[quantize]'",
        ) from error
    names = list(recipe.layers(denoiser))
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    rules += [
        {"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}} for name in names
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelopt.quantize(denoiser, {"quant_cfg": rules, "algorithm": recipe.statistic}, lambda _: draw())
    scales = {}
    for name in names:
        quantizer: Any = denoiser.get_submodule(f"{name}.input_quantizer")
        largest = quantizer.amax
        if largest is None:
            raise InputError(f"{name} was never called in calibration", advice="draw with all parts of the model")
        scales[name] = float(largest) / LARGEST
    return scales
