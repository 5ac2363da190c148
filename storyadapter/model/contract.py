"""The contract: every input and output of every network that is exported, as data.

The exporter, the builders' profiles, every session, the tests and the benchmark read it; nothing else spells the name
or the shape of a network's input. Letters are those of the design: B rows of one UNet call (2·F, unconditional rows
first), P prompts bound to a call, F frames of a batch, N reference images, G rows of the reference bank,
R reference tokens (4·N), M chunks of a prompt (its text tokens are T = 77·M), h and w latent size, H·D = C width of a
layer, L cross-attention layers of one width, E width of the UNet's time embedding. Imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Final, Literal

from storyadapter.method import constants
from storyadapter.method.errors import Field, InputError
from storyadapter.method.plan import check_pixels
from storyadapter.model.numerics import DTYPE_NAMES, Arithmetic, Numerics, Precision, Quantization

_TEXT: Final = f"{constants.TEXT_TOKENS}*M"  # T
CONTRACT_VERSION: Final = 2
DECODERS: Final = ("vae_decoder", "reference_decoder")  # latents to pictures; the second in models with a reference VAE

Dim = int | str  # a number, a letter, a factor times a letter such as "4*N", or a part of one such as "h/2"


@dataclass(frozen=True)
class LayerWidth:
    """The cross-attention layers of one width: `channels` C, `layers` L, `heads` H (D = C / H)."""

    channels: int
    layers: int
    heads: int

    @property
    def head_size(self) -> int:
        return self.channels // self.heads


@dataclass(frozen=True)
class Residual:
    """What a ControlNet adds to one output of the UNet's encoder: `channels`, at 1/`shrink` of the latents' size."""

    channels: int
    shrink: int


@dataclass(frozen=True)
class ControlGeometry:
    """The sizes of one ControlNet."""

    widths: tuple[LayerWidth, ...]  # of its own cross-attention layers, ascending channels; it may have none
    time_embedding: int  # E of its own
    residuals: tuple[Residual, ...]  # as many and as large as the UNet's outputs, its middle last

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ControlGeometry":
        widths = tuple(LayerWidth(**width) for width in data["widths"])
        return cls(**{**data, "widths": widths, "residuals": tuple(Residual(**part) for part in data["residuals"])})


@dataclass(frozen=True)
class Geometry:
    """The sizes of one SDXL-shaped model, read from its configuration files."""

    widths: tuple[LayerWidth, ...]  # ascending channels
    time_embedding: int  # E
    text_width: int  # hidden width of text encoder 1
    text_width_2: int  # hidden width of text encoder 2
    pooled_width: int  # width of text encoder 2's pooled projection
    image_embedding_width: int  # of the CLIP image encoder
    sample_size: int  # default latent height and width
    latent_channels: int = constants.LATENT_CHANNELS
    pixels_per_latent: int = 8
    vae_in_fp32: bool = True  # the VAE's `force_upcast`
    reference_vae: bool = False  # whether it has a tiny VAE, which decodes pictures that only become references
    guidance_embedding: int = 0  # C0, width of the embedding as which the UNet takes the guidance; 0: it takes none
    controls: tuple[ControlGeometry, ...] = ()  # of the ControlNets, whose residuals the UNet then takes

    @property
    def default_pixels(self) -> int:
        return self.sample_size * self.pixels_per_latent

    def numerics(
        self, precision: Precision, vae: Arithmetic | None = None, quantization: Quantization | None = None
    ) -> Numerics:
        """Everything in one precision but the VAE, where it has one of its own: `vae`, or what its model asks for."""
        return Numerics.of(precision, quantization, vae_decoder=vae or ("fp32" if self.vae_in_fp32 else None))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; `Geometry.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Geometry":
        controls = tuple(map(ControlGeometry.from_dict, data.get("controls", ())))
        return cls(**{**data, "widths": tuple(LayerWidth(**width) for width in data["widths"]), "controls": controls})


@dataclass(frozen=True)
class Range:
    """Inclusive range of a dynamic letter."""

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(f"range {self.minimum}..{self.maximum} is not 1 <= minimum <= maximum")

    def covers(self, other: "Range") -> bool:
        return self.minimum <= other.minimum and other.maximum <= self.maximum

    def __contains__(self, value: int) -> bool:
        return self.minimum <= value <= self.maximum

    def __str__(self) -> str:
        return str(self.minimum) if self.minimum == self.maximum else f"{self.minimum}..{self.maximum}"


@dataclass(frozen=True)
class ShapeRanges:
    """What an engine is built for: frames per call, references, and picture sizes in pixels."""

    max_frames: int
    max_references: int
    height: Range
    width: Range
    max_prompt_chunks: int = 1

    def __post_init__(self) -> None:
        for name in ("max_frames", "max_references", "max_prompt_chunks"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(Field(name), f" is {value}", expected="1 or more")
        if self.max_prompt_chunks > constants.MAX_PROMPT_CHUNKS:
            found, expected = f" is {self.max_prompt_chunks}", f"{constants.MAX_PROMPT_CHUNKS} or less"
            raise InputError(Field("max_prompt_chunks"), found, expected=expected)
        for name, pixels in (("height", self.height), ("width", self.width)):
            check_pixels(name, pixels.minimum)
            check_pixels(name, pixels.maximum)

    def letters(self, pixels_per_latent: int = 8) -> dict[str, Range]:
        """The range of every dynamic letter."""
        return {
            "B": Range(1, 2 * self.max_frames),
            "P": Range(1, 2 * self.max_frames),
            "F": Range(1, self.max_frames),
            # one image more than there are references: the all-zero embedding of the unconditional row
            "N": Range(1, self.max_references + 1),
            "G": Range(1, 2 * self.max_frames + 1),
            "R": Range(1, constants.TOKENS_PER_IMAGE * self.max_references),
            "M": Range(1, self.max_prompt_chunks),
            "h": Range(self.height.minimum // pixels_per_latent, self.height.maximum // pixels_per_latent),
            "w": Range(self.width.minimum // pixels_per_latent, self.width.maximum // pixels_per_latent),
        }

    def uncovered(self, other: "ShapeRanges") -> str | None:
        """The first field in which `other` asks for more than these ranges hold, in words; None if all fit."""
        for name in ("max_frames", "max_references", "max_prompt_chunks"):
            mine, asked = getattr(self, name), getattr(other, name)
            if asked > mine:
                return f"{name.replace('_', ' ')} is {mine}, {asked} asked for"
        for name in ("height", "width"):
            mine, asked = getattr(self, name), getattr(other, name)
            if not mine.covers(asked):
                return f"{name} is {mine}, {asked} asked for"
        return None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ShapeRanges":
        return cls(**{**data, "height": Range(**data["height"]), "width": Range(**data["width"])})


DtypeRole = Literal["network", "float32", "int32"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: name, shape in letters, and its dtype: the network's own, or a fixed one."""

    name: str
    shape: tuple[Dim, ...]
    dtype: DtypeRole = "network"

    def dtype_name(self, precision: Precision) -> str:
        """The dtype in a network of this precision, as PyTorch names it: "float32", "float16", "bfloat16", "int32"."""
        return DTYPE_NAMES[precision] if self.dtype == "network" else self.dtype

    def solve(self, sizes: tuple[int, ...], letters: dict[str, int], network: str) -> None:
        """Check `sizes` against the shape; letters met for the first time are added to `letters`.

        Raises:
            ValueError: naming the network, the tensor and the letter.
        """
        where = f"{network}: input {self.name}"
        if len(sizes) != len(self.shape):
            raise ValueError(f"{where} has {len(sizes)} dimensions {list(sizes)}; expected {list(self.shape)}")
        for axis, (dim, size) in enumerate(zip(self.shape, sizes, strict=True)):
            if isinstance(dim, int):
                if size != dim:
                    raise ValueError(f"{where} has {size} in dimension {axis}; expected {dim} ({list(self.shape)})")
                continue
            factor, letter = split_dim(dim)
            known = letters.setdefault(letter, int(size / factor))
            if known * factor != size:
                raise ValueError(f"{where} has {dim} = {size}; expected {known * factor}, as in an earlier input")


def split_dim(dim: str) -> tuple[Fraction, str]:
    """ "4*N" -> (4, "N"); "N" -> (1, "N"); "h/2" -> (1/2, "h")."""
    factor, _, letter = dim.rpartition("*")
    letter, _, divisor = letter.partition("/")
    return Fraction(int(factor or 1), int(divisor or 1)), letter


def size_of(dim: Dim, letters: Mapping[str, int]) -> int:
    """The size of a dimension where the letters have these values."""
    if isinstance(dim, int):
        return dim
    factor, letter = split_dim(dim)
    return int(factor * letters[letter])


@dataclass(frozen=True)
class NetworkSpec:
    """Inputs and outputs of one exported network."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], ranges: Mapping[str, Range] | None) -> dict[str, int]:
        """Check named input shapes against the letters and, where given, their ranges.

        Returns:
            The value of every letter that occurs.

        Raises:
            ValueError: an input is missing or unknown, a shape doesn't fit, or a letter is out of its range; the
                message names the network, the input, the letter and what is allowed.
        """
        expected = {spec.name for spec in self.inputs}
        if shapes.keys() != expected:
            missing, unknown = sorted(expected - shapes.keys()), sorted(shapes.keys() - expected)
            raise ValueError(f"{self.name}: missing inputs {missing}, unknown inputs {unknown}")
        letters: dict[str, int] = {}
        for spec in self.inputs:
            spec.solve(tuple(shapes[spec.name]), letters, self.name)
        for letter, value in letters.items():
            if ranges is not None and letter in ranges and value not in ranges[letter]:
                raise ValueError(f"{self.name}: {letter} = {value} is outside the engine's range {ranges[letter]}")
        return letters


def network_specs(geometry: Geometry) -> dict[str, NetworkSpec]:
    """The networks of a model, its ControlNets' and its reference VAE's among them, in the order of a run."""
    chunk, pixels = constants.TEXT_TOKENS, constants.CLIP_PIXELS
    image, latent, scale = geometry.image_embedding_width, geometry.latent_channels, geometry.pixels_per_latent
    text_kv = _text_kv(geometry.widths)
    ref_kv = tuple(TensorSpec(ref_kv_name(w.channels), (w.layers, "G", 2, "R", w.channels)) for w in geometry.widths)
    image_kv = tuple(
        TensorSpec(image_kv_name(w.channels), (w.layers, 2, f"{constants.TOKENS_PER_IMAGE}*N", w.channels))
        for w in geometry.widths
    )
    input_ids = TensorSpec("input_ids", ("P", chunk), "int32")  # the encoders take chunks, each as a text

    def embeddings(tokens: Dim) -> tuple[TensorSpec, TensorSpec]:
        widths = (("text_embedding", geometry.text_width), ("text_embedding_2", geometry.text_width_2))
        first, second = (TensorSpec(name, ("P", tokens, width)) for name, width in widths)
        return first, second

    text_1, text_2 = embeddings(chunk)
    pooled = TensorSpec("pooled_text", ("P", geometry.pooled_width))
    # original height and width, crop top and left, target height and width, in pixels
    sizes = TensorSpec("sizes", ("P", 6), "float32")
    latents = TensorSpec("latents", ("B", latent, "h", "w"))
    decoded = TensorSpec("latents", ("F", latent, "h", "w"))
    picture = TensorSpec("image", ("F", 3, f"{scale}*h", f"{scale}*w"))
    timestep = TensorSpec("timestep", ("B",), "float32")  # bf16 would round 981 to 980
    text_row = TensorSpec("text_row", ("B",), "int32")
    conditions = (TensorSpec("time_condition", ("B", geometry.guidance_embedding)),)
    time_condition = conditions if geometry.guidance_embedding else ()
    residuals: tuple[TensorSpec, ...] = ()
    controls: list[NetworkSpec] = []
    for index, control in enumerate(geometry.controls):
        residuals = residual_specs(control)
        width, control_kv = control.residuals[0].channels, _text_kv(control.widths)
        controls += (
            NetworkSpec(
                control_embedding_name(index),
                (TensorSpec("picture", (1, 3, f"{scale}*h", f"{scale}*w")),),  # 0 to 1
                (TensorSpec("condition", (1, width, "h", "w")),),
            ),
            NetworkSpec(
                control_projection_name(index),
                (*(embeddings(_TEXT) if control_kv else ()), pooled, sizes),
                (*control_kv, TensorSpec("added_embedding", ("P", control.time_embedding))),
            ),
            NetworkSpec(
                controlnet_name(index),
                (
                    latents,
                    timestep,
                    TensorSpec("added_embedding", ("B", control.time_embedding)),
                    TensorSpec("condition", ("B", width, "h", "w")),
                    TensorSpec("conditioning_scale", ("B",), "float32"),
                    *((*control_kv, text_row) if control_kv else ()),
                ),
                residuals,
            ),
        )
    networks = (
        NetworkSpec("text_encoder", (input_ids,), (text_1,)),
        NetworkSpec("text_encoder_2", (input_ids,), (text_2, pooled)),
        NetworkSpec(
            "text_projection",
            (*embeddings(_TEXT), pooled, sizes),
            (*text_kv, TensorSpec("added_embedding", ("P", geometry.time_embedding))),
        ),
        NetworkSpec(
            "image_encoder",
            (TensorSpec("pixels", ("F", 3, pixels, pixels)),),
            (TensorSpec("image_embedding", ("F", image)),),
        ),
        NetworkSpec(
            "reference_projection",
            (TensorSpec("image_embedding", ("N", image)), TensorSpec("scale", (1,), "float32")),
            image_kv,
        ),
        *controls,
        NetworkSpec(
            "denoiser",
            (
                latents,
                timestep,
                TensorSpec("added_embedding", ("B", geometry.time_embedding)),
                *time_condition,
                *text_kv,
                text_row,
                *ref_kv,
                TensorSpec("ref_row", ("B",), "int32"),
                TensorSpec("ref_length", ("G",), "int32"),
                *residuals,
            ),
            (TensorSpec("noise", ("B", latent, "h", "w")),),
        ),
        *(NetworkSpec(name, (decoded,), (picture,)) for name in DECODERS[: 1 + geometry.reference_vae]),
    )
    return {network.name: network for network in networks}


def _text_kv(widths: tuple[LayerWidth, ...]) -> tuple[TensorSpec, ...]:
    shape = {width: (width.layers, "P", 2, _TEXT, width.channels) for width in widths}
    return tuple(TensorSpec(text_kv_name(width.channels), shape[width]) for width in widths)


def residual_specs(control: ControlGeometry) -> tuple[TensorSpec, ...]:
    """What a ControlNet gives and a denoiser of a model with ControlNets takes: the sum of theirs, channels last."""

    def size(letter: str, shrink: int) -> str:
        return letter if shrink == 1 else f"{letter}/{shrink}"

    return tuple(
        TensorSpec(f"residual_{index}", ("B", size("h", part.shrink), size("w", part.shrink), part.channels))
        for index, part in enumerate(control.residuals)
    )


def control_embedding_name(index: int) -> str:
    """Network that makes a ControlNet's condition of a frame's picture, once."""
    return f"control_embedding_{index}"


def control_projection_name(index: int) -> str:
    """Network that projects a prompt for a ControlNet, once."""
    return f"control_projection_{index}"


def controlnet_name(index: int) -> str:
    """Network that gives the residuals of one call."""
    return f"controlnet_{index}"


def text_kv_name(channels: int) -> str:
    return f"text_kv_{channels}"


def ref_kv_name(channels: int) -> str:
    return f"ref_kv_{channels}"


def image_kv_name(channels: int) -> str:
    """Keys and values of all images of an iteration, before they are packed into the bank's rows."""
    return f"image_kv_{channels}"
