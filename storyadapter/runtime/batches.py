"""What a worker is given, and what it tells of it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

from storyadapter.runtime.decoding import Decoded
from storyadapter.runtime.jobs import Task


@dataclass(frozen=True, eq=False)
class Batch:
    """Frames that are drawn together; their jobs have one batch key.

    Attributes:
        tasks: F of them.
        decode_frames: decoded in one call at the most; None: all.
        keep_texts: how many texts may stay in memory for later batches.
    """

    tasks: tuple[Task, ...]
    decode_frames: int | None = None
    keep_texts: int = 0


@dataclass(frozen=True, eq=False)
class StepDone:
    """The device has done one UNet call of a batch: `step` of `steps`, counted from 1."""

    batch: Batch
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class FrameDone:
    """A frame is drawn, or can't be."""

    decoded: Decoded


@dataclass(frozen=True, eq=False)
class BatchDone:
    """Every frame of a batch was told.

    Attributes:
        seconds: by stage ("text", "references", "denoise", "decode"); on a GPU stages overlap.
        crowded: whether there was memory for its frames only once nothing else was going on.
    """

    batch: Batch
    seconds: dict[str, float]
    crowded: bool


@dataclass(frozen=True, eq=False)
class OutOfMemory:
    """There was no memory for these frames of a batch; all that was kept for speed has been given back since.

    `final`: fewer frames at once wouldn't help.
    """

    batch: Batch
    tasks: tuple[Task, ...]
    error: BaseException
    final: bool = False


@dataclass(frozen=True, eq=False)
class BatchLost:
    """Nothing more comes of a batch: the worker that drew it is gone. Frames that were told before stay."""

    batch: Batch
    error: BaseException


Report = StepDone | FrameDone | BatchDone | OutOfMemory | BatchLost


class BatchWorker(Hashable, Protocol):
    """One device, here or elsewhere: see `Worker`, whose methods these are."""

    @property
    def is_free(self) -> bool: ...

    @property
    def is_idle(self) -> bool: ...

    def start(self, batch: Batch) -> None: ...

    def advance(self) -> list[Report]: ...

    def embed(self, pictures: Sequence[Image.Image], groups: Sequence[range] | None = None) -> Tensor: ...

    def cancel(self, owner: object) -> None: ...

    def close(self) -> None: ...
