"""What follows from measured needs of memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storyadapter import RunPlan, api
from storyadapter.bench.synthetic import SDXL
from storyadapter.checkpoint import Checkpoint
from storyadapter.method.plan import FRAMES_AT_MOST, split_evenly
from storyadapter.model.contract import Range, controlnet_name
from storyadapter.model.networks import idle_inputs
from storyadapter.runtime.conditioning import text_bytes
from storyadapter.runtime.control import ControlState, control_state_bytes
from storyadapter.runtime.memory import (
    RESERVE_AT_LEAST,
    RESERVE_SHARE,
    Batching,
    Batchings,
    MemoryNeeds,
    frames_that_fit,
    share_memory,
    unet_letters,
)
from tests.control_models import write_controlnet
from tests.storyadapter.checkpoint.spoil import tiny_paths

GB = 1 << 30
MB = 1 << 20


def needs(free: float, per_frame: float = 0.5 * GB, fixed: float = GB, decode: float = 2 * GB) -> MemoryNeeds:
    return MemoryNeeds(int(free), int(fixed), int(per_frame), int(decode))


@pytest.mark.parametrize(
    ("free", "frames"),
    [
        (4 * GB, 1),  # 4 - 0.5 - 1 - 2 = 0.5
        (4.5 * GB, 2),
        (8 * GB, 9),
        (16 * GB, 24),  # a sixteenth is 1: 16 - 1 - 1 - 2 = 12
        (3 * GB, 1),  # not even one fits, by this count: it is tried
        (60 * GB, 32),  # the engine's range
    ],
)
def test_frames_that_fit(free: float, frames: int) -> None:
    assert frames_that_fit(needs(free), Range(1, 32)) == frames


def no_text(batches: int) -> int:
    return 0


def test_a_large_card_takes_no_more_than_makes_sense() -> None:
    batching = share_memory(needs(80 * GB), Range(1, 100), frames=100, max_frames=None, text=no_text)
    assert batching.max_frames == FRAMES_AT_MOST
    assert batching.decode_frames == 2
    batching = share_memory(needs(80 * GB), Range(1, 4), frames=100, max_frames=None, text=no_text)
    assert batching.max_frames == 4
    batching = share_memory(needs(80 * GB), Range(1, 100), frames=3, max_frames=None, text=no_text)
    assert batching.max_frames == 3


def test_what_was_asked_for_is_what_is_tried() -> None:
    batching = share_memory(needs(4 * GB), Range(1, 100), frames=50, max_frames=20, text=no_text)
    assert (batching.max_frames, batching.decode_frames, batching.keep_text) == (20, 1, False)


def test_text_is_kept_where_it_fits_beside_the_micro_batch_of_the_even_split() -> None:
    def text(batches: int) -> int:
        return (10 + batches) * 26 * MB

    # 10 - 0.625 - 1 - 2 = 6.375: 12 fit, 10 are drawn, 1.375 are left
    batching = share_memory(needs(10 * GB), Range(1, 100), frames=10, max_frames=None, text=text)
    assert (batching.max_frames, batching.keep_text, batching.decode_frames) == (10, True, 1)
    # by 8, that is 5 + 5: 3.875 are left, of which two frames at once take another 2
    batching = share_memory(needs(10 * GB), Range(1, 8), frames=10, max_frames=None, text=text)
    assert (batching.max_frames, batching.keep_text, batching.decode_frames) == (8, True, 2)
    asked: list[int] = []
    batching = share_memory(
        needs(10 * GB), Range(1, 8), frames=10, max_frames=None, text=lambda batches: asked.append(batches) or 4 * GB
    )
    assert (batching.keep_text, batching.decode_frames) == (False, 2)
    assert set(asked) == {2}


SIZES = st.integers(0, 100 * GB)


@given(SIZES, SIZES, st.integers(1, 10 * GB), SIZES, st.integers(1, 40), st.integers(1, 300), SIZES)
def test_whatever_is_chosen_fits(
    free: int, fixed: int, per_frame: int, decode: int, most: int, frames: int, text: int
) -> None:
    measured = MemoryNeeds(free, fixed, per_frame, decode)
    batching = share_memory(measured, Range(1, most), frames=frames, max_frames=None, text=lambda _: text)
    assert 1 <= batching.max_frames <= min(most, frames, FRAMES_AT_MOST)
    assert batching.decode_frames <= most
    together = len(split_evenly(frames, batching.max_frames)[0])
    used = fixed + together * per_frame + batching.decode_frames * decode + (text if batching.keep_text else 0)
    used += max(free // RESERVE_SHARE, RESERVE_AT_LEAST)
    least = batching.max_frames == batching.decode_frames == 1 and not batching.keep_text
    assert used <= free or least


def test_text_is_counted_by_its_chunks(tiny_model_dir: Path) -> None:
    networks = api.open_checkpoint(Checkpoint.open(tiny_paths(tiny_model_dir)), backend="eager").networks
    letters = unet_letters(networks, RunPlan(height=64, width=64), 3, 1, chunks=2)
    inputs = idle_inputs(networks, "denoiser", letters)
    taken = sum(value.nbytes for name, value in inputs.items() if name.startswith("text_kv"))
    assert taken == text_bytes(networks.geometry, torch.float32, letters["P"] * 2)
    asked: list[tuple[int, ...]] = []

    def choose(plan: RunPlan, *sizes: int) -> Batching:
        asked.append(sizes)
        return Batching(1, None, True)

    known = Batchings(choose)
    for chunks in (1, 3, 1):
        known.take(RunPlan(height=64, width=64), 5, 1, chunks)
    assert asked == [(5, 1, 1), (5, 1, 3)]


def test_what_controlnets_keep_for_a_batch_is_what_is_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    nets = [write_controlnet(tiny_model_dir, tmp_path / str(seed), seed) for seed in range(2)]
    model = Checkpoint.open(tiny_paths(tiny_model_dir, controlnets=nets))
    networks = api.open_checkpoint(model, backend="eager").networks
    letters = unet_letters(networks, RunPlan(height=64, width=96), 3, 1)
    whole = idle_inputs(networks, "denoiser", letters)
    text = [
        {name: value for name, value in idle_inputs(networks, controlnet_name(index), letters).items() if "kv" in name}
        for index in range(2)
    ]
    state = ControlState(networks, (True, True), True, 5, text, (whole, whole))
    given = {tensor.data_ptr() for group in (whole, *text) for tensor in group.values()}
    found = sum(tensor.nbytes for tensor in state.tensors if tensor.data_ptr() not in given)
    geometry = networks.geometry
    # the times' embeddings, the scales of this call, and those of 5 calls
    small = sum(6 * (4 * control.time_embedding + 4 + 5 * 4) for control in geometry.controls)
    assert found == control_state_bytes(geometry, torch.float32, 6, 8, 12) + small
    assert control_state_bytes(replace(geometry, controls=()), torch.float32, 6, 8, 12) == 0


def test_what_a_controlnet_keeps_for_a_row_at_full_size() -> None:
    geometry = replace(SDXL.geometry, controls=(SDXL.control_geometry,))
    zeros = 3 * 320 * 128**2 + (320 + 2 * 640) * 64**2 + (640 + 3 * 1280) * 32**2
    assert control_state_bytes(geometry, torch.float16, 1, 128, 128) == 2 * (zeros + 320 * 128**2)
    assert 53e6 < 2 * zeros < 54e6
