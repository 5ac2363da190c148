"""How many frames fit on the device at once: measured needs, and what follows from them.

With `free` the bytes that are free once the networks are loaded, and a sixteenth of it (512 MiB at least) left for
what isn't counted one by one, the frames of a micro-batch are

    (free - reserve - fixed - decode) // per_frame

within what the engine takes and at most `plan.FRAMES_AT_MOST`; then the story is split evenly.

- `decode` is what decoding one frame takes, which goes on beside the UNet's work.
- `fixed` is what a UNet call takes however few its frames are (the reference bank above all), what the image encoder
  takes over `decode`, whose place it takes, and what the hungriest of the networks takes that run between
  micro-batches: little, unless their weights come from the host for each call.
- `per_frame` is what each frame adds to a UNet call (the activations of two rows, the keys and values of its prompt),
  two more copies of those keys and values on their way, and of a model with ControlNets what their pictures became
  and the zeros that stand for residuals in steps without any.

What is left then keeps the text of the whole story, or else it is projected again for each micro-batch, which costs a
few thousandths of the time; and two frames are decoded at once if there is still room for that.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from storyadapter.method import constants
from storyadapter.method.plan import FRAMES_AT_MOST, FRAMES_UNMEASURED, RunPlan, split_evenly
from storyadapter.model.contract import Range, control_embedding_name, control_projection_name, controlnet_name
from storyadapter.model.networks import Networks, idle_inputs
from storyadapter.runtime.conditioning import text_bytes
from storyadapter.runtime.control import control_bytes, control_state_bytes
from storyadapter.runtime.denoising import StatePool
from storyadapter.runtime.streams import decoding_stream

RESERVE_SHARE: Final = 16
RESERVE_AT_LEAST: Final = 512 << 20
_DECODED_TOGETHER: Final = 2  # one frame fills a GPU, and smaller parts come to the host earlier
_PROBED_FRAMES: Final = 3
_KNOWN_AT_MOST: Final = 64


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes on the device, and the time that was seen beside; see this module's text."""

    free: int
    fixed: int
    per_frame: int
    decode: int
    seconds_per_row: float = 0.0  # of a UNet call with a few frames


@dataclass(frozen=True)
class Batching:
    """How the frames of a story share the device.

    Attributes:
        max_frames: of a micro-batch at the most.
        decode_frames: decoded in one call at the most; None: those of a micro-batch.
        keep_text: whether the projected text of the whole story stays in memory.
        needs: what was measured; None where nothing was.
    """

    max_frames: int
    decode_frames: int | None
    keep_text: bool
    needs: MemoryNeeds | None = None


def frames_that_fit(needs: MemoryNeeds, allowed: Range) -> int:
    """Frames of a micro-batch, see this module's text; the least that is allowed, where not even that fits."""
    return max(allowed.minimum, min(_room(needs) // max(needs.per_frame, 1), allowed.maximum))


def share_memory(
    needs: MemoryNeeds, allowed: Range, *, frames: int, max_frames: int | None, text: Callable[[int], int]
) -> Batching:
    """What fits beside each other.

    Args:
        allowed: frames of a micro-batch that the engine takes.
        frames: of the story.
        max_frames: frames of a micro-batch at the most, where that was asked for.
        text: bytes of the text of a story that is split into so many micro-batches.
    """
    most = Range(allowed.minimum, max(allowed.minimum, min(allowed.maximum, FRAMES_AT_MOST, frames)))
    chosen = max_frames or frames_that_fit(needs, most)
    batches = split_evenly(frames, chosen)
    left = _room(needs) - len(batches[0]) * needs.per_frame
    keep_text = text(len(batches)) <= left
    if keep_text:
        left -= text(len(batches))
    together = min(_DECODED_TOGETHER, allowed.maximum) if left >= needs.decode else 1
    return Batching(chosen, together, keep_text, needs)


def measure_needs(networks: Networks, plan: RunPlan, references: int, allowed: Range, chunks: int = 1) -> MemoryNeeds:
    """Measure on a GPU, by calls with one frame and with a few; `chunks`: of the longest text.

    Raises:
        torch.OutOfMemoryError: a single frame doesn't fit.
    """
    device = networks.device

    def call(network: str, frames: int = 1) -> None:
        letters = unet_letters(networks, plan, frames, references, chunks) | {"F": frames, "N": references + 1}
        networks[network](idle_inputs(networks, network, letters))

    def peak(network: str, frames: int = 1) -> int:
        return _peak(device, lambda: call(network, frames))

    def step(frames: int) -> None:
        for network in step_networks(networks):
            call(network, frames)

    with torch.inference_mode():
        # libraries take scratch memory once for each stream, and keep it
        peak("denoiser")
        networks.run_step("scratch memory", lambda: call("denoiser"))
        networks.run_step.forget()
        with torch.cuda.stream(decoding_stream(device)):
            call("image_encoder")
        one = per_frame = peak("denoiser")
        decode, encode = peak("vae_decoder"), peak("image_encoder")
        text = ["text_encoder", "text_encoder_2", "text_projection"]
        for index in range(len(networks.geometry.controls)):
            text += control_embedding_name(index), control_projection_name(index)
        between = max(map(peak, (*text, "reference_projection")))
        probed = 1
        if allowed.maximum >= _PROBED_FRAMES:
            try:
                per_frame = (peak("denoiser", _PROBED_FRAMES) - one) // (_PROBED_FRAMES - 1)
                probed = _PROBED_FRAMES
            except torch.OutOfMemoryError:
                per_frame = one
        started = time.perf_counter()
        _peak(device, lambda: step(probed))
        seconds = time.perf_counter() - started
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    geometry, dtype, letters = (
        networks.geometry,
        networks.dtype("denoiser"),
        unet_letters(networks, plan, 1, references),
    )
    size = letters["h"], letters["w"]
    control = control_state_bytes(geometry, dtype, letters["B"], *size) + control_bytes(geometry, dtype, *size)  # kept
    return MemoryNeeds(
        free,
        fixed=max(0, one - per_frame) + max(0, encode - decode) + between,
        per_frame=per_frame + 2 * text_bytes(geometry, dtype, chunks) + control,
        decode=decode,
        seconds_per_row=seconds / unet_letters(networks, plan, probed, references)["B"],
    )


def step_networks(networks: Networks) -> list[str]:
    """What runs in a step of a frame with a picture for each ControlNet, in order."""
    return [*map(controlnet_name, range(len(networks.geometry.controls))), "denoiser"]


def unet_letters(networks: Networks, plan: RunPlan, frames: int, references: int, chunks: int = 1) -> dict[str, int]:
    """The size of every letter of a UNet call with so many frames and references, and texts of so many chunks."""
    height, width = (pixels // networks.geometry.pixels_per_latent for pixels in plan.size)
    return {
        "B": frames * (2 if plan.guided else 1),
        "P": frames + int(plan.guided),
        "G": 2,
        "R": constants.TOKENS_PER_IMAGE * references,
        "M": chunks,
        "h": height,
        "w": width,
    }


class Batchings:
    """How stories are split, chosen once for each size of story, so that one that is drawn again is split as before."""

    def __init__(self, choose: Callable[[RunPlan, int, int, int], Batching]) -> None:
        self._choose = choose
        self._known: dict[tuple[object, ...], Batching] = {}

    def is_known(self, plan: RunPlan, frames: int, negatives: int, chunks: int) -> bool:
        """Whether `take` needs to choose nothing."""
        return self._key(plan, frames, negatives, chunks) in self._known

    def take(self, plan: RunPlan, frames: int, negatives: int, chunks: int) -> Batching:
        """How a story of so many frames and distinct negative prompts, of at most so many chunks, is split.

        Raises:
            torch.OutOfMemoryError: a single frame doesn't fit.
        """
        key = self._key(plan, frames, negatives, chunks)
        if key not in self._known:
            self._known[key] = self._choose(plan, frames, negatives, chunks)
            if len(self._known) > _KNOWN_AT_MOST:
                self._known.pop(next(iter(self._known)))
        return self._known[key]

    @staticmethod
    def _key(plan: RunPlan, frames: int, negatives: int, chunks: int) -> tuple[object, ...]:
        return plan.size, plan.guided, bool(plan.scales), plan.max_frames, frames, negatives, chunks


def choose_batching(
    networks: Networks, states: StatePool, plan: RunPlan, frames: int, negatives: int, chunks: int
) -> Batching:
    """How a story is split on one device: on a GPU by the memory that is free, which is measured.

    Raises:
        torch.OutOfMemoryError: a single frame doesn't fit.
    """
    allowed = networks.letters["F"] if networks.letters else Range(1, max(1, frames))
    if networks.device.type != "cuda":
        most = min(FRAMES_UNMEASURED, allowed.maximum) if networks.letters else FRAMES_UNMEASURED
        return Batching(plan.max_frames or most, None, True)

    def text(batches: int) -> int:
        rows = frames + max(batches, negatives) * int(plan.guided)
        geometry, dtype = networks.geometry, networks.dtype("denoiser")
        size = (pixels // geometry.pixels_per_latent for pixels in plan.size)
        return text_bytes(geometry, dtype, rows * chunks) + frames * control_bytes(geometry, dtype, *size)

    release_memory(networks, states)
    needs = measure_needs(networks, plan, plan.references(frames), allowed, chunks)
    return share_memory(needs, allowed, frames=frames, max_frames=plan.max_frames, text=text)


def release_memory(networks: Networks, states: StatePool) -> None:
    """Let go of everything that is kept for speed alone, when nothing is on its way."""
    networks.run_step.forget()
    states.clear()
    gc.collect()
    if networks.device.type == "cuda":
        torch.cuda.empty_cache()


def _room(needs: MemoryNeeds) -> int:
    """Bytes for the frames of a micro-batch, beside the decoding of one frame."""
    reserve = max(needs.free // RESERVE_SHARE, RESERVE_AT_LEAST)
    return needs.free - reserve - needs.fixed - needs.decode


def _peak(device: torch.device, call: Callable[[], object]) -> int:
    """Bytes that a call takes at its highest, its inputs included."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
