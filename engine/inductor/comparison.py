"""A compiled network compared with eager, with the weights that it is used with."""

from collections.abc import Mapping, Sequence
from typing import Final

from storyadapter.export.examples import Example
from storyadapter.export.verify import ExportError, relative_error
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.networks import Network
from storyadapter.model.numerics import Precision

# ‖compiled − eager‖ / ‖eager‖. Sums are taken in another order, and on a GPU fp32 convolutions use TF32 in both.
_TOLERANCE: Final[Mapping[Precision, float]] = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 6e-2}


def compare(network: Network, examples: Sequence[Example], precision: Precision) -> float:
    """The largest relative error of any output on what eager gave.

    Raises:
        EngineBuildError: it is above the precision's tolerance, or not finite.
    """
    worst = 0.0
    for example in examples:
        got = network(example.inputs)
        for name, expected in example.outputs.items():
            where = f"{network.spec.name}: output {name}"
            try:
                error = relative_error(where, got[name], expected, precision, _TOLERANCE[precision])
            except ExportError as refused:
                raise EngineBuildError(str(refused)) from refused
            worst = max(worst, error)
    return worst
