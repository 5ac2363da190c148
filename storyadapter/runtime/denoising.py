"""The denoising loop of one micro-batch: UNet call, guidance, sampler step, all of it on the device and in place.

A state owns every tensor that a step reads or writes, at addresses that never change, and a step finds its
coefficients and its noise by a counter that lies on the device. So one step is the same work as any other, a backend
may record it once and replay it (see `storyadapter.model.networks.StepRunner`), and the host does nothing between the
steps but put them on the stream.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

from storyadapter.method.constants import DDIM_CONFIG, TEXT_TOKENS
from storyadapter.method.noise import Noise
from storyadapter.method.sampler import COLUMNS, SamplerTable, scale_input, step, timestep_at
from storyadapter.model.contract import ref_kv_name, text_kv_name
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import BoundText
from storyadapter.runtime.reference_bank import ReferenceBank, bank_rows

COEFFICIENT_ROWS: Final[int] = DDIM_CONFIG["num_train_timesteps"]  # of a state, so that it serves any number of steps
KEPT: Final = 2  # states and banks: the micro-batches of a story have two sizes at the most

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class LoopInputs:
    """What all micro-batches of a story share, on the device.

    coefficients: [K, 8] fp32; initial: [1, 4, h, w] fp32, the first x; per_step: [K, 1, 4, h, w] fp32, or
    [0, 1, 4, h, w]; guidance: [1] fp32; guided: whether unconditional rows are computed; calls: K.
    """

    coefficients: Tensor
    initial: Tensor
    per_step: Tensor
    guidance: Tensor
    guided: bool
    calls: int

    @classmethod
    def upload(cls, table: SamplerTable, noise: Noise, guidance: float, device: torch.device) -> "LoopInputs":
        return cls(
            coefficients=table.coefficients(device),
            initial=table.initial_latents(noise.initial).to(device),
            per_step=noise.per_step.to(device),
            guidance=torch.tensor([guidance], dtype=torch.float32, device=device),
            guided=guidance > 1,
            calls=table.calls,
        )

    def shape(self, frames: int) -> "LoopShape":
        """The shape of a micro-batch of so many frames."""
        return LoopShape(
            frames, self.guided, *self.initial.shape[2:], max(self.calls, COEFFICIENT_ROWS), len(self.per_step)
        )


@dataclass(frozen=True)
class LoopShape:
    """Everything that decides how large a state is.

    Attributes:
        frames: F; guided: B is 2·F, else F.
        height, width: h and w.
        coefficient_rows: room for as many UNet calls.
        noise_rows: K of a sampler that adds noise in its steps, else 0.
    """

    frames: int
    guided: bool
    height: int
    width: int
    coefficient_rows: int
    noise_rows: int

    @property
    def rows(self) -> int:
        """B."""
        return self.frames * (2 if self.guided else 1)

    @property
    def prompts(self) -> int:
        """P."""
        return self.frames + int(self.guided)


class DenoisingState:
    """One micro-batch on its way from noise to latents.

    Attributes:
        x: [F, 4, h, w] fp32, the result after the last step.
        inputs: the UNet's, by the contract's names; those of the reference bank are the bank's own tensors.
    """

    def __init__(self, networks: Networks, shape: LoopShape) -> None:
        geometry, device, dtype = networks.geometry, networks.device, networks.dtype("denoiser")
        channels = geometry.latent_channels
        self.shape = shape
        self._networks = networks
        self.x = torch.empty(shape.frames, channels, shape.height, shape.width, device=device)
        self._x0 = torch.empty_like(self.x)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._coefficients = torch.zeros(shape.coefficient_rows, len(COLUMNS), device=device)
        self._per_step = torch.zeros(shape.noise_rows, 1, channels, shape.height, shape.width, device=device)
        self._guidance = torch.zeros(1, device=device)
        rows = shape.rows
        self.inputs = {
            "latents": torch.empty(rows, channels, shape.height, shape.width, dtype=dtype, device=device),
            "timestep": torch.empty(rows, device=device),
            "added_embedding": torch.empty(rows, geometry.time_embedding, dtype=dtype, device=device),
            "text_row": torch.empty(rows, dtype=torch.int32, device=device),
            "ref_row": bank_rows(shape.frames, shape.guided, device),
        }
        for width in geometry.widths:
            size = (width.layers, shape.prompts, 2, TEXT_TOKENS, width.channels)
            self.inputs[text_kv_name(width.channels)] = torch.empty(size, dtype=dtype, device=device)

    def load(self, loop: LoopInputs, text: BoundText, bank: ReferenceBank) -> None:
        """Begin a micro-batch; copies on the device alone.

        Args:
            loop: whose `shape` this state has.
            text: of the frames of this micro-batch.
            bank: must stay as it is until the last step has run.
        """
        self.x.copy_(loop.initial)
        self._x0.zero_()
        self._counter.zero_()
        self._coefficients[: loop.calls].copy_(loop.coefficients)
        self._per_step.copy_(loop.per_step)
        self._guidance.copy_(loop.guidance)
        for channels, kv in text.text_kv.items():
            self.inputs[text_kv_name(channels)].copy_(kv)
        self.inputs["text_row"].copy_(text.text_row)
        self.inputs["added_embedding"].copy_(text.added_embedding)
        self.inputs |= {ref_kv_name(channels): kv for channels, kv in bank.ref_kv.items()}
        self.inputs["ref_length"] = bank.ref_length
        # equal keys: equal shapes at equal addresses, so what was recorded under one serves the other
        tensors = (*self.inputs.values(), self.x, self._x0, self._counter, self._coefficients, self._per_step)
        self._key = (self.shape, *((tuple(t.shape), t.data_ptr()) for t in (*tensors, self._guidance)))

    def advance(self) -> None:
        """Put the next step on the current stream; runs K times after `load`."""
        self._networks.run_step(self._key, self._step)

    def _step(self) -> None:
        scaled = scale_input(self._coefficients, self._counter, self.x)
        self.inputs["latents"].unflatten(0, (-1, self.shape.frames)).copy_(scaled)
        self.inputs["timestep"].copy_(timestep_at(self._coefficients, self._counter))
        output = self._networks["denoiser"](self.inputs)["noise"].float()
        if self.shape.guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self._guidance * (conditional - unconditional)
        fresh = self._per_step.index_select(0, self._counter)[0] if self.shape.noise_rows else None
        x, x0 = step(self._coefficients, self._counter, self.x, output, self._x0, fresh)
        self.x.copy_(x)
        self._x0.copy_(x0)
        self._counter.add_(1)


def denoise(
    networks: Networks,
    text: BoundText,
    bank: ReferenceBank,
    table: SamplerTable,
    noise: Noise,
    *,
    frames: int,
    guidance: float,
) -> Iterator[Tensor]:
    """Draw the latents of one micro-batch with a state of its own: the loop at its simplest.

    Args:
        text: bound text of these frames, unconditional rows first where guidance is above 1.
        bank: references of this iteration.
        table, noise: of the sampler; the noise is shared by all frames.
        frames: F.
        guidance: classifier-free guidance.

    Yields:
        [F, 4, h, w] fp32, once per UNet call and always the same tensor; at last, it is the result.
    """
    loop = LoopInputs.upload(table, noise, guidance, networks.device)
    state = DenoisingState(networks, loop.shape(frames))
    state.load(loop, text, bank)
    for _ in range(loop.calls):
        state.advance()
        yield state.x


class Reusable(Generic[Key, Value]):
    """Values that are expensive to make and may be used again, one user at a time; keeps those that were used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: OrderedDict[Key, Value] = OrderedDict()

    def take(self, key: Key, make: Callable[[], Value]) -> Value:
        """The idle value of this key, or a new one; it is the caller's until it is given back (or never)."""
        value = self._idle.pop(key, None)
        return make() if value is None else value

    def give(self, key: Key, value: Value) -> None:
        self._idle[key] = value
        self._idle.move_to_end(key)
        while len(self._idle) > self._limit:
            self._idle.popitem(last=False)

    def clear(self) -> None:
        self._idle.clear()


class LoopBuffers:
    """States and reference banks that equal shapes share over micro-batches, iterations and stories."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._states: Reusable[LoopShape, DenoisingState] = Reusable(KEPT)
        self._banks: Reusable[int, ReferenceBank] = Reusable(KEPT)

    def take_state(self, shape: LoopShape) -> DenoisingState:
        return self._states.take(shape, lambda: DenoisingState(self._networks, shape))

    def give_state(self, state: DenoisingState) -> None:
        self._states.give(state.shape, state)

    def take_bank(self, references: int) -> ReferenceBank:
        """A bank with room for so many references, with any content."""
        return self._banks.take(references, lambda: ReferenceBank.empty(self._networks, references))

    def give_bank(self, references: int, bank: ReferenceBank) -> None:
        self._banks.give(references, bank)

    def clear(self) -> None:
        """Let go of the memory of all that nobody uses."""
        self._states.clear()
        self._banks.clear()
