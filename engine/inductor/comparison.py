"""A compiled network compared with eager, with the weights that it is used with."""

from collections.abc import Mapping, Sequence
from typing import Final

from storyadapter.model.examples import Example, compare_with_eager
from storyadapter.model.networks import Network
from storyadapter.model.numerics import Precision

# ‖compiled − eager‖ / ‖eager‖. Sums are taken in another order, and on a GPU fp32 convolutions use TF32 in both.
_TOLERANCE: Final[Mapping[Precision, float]] = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 6e-2}


def compare(network: Network, examples: Sequence[Example], precision: Precision) -> float:
    """The largest relative error of any output on what eager gave.

    Raises:
        EngineBuildError: it is above the precision's tolerance, or not finite.
    """
    return compare_with_eager(network.spec.name, network, examples, precision, _TOLERANCE[precision])
