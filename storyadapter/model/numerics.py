"""In which arithmetic every network of a model runs: one value. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, Self, cast

from storyadapter.method.errors import Field, Text

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "bf16")
# of the operands of quantized products, beside which everything else has one of the precisions
NumberFormat = Literal["fp8", "int8"]
NUMBER_FORMATS: Final[tuple[NumberFormat, ...]] = ("fp8", "int8")
VAE_NUMBER_FORMATS: Final[tuple[NumberFormat, ...]] = ("fp8",)  # those of the VAE's decoder
BESIDE_VAE_PRODUCTS: Final[Precision] = "bf16"  # of all else in it: the activations of SDXL's overflow fp16
# Of a quantized network against its emulation, ‖difference‖ / ‖emulation‖ at the most: where sums differ in their last
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
    """A network's products over quantized operands."""

    number_format: NumberFormat
    scales: str = ""  # their key; "" for any


Arithmetic = Precision | Quantization  # of one network


def vae_arithmetic(name: str) -> Arithmetic | None:
    """That of the VAE by its name, "fp32" or "fp8"; None for any other, such as "auto": what its model asks for."""
    if name in VAE_NUMBER_FORMATS:
        return Quantization(cast(NumberFormat, name))
    return cast(Precision, name) if name in PRECISIONS else None


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of each network, by the contract's names: `numerics["vae_decoder"]`."""

    precision: Precision  # of weights and activations of every network that `exceptions` doesn't name
    # network and precision, where that is another; sorted, so that equal numerics are equal values
    exceptions: tuple[tuple[str, Precision], ...] = ()
    quantization: Quantization | None = None  # of the denoiser
    vae_quantization: Quantization | None = None  # of the VAE's decoder

    def __post_init__(self) -> None:
        others = sorted((name, own) for name, own in self.exceptions if own != self.precision)
        object.__setattr__(self, "exceptions", tuple(others))

    @classmethod
    def of(
        cls,
        precision: Precision,
        quantization: Quantization | None = None,
        vae_decoder: Arithmetic | None = None,
        **exceptions: Precision | None,
    ) -> Self:
        """`Numerics.of("fp16", vae_decoder="fp32")`; a network whose precision is None has that of the others, and a
        VAE of which the quantization is given that of `BESIDE_VAE_PRODUCTS`."""
        of_vae = None
        if isinstance(vae_decoder, Quantization):
            of_vae, vae_decoder = vae_decoder, BESIDE_VAE_PRODUCTS
        given = {**exceptions, "vae_decoder": vae_decoder}
        others = tuple((name, own) for name, own in given.items() if own is not None)
        return cls(precision, others, quantization, of_vae)

    def __getitem__(self, network: str) -> Precision:
        return dict(self.exceptions).get(network, self.precision)

    @property
    def name(self) -> str:
        """ "fp16", or the number format of a quantized denoiser: "fp8"."""
        return self.named("denoiser")

    @property
    def quantizations(self) -> dict[str, Quantization]:
        """Those of the networks that are quantized, by name."""
        given = {"denoiser": self.quantization, "vae_decoder": self.vae_quantization}
        return {network: own for network, own in given.items() if own is not None}

    def named(self, network: str) -> str:
        """The number format of a network that is quantized, or else its precision."""
        quantization = self.quantizations.get(network)
        return quantization.number_format if quantization else self[network]

    def tolerance(self, network: str) -> float:
        """‖difference‖ / ‖eager‖ at the most, of a network on a backend that was built for this arithmetic."""
        return QUANTIZED_TOLERANCE if network in self.quantizations else _TOLERANCE[self[network]]

    def with_scales(self, keys: Mapping[str, str]) -> Self:
        """The same with the keys of the scales of quantized networks, by network; those not named are for any."""
        own = {name: replace(q, scales=keys.get(name, "")) for name, q in self.quantizations.items()}
        return replace(self, quantization=own.get("denoiser"), vae_quantization=own.get("vae_decoder"))

    def __str__(self) -> str:
        """ "fp16", "fp16 (VAE fp32)" or "fp8 (VAE fp32)"."""
        words = {"vae_decoder": "VAE"}
        names = sorted(dict(self.exceptions).keys() | ({"vae_decoder"} if self.vae_quantization else set()))
        others = ", ".join(f"{words.get(name, name)} {self.named(name)}" for name in names)
        return f"{self.name} ({others})" if others else self.name

    def as_values(self) -> dict[str, Any]:
        """Field by field, as keys and records have it: without the VAE's quantization where there is none."""
        values = asdict(self)
        if self.vae_quantization is None:  # as before there was any
            del values["vae_quantization"]
        return values

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `Numerics.from_dict` reads it back."""
        given = {"quantization": self.quantization, "vae_quantization": self.vae_quantization}
        quantized = {name: asdict(own) for name, own in given.items() if own is not None}
        return {"precision": self.precision, **dict(self.exceptions), **quantized}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        plain = {**data}
        own, of_vae = (plain.pop(name, None) for name in ("quantization", "vae_quantization"))
        found = cls.of(**plain, quantization=Quantization(**own) if own else None)
        return replace(found, vae_quantization=Quantization(**of_vae) if of_vae else None)
