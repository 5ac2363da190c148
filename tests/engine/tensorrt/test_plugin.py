"""What the plugin declares: the kernel's arguments, grid and block, in TensorRT's symbols.

TensorRT's plugin layer itself can't be installed here; the module that talks to it is checked for the rules that its
registration has.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton")

from storyadapter.engine.tensorrt import plugin_launch  # noqa: E402
from storyadapter.engine.tensorrt.plugin_launch import PluginError, plan_launch  # noqa: E402


@dataclass(frozen=True)
class Symbol:
    """A number that, like TensorRT's, takes other operands on its right only."""

    value: int

    def _with(self, other: "Symbol | int") -> int:
        return other.value if isinstance(other, Symbol) else other

    def __add__(self, other: "Symbol | int") -> "Symbol":
        return Symbol(self.value + self._with(other))

    def __mul__(self, other: "Symbol | int") -> "Symbol":
        return Symbol(self.value * self._with(other))

    def __floordiv__(self, other: "Symbol | int") -> "Symbol":
        return Symbol(self.value // self._with(other))


def plain(value: Symbol | int) -> int:
    return value.value if isinstance(value, Symbol) else value


@pytest.mark.parametrize(("dtype", "heads"), [("HALF", 10), ("BF16", 20)])
@pytest.mark.parametrize("sizes", [(2, 1024, 64), (16, 4096, 400), (1, 1, 1), (3, 77, 13)])
@pytest.mark.parametrize("text", [77, Symbol(77), Symbol(231)], ids=str)
def test_the_launch_in_symbols_is_the_kernels(
    dtype: str, sizes: tuple[int, int, int], heads: int, text: int | Symbol
) -> None:
    rows, queries, references = sizes
    fixed = {"H": heads, "D": 64, "T": text}
    letters = {"B": Symbol(rows), "S": Symbol(queries), "R": Symbol(references), **fixed}
    launch = plan_launch(90, dtype, letters)
    kernel = launch.kernel
    assert tuple(map(plain, launch.grid)) == kernel.grid(rows, queries)
    expected = kernel.integers(queries, references, plain(text))
    assert [plain(value) for value in launch.integers] == list(expected.values())
    assert list(expected) == [argument.name for argument in kernel.arguments if argument.kind == "integer"]
    assert launch.block == kernel.block
    assert launch.shared_bytes == kernel.shared_bytes <= 48 * 1024
    assert kernel.arguments[0].type == {"HALF": "*fp16", "BF16": "*bf16"}[dtype]
    kinds = [argument.kind for argument in kernel.arguments]
    assert kinds == ["input"] * 6 + ["integer"] * len(expected) + ["output"]
    assert f".entry {kernel.entry}(" in kernel.ptx


def test_other_types_and_unknown_widths_are_refused() -> None:
    letters = {"B": 1, "S": 1, "R": 1, "H": 10, "D": 64, "T": 77}
    with pytest.raises(PluginError, match="^q is FLOAT; expected HALF or BF16$"):
        plan_launch(90, "FLOAT", letters)
    with pytest.raises(PluginError, match="^D is not known when the engine is built; expected a number$"):
        plan_launch(90, "HALF", letters | {"D": Symbol(64)})
    with pytest.raises(ValueError, match="capability is 70"):
        plan_launch(70, "HALF", letters)


def test_the_plugins_functions_keep_the_rules_of_registration() -> None:
    """TensorRT compares names and annotations: the six inputs, then outputs, then tactic; no annotation is a string."""
    tree = ast.parse((Path(plugin_launch.__file__).parent / "plugin.py").read_text())
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    letters = {"B": 1, "S": 1, "R": 1, "H": 10, "D": 64, "T": 77}
    inputs = [a.name for a in plan_launch(90, "HALF", letters).kernel.arguments if a.kind == "input"]
    for name, more in (("describe", []), ("offer", ["outputs"]), ("embed", ["outputs", "tactic"])):
        arguments = functions[name].args
        assert [argument.arg for argument in arguments.args] == inputs + more
        assert all(argument.annotation is not None for argument in arguments.args)
        assert not arguments.defaults and functions[name].returns is not None
    returned = functions["embed"].returns
    assert returned is not None
    assert ast.unparse(returned) == "tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]"
