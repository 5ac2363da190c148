"""How the embedded kernel is launched from inside an engine: its expressions over the shapes, in TensorRT's symbols.

Knows no TensorRT: whatever offers `+`, `*` and `//` with integers on the right serves as a symbol.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storyadapter.kernels.grca.aot import EmbeddedKernel, compile_kernel

ELEMENT_TYPES = {"HALF": "fp16", "BF16": "bf16"}  # TensorRT's name → the kernel's


class PluginError(RuntimeError):
    """The kernel can't be embedded for these types or shapes."""


@dataclass(frozen=True)
class Launch:
    """One launch: `grid` and `integers` as symbols or numbers, `integers` in the order of the kernel's arguments."""

    kernel: EmbeddedKernel
    grid: tuple[Any, Any, Any]
    block: tuple[int, int, int]
    shared_bytes: int
    integers: tuple[Any, ...]


def plan_launch(capability: int, dtype: str, letters: Mapping[str, Any]) -> Launch:
    """Compile the kernel for one layer, and say how it is launched.

    Args:
        capability: of the GPU, 10·major + minor.
        dtype: of q, as TensorRT names it.
        letters: B, S, R, symbols or numbers; H, D, T, numbers.

    Raises:
        PluginError: a dtype that isn't half precision, or a layer whose H, D or T isn't known when the engine is built.
        ValueError, AheadOfTimeError: there is no such kernel.
    """
    if dtype not in ELEMENT_TYPES:
        raise PluginError(f"q is {dtype}; expected {' or '.join(ELEMENT_TYPES)}")
    for name in ("H", "D", "T"):
        if not isinstance(letters[name], int):
            raise PluginError(f"{name} is not known when the engine is built; expected a number")
    kernel = compile_kernel(capability, letters["H"], letters["D"], ELEMENT_TYPES[dtype], letters["T"])
    return Launch(
        kernel=kernel,
        grid=tuple(substitute(expression, letters) for expression in kernel.grid),
        block=kernel.block,
        shared_bytes=kernel.shared_bytes,
        integers=tuple(
            substitute(argument.expression or "", letters)
            for argument in kernel.arguments
            if argument.kind == "integer"
        ),
    )


def substitute(expression: str, letters: Mapping[str, Any]) -> Any:
    """The value of an integer expression of +, * and // where the letters are symbols or numbers.

    TensorRT's symbols take a number on their right only, so `2 * R` is computed as `R * 2`.

    Raises:
        PluginError: another operation or letter.
    """
    return _value(ast.parse(expression, mode="eval").body, expression, letters)


def _value(node: ast.expr, expression: str, letters: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name) if name in letters:
            return letters[name]
        case ast.BinOp(left=first, op=operation, right=second):
            left, right = _value(first, expression, letters), _value(second, expression, letters)
            turned = isinstance(left, int) and not isinstance(right, int)
            match operation:
                case ast.Add():
                    return right + left if turned else left + right
                case ast.Mult():
                    return right * left if turned else left * right
                case ast.FloorDiv() if not turned:
                    return left // right
    raise PluginError(f"{expression!r} is no sum, product or floor division of {', '.join(letters)} and numbers")
