"""The loop: what a step computes, and that it always does so at the same addresses."""

from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from storyadapter import Checkpoint
from storyadapter.engine import open_networks
from storyadapter.method.constants import NEGATIVE_PROMPT
from storyadapter.method.noise import Noise, draw_noise
from storyadapter.method.sampler import SamplerTable, build_sampler, scale_input, step, timestep_at
from storyadapter.model.contract import ref_kv_name, text_kv_name
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import BoundText, StoryText, Tokenizers
from storyadapter.runtime.denoising import DenoisingState, LoopBuffers, LoopInputs, Reusable, denoise
from storyadapter.runtime.reference_bank import ReferenceBank, bank_rows

PROMPTS = ("a fox", "an owl in the snow", "a bear")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> tuple[Networks, Tokenizers]:
    return open_networks(checkpoint), Tokenizers(*checkpoint.load_tokenizers())


def bound_text(model: tuple[Networks, Tokenizers], frames: int, guided: bool) -> BoundText:
    negative = NEGATIVE_PROMPT if guided else None
    text = StoryText(*model, PROMPTS, negative_prompt=negative, height=64, width=64)
    with torch.inference_mode():
        return text.bind(range(frames))


def bank_of(networks: Networks, count: int = 3) -> ReferenceBank:
    width = networks.geometry.image_embedding_width
    with torch.inference_mode():
        return ReferenceBank.project(networks, torch.randn(count, width, generator=torch.manual_seed(1)), 0.4)


def plainly(
    networks: Networks, text: BoundText, bank: ReferenceBank, table: SamplerTable, noise: Noise, guidance: float
) -> Tensor:
    """The loop with a fresh tensor for everything."""
    frames = len(text.text_row) // (2 if guidance > 1 else 1)
    fixed = {"added_embedding": text.added_embedding, "text_row": text.text_row, "ref_length": bank.ref_length}
    fixed["ref_row"] = bank_rows(frames, guidance > 1, networks.device)
    fixed |= {text_kv_name(channels): kv for channels, kv in text.text_kv.items()}
    fixed |= {ref_kv_name(channels): kv for channels, kv in bank.ref_kv.items()}
    coefficients = table.coefficients()
    x = table.initial_latents(noise.initial).expand(frames, -1, -1, -1).contiguous()
    x0 = torch.zeros_like(x)
    for call in range(table.calls):
        index = torch.tensor([call])
        latents = scale_input(coefficients, index, x)
        latents = torch.cat((latents, latents)) if guidance > 1 else latents
        timestep = timestep_at(coefficients, index).repeat(len(latents))
        output = networks["denoiser"]({"latents": latents, "timestep": timestep, **fixed})["noise"]
        if guidance > 1:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        x, x0 = step(coefficients, index, x, output, x0, noise.per_step[call] if len(noise.per_step) else None)
    return x


@pytest.mark.parametrize("guidance", [1.0, 7.3])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "lcm"])
def test_it_computes_what_the_plain_loop_computes(
    model: tuple[Networks, Tokenizers], name: str, guidance: float
) -> None:
    networks = model[0]
    table = build_sampler(name, 5)
    noise = draw_noise(0, 8, 8, table)
    text, bank = bound_text(model, 3, guidance > 1), bank_of(networks)
    with torch.inference_mode():
        expected = plainly(networks, text, bank, table, noise, guidance)
        *before, x = denoise(networks, text, bank, table, noise, frames=3, guidance=guidance)
    assert len(before) == 4
    assert torch.equal(x, expected)


class Recorder:
    """Does what a graph does: the first step of a key is all that it ever runs."""

    def __init__(self) -> None:
        self.steps: dict[Hashable, Callable[[], None]] = {}

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        self.steps.setdefault(key, step)()

    def forget(self) -> None:
        self.steps.clear()


def test_a_recorded_step_serves_every_micro_batch_of_its_shape(model: tuple[Networks, Tokenizers]) -> None:
    recorder = Recorder()
    networks = replace(model[0], run_step=recorder)
    buffers = LoopBuffers(networks)
    drawn = []
    for name, steps, guidance in (("ddim", 3, 5.0), ("euler", 4, 2.0)):
        table = build_sampler(name, steps)
        noise = draw_noise(steps, 8, 8, table)
        loop = LoopInputs.upload(table, noise, guidance, networks.device)
        for references in (None, bank_of(networks)):
            for frames in (3, 2):
                text = bound_text(model, frames, True)
                with torch.inference_mode():
                    bank = buffers.take_bank(3)
                    bank.clear()
                    if references:
                        for channels, kv in references.ref_kv.items():
                            bank.ref_kv[channels].copy_(kv)
                        bank.ref_length.copy_(references.ref_length)
                    state = buffers.take_state(loop.shape(frames))
                    state.load(loop, text, bank)
                    for _ in range(loop.calls):
                        state.advance()
                    expected = plainly(
                        model[0], text, references or ReferenceBank.empty(networks), table, noise, guidance
                    )
                assert torch.equal(state.x, expected)
                drawn.append(state.x.clone())
                buffers.give_state(state)
                buffers.give_bank(3, bank)
    assert len(recorder.steps) == 2  # one per number of frames
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 8


def test_other_addresses_are_another_key(model: tuple[Networks, Tokenizers]) -> None:
    recorder = Recorder()
    networks = replace(model[0], run_step=recorder)
    table = build_sampler("ddim", 1)
    loop = LoopInputs.upload(table, draw_noise(0, 8, 8, table), 5.0, networks.device)
    text, banks = bound_text(model, 2, True), [bank_of(networks), bank_of(networks), bank_of(networks, 2)]
    states = [DenoisingState(networks, loop.shape(2)) for _ in range(2)]
    for state, bank in ((states[0], 0), (states[0], 1), (states[1], 1), (states[0], 2), (states[0], 0)):
        with torch.inference_mode():
            state.load(loop, text, banks[bank])
            state.advance()
    assert len(recorder.steps) == 4


def test_what_is_reused_belongs_to_one_user_at_a_time_and_is_bounded() -> None:
    made: list[str] = []

    def take(key: str) -> str:
        return reusable.take(key, lambda: made.append(key) or f"{key}{len(made)}")

    reusable: Reusable[str, str] = Reusable(limit=2)
    assert [take("a"), take("a")] == ["a1", "a2"]
    for key, value in (("a", "a1"), ("b", "b"), ("a", "a2"), ("c", "c")):
        reusable.give(key, value)
    assert [take("a"), take("b"), take("c")] == ["a2", "b3", "c"]
    reusable.give("c", "c")
    reusable.clear()
    assert take("c") == "c4"
