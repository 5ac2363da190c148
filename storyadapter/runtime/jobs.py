"""The unit of work: one frame of one iteration of one story, with everything that decides its pixels."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final

from torch import Tensor

from storyadapter.method.control_pictures import ControlPicture
from storyadapter.method.plan import SamplerSettings
from storyadapter.model.numerics import Numerics

KEY_FORMAT: Final = 1  # raised when equal jobs begin to mean other pixels


@dataclass(frozen=True)
class Control:
    """One ControlNet's part in a frame: the hash of its picture, its strength, and the share of the steps it has."""

    picture: str
    scale: float
    start: float
    end: float


@dataclass(frozen=True)
class FrameJob:
    """Everything that decides a frame's pixels, and nothing else.

    Attributes:
        model: key of the weights, LoRAs with their scales, VAE and tokenizers.
        numerics: the arithmetic of every network.
        height, width: pixels.
        prompt: final, as the text encoders get it.
        negative_prompt: of the unconditional row; None where none is computed.
        guidance: of the unconditional row, or as the UNet takes it as an embedding; None where neither is so.
        sampler: its settings, from which its table follows.
        guidance_interval: share of the steps between which unconditional rows are computed.
        chunks: in which its texts are read: T is 77 for each.
        start: key of the job from whose latents it starts; None: from noise alone.
        seed: of the initial noise, and of that of the steps.
        scale: λ; None without references.
        references: keys of what it attends to, in order: of other jobs, or hashes of a user's pictures.
        control: one per ControlNet of the model, None where it has no picture for it; () where it has none at all.
        decoder: of its latents, by the contract's name.
    """

    model: str
    numerics: Numerics
    height: int
    width: int
    prompt: str
    negative_prompt: str | None
    guidance: float | None
    sampler: SamplerSettings
    seed: int
    scale: float | None = None
    references: tuple[str, ...] = ()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    start: str | None = None
    control: tuple[Control | None, ...] = ()
    chunks: int = 1
    decoder: str = "vae_decoder"

    @cached_property
    def key(self) -> str:
        """SHA-256 of all of it, in 64 hexadecimal digits: equal jobs make equal pictures."""
        values = {**asdict(self), "numerics": self.numerics.as_values()}
        if not self.control:  # as before there were any
            del values["control"]
        if self.decoder == "vae_decoder":  # as before there was another
            del values["decoder"]
        return digest([KEY_FORMAT, values])

    @cached_property
    def batch_key(self) -> "BatchKey":
        interval = self.guidance_interval if self.is_guided else None
        size = self.height, self.width
        return BatchKey(self.model, self.numerics, *size, self.sampler, interval, self.chunks, self.decoder)

    @property
    def is_guided(self) -> bool:
        """Whether it has unconditional rows."""
        return self.negative_prompt is not None

    @property
    def cost(self) -> int:
        """What it takes, for a fair share: pixels of all its UNet rows."""
        return self.height * self.width * self.sampler.rows(self.guidance_interval if self.is_guided else None)


@dataclass(frozen=True)
class BatchKey:
    """What all frames of one batch have in common; everything else may differ from row to row.

    `guided`: the share of the steps between which they have unconditional rows; None: nowhere.
    """

    model: str
    numerics: Numerics
    height: int
    width: int
    sampler: SamplerSettings
    guided: tuple[float, float] | None
    chunks: int = 1
    decoder: str = "vae_decoder"


@dataclass(frozen=True, eq=False)
class References:
    """What the frames of one iteration attend to: `embeddings` [N, width] fp32 on the CPU, in the order of `keys`."""

    keys: tuple[str, ...]
    embeddings: Tensor

    @cached_property
    def key(self) -> str:
        """Of the numbers too: frames that were drawn in other batches have embeddings that are rounded otherwise."""
        numbers = self.embeddings.contiguous().numpy().tobytes()
        return digest([*self.keys, hashlib.sha256(numbers).hexdigest()])


@dataclass(frozen=True)
class TextGroup:
    """Texts that are encoded in one call, for frames of one size. A story's groups follow from the story alone, so that
    a text's encoding doesn't depend on what else is drawn."""

    texts: tuple[str, ...]
    height: int
    width: int
    chunks: int = 1

    @classmethod
    def split(cls, texts: Sequence[str], size: int, height: int, width: int, chunks: int = 1) -> list["TextGroup"]:
        """Groups of at most so many texts, in order; of texts in several chunks of as many fewer."""
        size = max(1, size // chunks)
        parts = (tuple(texts[start : start + size]) for start in range(0, len(texts), size))
        return [cls(part, height, width, chunks) for part in parts]


@dataclass(frozen=True, eq=False)
class Task:
    """A job on its way through the runtime, with what isn't keyed.

    Attributes:
        owner: to whom its frame is told; the worker doesn't look at it.
        iteration, frame: its place in the story, for messages.
        texts: group and index in it of the prompt and, with guidance, of the negative prompt.
        references: None without any.
        start: [4, h, w] on the CPU, the latents that it starts from; None: from noise alone.
        control: the pictures of the job's `control`.
        keep_latents: whether its own latents are wanted, as a start of the next iteration.
        embed: whether the frame's own embedding is wanted, as a reference of the next iteration.
        room: references that later frames of this story will have, so that all of them have one shape.
        alone: whether it comes again, because it found no room even by itself.
        lost: workers that were lost while they drew it.
    """

    owner: Any
    job: FrameJob
    iteration: int
    frame: int
    texts: tuple[tuple[TextGroup, int], ...]
    references: References | None = None
    embed: bool = False
    start: Tensor | None = None
    control: tuple[ControlPicture | None, ...] = ()
    keep_latents: bool = False
    room: int = 1
    alone: bool = False
    lost: int = 0

    def again(self, *, alone: bool) -> "Task":
        """The same once more, for which there was no memory."""
        return replace(self, alone=alone)


def digest(data: object) -> str:
    """SHA-256 of JSON values, in hexadecimal digits."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
