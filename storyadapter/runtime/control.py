"""ControlNets in the denoising loop: each frame's pictures, and what they add to the UNet in each call."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from storyadapter.method.control import controlled_calls
from storyadapter.method.control_pictures import ControlPicture
from storyadapter.model.contract import (
    Geometry,
    control_embedding_name,
    controlnet_name,
    residual_specs,
    size_of,
)
from storyadapter.model.networks import Networks
from storyadapter.runtime.jobs import Control
from storyadapter.runtime.streams import upload

if TYPE_CHECKING:
    from storyadapter.runtime.conditioning import TextRow


@dataclass(frozen=True, eq=False)
class ControlRow:
    """What one ControlNet adds to one frame.

    Attributes:
        condition: [C, h, w] in the ControlNet's dtype, what it makes of the frame's picture.
        scale: what it gives is multiplied by it.
        calls: UNet calls that it takes part in.
    """

    condition: Tensor
    scale: float
    calls: range


class ControlConditions:
    """What ControlNets make of pictures, each once, on the device; keeps those that were used last."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._kept: OrderedDict[tuple[int, str], Tensor] = OrderedDict()

    def take(self, frames: Sequence[Sequence[ControlPicture | None]], keep: int) -> list[tuple[Tensor | None, ...]]:
        """For each frame its conditions [C, h, w], one per ControlNet, None where it has no picture.

        Args:
            frames: their pictures, one per ControlNet; empty for a frame that has none at all.
            keep: for how many frames they may stay in memory for later calls.
        """
        count = len(self._networks.geometry.controls)
        taken = [
            tuple(self._condition(index, picture) if picture else None for index, picture in enumerate(pictures))
            for pictures in (frame or (None,) * count for frame in frames)
        ]
        while len(self._kept) > count * keep:
            self._kept.popitem(last=False)
        return taken

    def forget(self) -> None:
        """Let go of what is kept."""
        self._kept.clear()

    def _condition(self, index: int, picture: ControlPicture) -> Tensor:
        key = (index, picture.key)
        if key not in self._kept:
            self._kept[key] = embed_control(self._networks, index, picture)
        self._kept.move_to_end(key)
        return self._kept[key]


def control_rows(
    controls: Sequence[Control | None], conditions: Sequence[Tensor | None], steps: int, skipped: int
) -> tuple[ControlRow | None, ...]:
    """A frame's rows, one per ControlNet, of so many steps of which the first are skipped."""
    pairs = zip(controls or (None,) * len(conditions), conditions, strict=True)
    return tuple(
        ControlRow(condition, control.scale, controlled_calls((control.start, control.end), steps, skipped))
        if control is not None and condition is not None
        else None
        for control, condition in pairs
    )


def embed_control(networks: Networks, index: int, picture: ControlPicture) -> Tensor:
    """[C, h, w]: what a ControlNet makes of a picture, in memory of its own."""
    name = control_embedding_name(index)
    pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1)[None].float() / 255
    inputs = {"picture": upload(pixels.to(networks.dtype(name)).contiguous(), networks.device)}
    return networks[name](inputs)["condition"][0].clone()


def control_bytes(geometry: Geometry, dtype: torch.dtype, height: int, width: int) -> int:
    """What the conditions of one frame take, h and w latents: 10 MB each for SDXL in half precision."""
    return sum(control.residuals[0].channels for control in geometry.controls) * height * width * dtype.itemsize


def control_state_bytes(geometry: Geometry, dtype: torch.dtype, rows: int, height: int, width: int) -> int:
    """What a `ControlState` keeps for so many rows, h and w latents: their conditions, and the zeros for calls without
    a ControlNet, 54 MB a row for SDXL in half precision; 0 for a model without ControlNets."""
    letters = {"B": rows, "h": height, "w": width}
    zeros = [tensor.shape for control in geometry.controls[:1] for tensor in residual_specs(control)]
    count = sum(math.prod(size_of(dim, letters) for dim in shape) for shape in zeros)
    return rows * control_bytes(geometry, dtype, height, width) + count * dtype.itemsize


class ControlState:
    """The tensors of one batch that its ControlNets read in every call, at addresses that never change.

    Args:
        networks: of a model with ControlNets or without.
        active: which of them any frame of the batch has; empty for none.
        plain: whether in some calls there is none.
        calls: room for as many UNet calls.
        text_kv: of each ControlNet, by the contract's names, as `Conditioning` has them.
        inputs: the denoiser's, of calls with all rows and of those with F rows alone: the same where there are no such.

    Attributes:
        tensors: all that it owns.
    """

    def __init__(
        self,
        networks: Networks,
        active: tuple[bool, ...],
        plain: bool,
        calls: int,
        text_kv: Sequence[Mapping[str, Tensor]],
        inputs: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ) -> None:
        self._networks = networks
        self._frames = len(inputs[1]["latents"])
        self._calls: tuple[range, ...] = ()
        rows, _, height, width = inputs[0]["latents"].shape
        options: dict[str, Any] = {"dtype": networks.dtype("denoiser"), "device": networks.device}
        self._inputs: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._scales: dict[int, Tensor] = {}
        self._zeros: dict[str, Tensor] = {}
        controls = networks.geometry.controls
        if controls and plain:
            letters = {"B": rows, "h": height, "w": width}
            for tensor in residual_specs(controls[0]):
                self._zeros[tensor.name] = torch.zeros([size_of(dim, letters) for dim in tensor.shape], **options)
        for index, control in enumerate(controls):
            if not (active and active[index]):
                continue
            own = {
                "added_embedding": torch.empty(rows, control.time_embedding, **options),
                "condition": torch.zeros(rows, control.residuals[0].channels, height, width, **options),
                "conditioning_scale": torch.zeros(rows, device=networks.device),
            }
            self._scales[index] = torch.zeros(calls, rows, device=networks.device)
            shared = ("latents", "timestep", *(("text_row",) if control.widths else ()))
            whole, short = ({name: given[name] for name in shared} for given in inputs)
            self._inputs[index] = (
                {**own, **text_kv[index], **whole},
                {**{name: value[-len(short["latents"]) :] for name, value in own.items()}, **text_kv[index], **short},
            )
        self.tensors = (*self._zeros.values(), *self._scales.values())
        self.tensors += tuple(value for whole, _ in self._inputs.values() for value in whole.values())

    def load(self, frames: Sequence[Sequence[ControlRow | None]], texts: Sequence["TextRow"], text_row: Tensor) -> None:
        """Begin a batch: F frames' rows, one per ControlNet; `texts` and [B] `text_row` are those of the UNet."""
        self._calls = ()
        for index in range(len(self._networks.geometry.controls)):
            found = {place: row for place, controls in enumerate(frames) if controls and (row := controls[index])}
            calls = [row.calls for row in found.values() if row.calls and row.scale]
            first, last = min((c.start for c in calls), default=0), max((c.stop for c in calls), default=0)
            self._calls += (range(first, last),)
            if index not in self._inputs:
                continue
            inputs, table = self._inputs[index][0], self._scales[index]
            scales = torch.zeros(table.shape)
            inputs["condition"].zero_()
            for place, row in found.items():
                for line in range(place, len(inputs["condition"]), len(frames)):  # unconditional, then conditional
                    inputs["condition"][line].copy_(row.condition)
                    scales[row.calls.start : row.calls.stop, line] = row.scale
            table.copy_(upload(scales, table.device))
            added = torch.stack([text.controls[index].added_embedding for text in texts])
            inputs["added_embedding"].copy_(added.index_select(0, text_row))

    def active_in(self, call: int) -> tuple[int, ...]:
        """Which ControlNets take part in a call of the batch, counted from 0."""
        return tuple(index for index, calls in enumerate(self._calls) if call in calls)

    def residuals(self, active: tuple[int, ...], counter: Tensor, *, all_rows: bool) -> dict[str, Tensor]:
        """What the UNet's encoder gets added in this call, by the contract's names; {} of a model without ControlNets.

        Args:
            active: as `active_in` gives them.
            counter: [1] int64, the call.
            all_rows: whether it has unconditional rows too, where others have.
        """
        if not active:
            return {name: value if all_rows else value[-self._frames :] for name, value in self._zeros.items()}
        total: dict[str, Tensor] = {}
        for index in active:
            inputs = self._inputs[index][0 if all_rows else 1]
            scale = inputs["conditioning_scale"]
            scale.copy_(self._scales[index].index_select(0, counter)[0, -len(scale) :])
            given = self._networks[controlnet_name(index)](inputs)
            total = {name: total[name] + value for name, value in given.items()} if total else given
        return total
