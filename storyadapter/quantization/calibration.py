"""Calibration by nvidia-modelopt: the largest magnitude of every layer's input while a model draws."""

import io
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from torch import nn

from storyadapter.method.errors import InputError, UnavailableError
from storyadapter.quantization.layers import OPERANDS
from storyadapter.quantization.recipe import Recipe


def calibrate(
    network: nn.Module, recipe: Recipe, draw: Callable[[], Any]
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """The scale of the input of every layer that a recipe names, and the smoothing factors of its linear layers.

    Args:
        network: as the checkpoint gave it; of no other use afterwards, as its layers keep what measures them.
        draw: calls this network with all that it has to expect: a denoiser with every time step, with references and
            without, λ from least to largest, conditional and unconditional rows.

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
    names = list(recipe.layers(network))
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    bits = {"fp8": (4, 3), "int8": 8}[recipe.number_format]
    rules += [{"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": bits, "axis": None}} for name in names]
    algorithm = {"method": "smoothquant", "alpha": recipe.smoothing} if recipe.smoothing else recipe.statistic
    out = sys.stdout

    def loop(_: nn.Module) -> None:
        with redirect_stdout(out):
            draw()

    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # modelopt prints
        warnings.simplefilter("ignore")
        modelopt.quantize(network, {"quant_cfg": rules, "algorithm": algorithm}, loop)
    scales, smoothing = {}, {}
    for name in names:
        quantizer: Any = network.get_submodule(f"{name}.input_quantizer")
        largest = quantizer.amax
        if largest is None:
            raise InputError(f"{name} was never called in calibration", advice="draw with all parts of the model")
        scales[name] = float(largest) / OPERANDS[recipe.number_format].largest
        if (factors := quantizer.pre_quant_scale) is not None:
            smoothing[name] = tuple(factors.flatten().tolist())
    return scales, smoothing
