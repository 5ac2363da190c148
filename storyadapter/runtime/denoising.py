"""The denoising loop of one batch: UNet call, guidance, sampler step, all of it on the device and in place.

A state owns every tensor that a step reads or writes, at addresses that never change, and a step finds its
coefficients and its noise by a counter that lies on the device. So one step is the same work as any other, a backend
may record it once and replay it (see `storyadapter.model.networks.StepRunner`), and the host does nothing between the
steps but put them on the stream.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from storyadapter.method.constants import TEXT_TOKENS, TRAIN_STEPS
from storyadapter.method.noise import Noise
from storyadapter.method.sampler import COLUMNS, SamplerTable, scale_input, step, timestep_at
from storyadapter.model.contract import LayerWidth, ref_kv_name, text_kv_name
from storyadapter.model.networks import Networks
from storyadapter.model.unet import guidance_embedding
from storyadapter.runtime.conditioning import TextRow
from storyadapter.runtime.control import ControlRow, ControlState
from storyadapter.runtime.reference_bank import BankRow, reference_tokens
from storyadapter.runtime.streams import upload

COEFFICIENT_ROWS: Final = TRAIN_STEPS  # of a state, so that it serves any number of steps
BUFFERS_KEPT: Final = 2  # where padding takes time, iteration 0 has one of its own
STATES_KEPT: Final = 32  # a lone story's batches have two sizes at the most, mixed ones any up to F


@dataclass(frozen=True, eq=False)
class SamplerInputs:
    """A sampler and the noise of one seed, on the device.

    coefficients: [K, 8] fp32; initial: [1, 4, h, w] fp32, the first x; per_step: [K, 1, 4, h, w] fp32, or
    [0, 1, 4, h, w] where the sampler adds no noise; calls: K; signal: factor of the latents that a frame starts from;
    skipped: steps before the first call.
    """

    coefficients: Tensor
    initial: Tensor
    per_step: Tensor
    calls: int
    signal: float = 0.0
    skipped: int = 0

    @classmethod
    def upload(cls, table: SamplerTable, noise: Noise, device: torch.device) -> "SamplerInputs":
        return cls(
            coefficients=upload(table.coefficients(), device),
            initial=upload(table.initial_latents(noise.initial), device),
            per_step=upload(noise.per_step, device),
            calls=table.calls,
            signal=table.initial_signal,
            skipped=table.skipped,
        )


@dataclass(frozen=True, eq=False)
class FrameRows:
    """What the UNet rows of one frame read, and how it is sampled.

    Attributes:
        text, references: of the conditional row.
        sampler: with the frame's own noise; coefficients and K are those of the whole batch.
        negative, unconditional: of the unconditional row; None for all frames of a batch where none is computed.
        guidance: of the unconditional row, or as the UNet takes it as an embedding; None where neither is so.
        start: [4, h, w] on the CPU, the latents that it starts from; None: from noise alone.
        guided_calls: those that compute the unconditional row; None: all. The same for all frames of a batch.
        controls: one per ControlNet of the model, None where the frame has no picture for it; empty: none at all.
    """

    text: TextRow
    references: BankRow
    sampler: SamplerInputs
    negative: TextRow | None = None
    unconditional: BankRow | None = None
    guidance: float | None = None
    guided_calls: range | None = None
    start: Tensor | None = None
    controls: tuple[ControlRow | None, ...] = ()

    @property
    def has_both(self) -> bool:
        """Whether some calls compute the unconditional row and others don't."""
        return self.guided_calls is not None and len(self.guided_calls) < self.sampler.calls


@dataclass(frozen=True)
class Room:
    """How much the UNet calls of a batch may read: P, G and R, each a maximum, and T, which is the same for all."""

    prompts: int
    bank_rows: int
    tokens: int
    text_tokens: int = TEXT_TOKENS

    @classmethod
    def of(cls, networks: Networks, frames: Sequence[FrameRows], references: int = 1) -> Self:
        """What a batch needs; P, G and, where padding takes no time, R are rounded up, so that few shapes recur.

        Args:
            references: that later batches of these stories will have.
        """
        texts, bank = _distinct(frames)
        tokens = max([reference_tokens(1), *(row.length for row in bank)])
        if networks.padding_is_free:
            most = networks.letters["R"].maximum if networks.letters else None
            tokens = _rounded_up(max(tokens, reference_tokens(references)), most)
        alone = len(frames) + (frames[0].negative is not None)  # P of one story
        return cls(
            prompts=alone if len(texts) <= alone else 2 * len(frames),
            bank_rows=_rounded_up(max(2, len(bank)), max(2, 2 * len(frames) + 1)),
            tokens=tokens,
            text_tokens=next(iter(texts[0].kv.values())).shape[2],
        )

    def joined(self, other: Self, padding_is_free: bool) -> "Room | None":
        """Room for both; None where the one's padding would cost the other time."""
        if self.text_tokens != other.text_tokens or (self.tokens != other.tokens and not padding_is_free):
            return None
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Room(*(max(pair) for pair in pairs))


class Conditioning:
    """What the UNet calls of a batch read besides latents and time: text and references of all its frames.

    Attributes:
        inputs: the UNet's, by the contract's names.
        controls: each ControlNet's.
    """

    def __init__(self, networks: Networks, room: Room) -> None:
        options: dict[str, Any] = {"dtype": networks.dtype("denoiser"), "device": networks.device}
        self.room = room
        self.inputs = {"ref_length": torch.ones(room.bank_rows, dtype=torch.int32, device=networks.device)}

        def text_kv(widths: Sequence[LayerWidth]) -> dict[str, Tensor]:
            sizes = {w.channels: (w.layers, room.prompts, 2, room.text_tokens, w.channels) for w in widths}
            return {text_kv_name(channels): torch.zeros(size, **options) for channels, size in sizes.items()}

        self.inputs |= text_kv(networks.geometry.widths)
        self.controls = [text_kv(control.widths) for control in networks.geometry.controls]
        for width in networks.geometry.widths:
            bank = (width.layers, room.bank_rows, 2, room.tokens)
            self.inputs[ref_kv_name(width.channels)] = torch.zeros(*bank, width.channels, **options)
        self._widths = [width.channels for width in networks.geometry.widths]

    def load(self, texts: Sequence[TextRow], bank: Sequence[BankRow]) -> None:
        """Copy rows in, each to its place; zeros behind a bank row's length."""
        for row, text in enumerate(texts):
            for inputs, given in ((self.inputs, text), *zip(self.controls, text.controls, strict=True)):
                for channels, kv in given.kv.items():
                    inputs[text_kv_name(channels)][:, row].copy_(kv)
        for channels in self._widths:
            ref_kv = self.inputs[ref_kv_name(channels)]
            for row, references in enumerate(bank):
                used = references.length if references.kv else 0
                if used:
                    ref_kv[:, row, :, :used].copy_(references.kv[channels])
                ref_kv[:, row, :, used:].zero_()
        lengths = torch.tensor([row.length for row in bank], dtype=torch.int32)
        self.inputs["ref_length"][: len(bank)].copy_(upload(lengths, self.inputs["ref_length"].device))


@dataclass(frozen=True)
class LoopShape:
    """Everything that decides how large a state is, besides its conditioning.

    Attributes:
        frames: F; guided: B is 2·F, else F; both: in some calls 2·F, in others F.
        height, width: h and w.
        coefficient_rows: room for as many UNet calls.
        noise_rows: K of a sampler that adds noise in its steps, else 0.
        controls: which ControlNets any frame has; plain: whether some calls may have none.
    """

    frames: int
    guided: bool
    both: bool
    height: int
    width: int
    coefficient_rows: int
    noise_rows: int
    controls: tuple[bool, ...] = ()
    plain: bool = True

    @classmethod
    def of(cls, frames: Sequence[FrameRows]) -> Self:
        """The shape of a batch."""
        sampler = frames[0].sampler
        height, width = sampler.initial.shape[2:]
        rows = max(sampler.calls, COEFFICIENT_ROWS)
        guided, both = frames[0].negative is not None, frames[0].has_both
        columns = [[row for row in column if row] for column in zip(*(frame.controls for frame in frames), strict=True)]
        always = any(row.scale and row.calls == range(sampler.calls) for column in columns for row in column)
        controls = tuple(map(bool, columns))
        return cls(len(frames), guided, both, height, width, rows, len(sampler.per_step), controls, plain=not always)


class DenoisingState:
    """One batch on its way from noise to latents.

    Attributes:
        x: [F, 4, h, w] fp32, the result after the last step.
        inputs: the UNet's, by the contract's names, of a call with all rows.
    """

    def __init__(self, networks: Networks, shape: LoopShape, conditioning: Conditioning) -> None:
        geometry, device, dtype = networks.geometry, networks.device, networks.dtype("denoiser")
        latents = (shape.frames, geometry.latent_channels, shape.height, shape.width)
        self.shape = shape
        self.conditioning = conditioning
        self._networks = networks
        self.x = torch.empty(latents, device=device)
        self._x0 = torch.empty_like(self.x)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._coefficients = torch.zeros(shape.coefficient_rows, len(COLUMNS), device=device)
        self._per_step = torch.zeros(shape.noise_rows, *latents, device=device)
        self._guidance = torch.zeros(shape.frames, 1, 1, 1, device=device)

        def inputs(rows: int) -> dict[str, Tensor]:
            made = {
                "latents": torch.empty(rows, *latents[1:], dtype=dtype, device=device),
                "timestep": torch.empty(rows, device=device),
                "added_embedding": torch.empty(rows, geometry.time_embedding, dtype=dtype, device=device),
                "text_row": torch.zeros(rows, dtype=torch.int32, device=device),
                "ref_row": torch.zeros(rows, dtype=torch.int32, device=device),
            }
            if width := geometry.guidance_embedding:
                made["time_condition"] = torch.empty(rows, width, dtype=dtype, device=device)
            return conditioning.inputs | made

        self.inputs = inputs(shape.frames * (2 if shape.guided else 1))  # B
        # of calls without unconditional rows
        self._conditional = inputs(shape.frames) if shape.both else self.inputs
        both = (self.inputs, self._conditional)
        self._controls = ControlState(
            networks, shape.controls, shape.plain, shape.coefficient_rows, conditioning.controls, both
        )
        self._guided_calls: range | None = None
        self._queued = 0
        tensors = (*self.inputs.values(), self.x, self._x0, self._counter, self._coefficients, self._per_step)
        tensors += (*self._conditional.values(), *self._controls.tensors)
        # equal keys: equal shapes at equal addresses, so what was recorded under one serves the other
        self._key = (shape, *((tuple(t.shape), t.data_ptr()) for t in (*tensors, self._guidance)))

    def load(self, frames: Sequence[FrameRows]) -> None:
        """Begin a batch: F frames of one sampler, unconditional rows first. Nothing waits for the device."""
        sampler, device = frames[0].sampler, self._networks.device
        self._guided_calls, self._queued = frames[0].guided_calls, 0
        self._x0.zero_()
        self._counter.zero_()
        self._coefficients[: sampler.calls].copy_(sampler.coefficients)
        for index, frame in enumerate(frames):
            self.x[index].copy_(frame.sampler.initial[0])
            if frame.start is not None:
                self.x[index].add_(upload(frame.start.float(), device), alpha=sampler.signal)
            if self.shape.noise_rows:
                self._per_step[:, index].copy_(frame.sampler.per_step[:, 0])
        texts, bank = _distinct(frames)
        self.conditioning.load(texts, bank)
        text_row = [texts.index(frame.text) for frame in frames]
        ref_row = [bank.index(frame.references) for frame in frames]
        if self.shape.guided:
            text_row = [texts.index(frame.negative) for frame in frames if frame.negative] + text_row
            ref_row = [bank.index(frame.unconditional) for frame in frames if frame.unconditional] + ref_row
            guidance = torch.tensor([frame.guidance for frame in frames], dtype=torch.float32)
            self._guidance.flatten().copy_(upload(guidance, device))
        if (condition := self.inputs.get("time_condition")) is not None:
            scales = torch.tensor([frame.guidance for frame in frames], dtype=torch.float32)
            condition.copy_(upload(guidance_embedding(scales, condition.shape[1]).to(condition.dtype), device))
        for name, rows in (("text_row", text_row), ("ref_row", ref_row)):
            self.inputs[name].copy_(upload(torch.tensor(rows, dtype=torch.int32), device))
        added = torch.stack([text.added_embedding for text in texts])
        self.inputs["added_embedding"].copy_(added.index_select(0, self.inputs["text_row"]))
        self._controls.load([frame.controls for frame in frames], texts, self.inputs["text_row"])
        if self.shape.both:
            for name in ("text_row", "ref_row", "added_embedding"):
                self._conditional[name].copy_(self.inputs[name][-self.shape.frames :])

    def advance(self) -> None:
        """Put the next step on the current stream; runs K times after `load`."""
        guided = self.shape.guided and (self._guided_calls is None or self._queued in self._guided_calls)
        controls = self._controls.active_in(self._queued)
        self._networks.run_step((self._key, guided, controls), partial(self._step, guided, controls))
        self._queued += 1

    def _step(self, guided: bool, controls: tuple[int, ...]) -> None:
        inputs = self.inputs if guided else self._conditional
        scaled = scale_input(self._coefficients, self._counter, self.x)
        inputs["latents"].unflatten(0, (-1, self.shape.frames)).copy_(scaled)
        inputs["timestep"].copy_(timestep_at(self._coefficients, self._counter))
        residuals = self._controls.residuals(controls, self._counter, all_rows=inputs is self.inputs)
        output = self._networks["denoiser"](inputs | residuals)["noise"].float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self._guidance * (conditional - unconditional)
        fresh = self._per_step.index_select(0, self._counter)[0] if self.shape.noise_rows else None
        x, x0 = step(self._coefficients, self._counter, self.x, output, self._x0, fresh)
        self.x.copy_(x)
        self._x0.copy_(x0)
        self._counter.add_(1)


def denoise(networks: Networks, frames: Sequence[FrameRows]) -> Iterator[Tensor]:
    """Draw the latents of one batch with buffers of its own: the loop at its simplest.

    Yields:
        [F, 4, h, w] fp32, once per UNet call and always the same tensor; at last, it is the result.
    """
    state = StatePool(networks).take(frames)
    state.load(frames)
    for _ in range(frames[0].sampler.calls):
        state.advance()
        yield state.x


class StatePool:
    """Buffers that batches, iterations and stories share, one user at a time.

    The large ones, text and references, are one set for all sizes of batches: it grows until it serves what comes. So
    an address, and what was recorded for it, recurs however stories are mixed.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._idle: list[_Buffers] = []  # last used last
        self._taken: WeakKeyDictionary[DenoisingState, _Buffers] = WeakKeyDictionary()

    def take(self, frames: Sequence[FrameRows], references: int = 1) -> DenoisingState:
        """A state for a batch; it is the caller's until it is given back (or never).

        Args:
            references: that later batches of these stories will have.
        """
        buffers, shape = self._buffers(Room.of(self._networks, frames, references)), LoopShape.of(frames)
        state = buffers.states.get(shape) or DenoisingState(self._networks, shape, buffers.conditioning)
        buffers.states[shape] = state
        buffers.states.move_to_end(shape)
        if len(buffers.states) > STATES_KEPT:
            buffers.states.popitem(last=False)
        self._taken[state] = buffers
        return state

    def give(self, state: DenoisingState) -> None:
        self._idle.append(self._taken.pop(state))
        del self._idle[:-BUFFERS_KEPT]

    def clear(self) -> None:
        """Let go of the memory of all that nobody uses."""
        self._idle.clear()

    def _buffers(self, room: Room) -> "_Buffers":
        for index, found in enumerate(self._idle):
            joined = found.conditioning.room.joined(room, self._networks.padding_is_free)
            if joined is not None:
                del self._idle[index]
                if joined == found.conditioning.room:
                    return found
                del found  # before there is a larger one
                return _Buffers(Conditioning(self._networks, joined))
        return _Buffers(Conditioning(self._networks, room))


@dataclass(eq=False)
class _Buffers:
    """Text and references, and the states that read them, which are small beside them."""

    conditioning: Conditioning
    states: OrderedDict[LoopShape, DenoisingState] = field(default_factory=OrderedDict)


def _distinct(frames: Sequence[FrameRows]) -> tuple[list[TextRow], list[BankRow]]:
    """The texts and the bank rows of a batch, each once, those of unconditional rows first."""
    texts = [frame.negative for frame in frames if frame.negative] + [frame.text for frame in frames]
    bank = [frame.unconditional for frame in frames if frame.unconditional] + [frame.references for frame in frames]
    return list(dict.fromkeys(texts)), list(dict.fromkeys(bank))


def _rounded_up(number: int, most: int | None) -> int:
    """The next power of two, or `most` where that is less."""
    power = 1 << (number - 1).bit_length()
    return power if most is None else max(number, min(power, most))
