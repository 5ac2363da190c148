"""In which arithmetic every network of a model runs: one value. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, Self

from storyadapter.method.errors import Field, Text

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "bf16")
# of the operands of quantized products, beside which everything else has one of the precisions
NumberFormat = Literal["fp8", "int8"]
NUMBER_FORMATS: Final[tuple[NumberFormat, ...]] = ("fp8", "int8")
# Of a quantized denoiser against its emulation, ‖difference‖ / ‖emulation‖ at the most: where sums differ in their last
# digits, operands are rounded to other neighbours, and over all layers that grows to what the rounding itself is off
# from fp16. Measured: 0.025 and 0.032 of SDXL with random weights, 0.109 and 0.109 of a tiny model with such. Each
# block alone is held to less by tests; what computes something else is off by about 1.
QUANTIZED_TOLERANCE: Final = 0.25
# Of any other network against eager: sums are taken in another order, and on a GPU fp32 convolutions use TF32 in both.
_TOLERANCE: Final[Mapping[Precision, float]] = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 6e-2}
# as PyTorch names them
DTYPE_NAMES: Final[dict[Precision, str]] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def finer_precision(network: str, precision: Precision) -> Text:
    """What to try where a network's values leave the range of a precision; empty where nothing is wider."""
    wider = {"fp16": "bf16 or fp32", "bf16": "fp32"}.get(precision)
    field = Field("vae_precision" if network == "vae_decoder" else "precision")
    return ("try ", field, f" {wider}, with another ", Field("out")) if wider else ""


@dataclass(frozen=True)
class Quantization:
    """The denoiser's products over quantized operands."""

    number_format: NumberFormat
    scales: str = ""  # their key; "" for any


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of each network, by the contract's names: `numerics["vae_decoder"]`."""

    precision: Precision  # of weights and activations of every network that `exceptions` doesn't name
    # network and precision, where that is another; sorted, so that equal numerics are equal values
    exceptions: tuple[tuple[str, Precision], ...] = ()
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        others = sorted((name, own) for name, own in self.exceptions if own != self.precision)
        object.__setattr__(self, "exceptions", tuple(others))

    @classmethod
    def of(cls, precision: Precision, quantization: Quantization | None = None, **exceptions: Precision | None) -> Self:
        """`Numerics.of("fp16", vae_decoder="fp32")`; a network whose precision is None has that of the others."""
        others = tuple((name, own) for name, own in exceptions.items() if own is not None)
        return cls(precision, others, quantization)

    def __getitem__(self, network: str) -> Precision:
        return dict(self.exceptions).get(network, self.precision)

    @property
    def name(self) -> str:
        """ "fp16", or the number format of a quantized denoiser: "fp8"."""
        return self.quantization.number_format if self.quantization else self.precision

    def tolerance(self, network: str) -> float:
        """‖difference‖ / ‖eager‖ at the most, of a network on a backend that was built for this arithmetic."""
        quantized = self.quantization is not None and network == "denoiser"
        return QUANTIZED_TOLERANCE if quantized else _TOLERANCE[self[network]]

    def with_scales(self, key: str) -> Self:
        """The same with the key of a quantized denoiser's scales; "" for any."""
        return replace(self, quantization=self.quantization and replace(self.quantization, scales=key))

    def __str__(self) -> str:
        """ "fp16", "fp16 (VAE fp32)" or "fp8 (VAE fp32)"."""
        words = {"vae_decoder": "VAE"}
        others = ", ".join(f"{words.get(name, name)} {own}" for name, own in self.exceptions)
        return f"{self.name} ({others})" if others else self.name

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `Numerics.from_dict` reads it back."""
        quantized = {"quantization": asdict(self.quantization)} if self.quantization else {}
        return {"precision": self.precision, **dict(self.exceptions), **quantized}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        given = data.get("quantization")
        return cls.of(**{**data, "quantization": Quantization(**given) if given else None})
