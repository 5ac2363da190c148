"""The loop: what a step computes, and that it always does so at the same addresses."""

from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from storyadapter import Checkpoint
from storyadapter.engine.opening import open_networks
from storyadapter.method.constants import NEGATIVE_PROMPT
from storyadapter.method.noise import draw_noise
from storyadapter.method.sampler import build_sampler, scale_input, step, timestep_at
from storyadapter.model.contract import ref_kv_name, text_kv_name
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import TextCache, Tokenizers
from storyadapter.runtime.denoising import FrameRows, SamplerInputs, StatePool, denoise
from storyadapter.runtime.jobs import References, TextGroup
from storyadapter.runtime.reference_bank import ReferenceBank
from tests.storyadapter.runtime.replaced import counting

PROMPTS = ("a fox", "an owl in the snow", "a bear")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> tuple[Networks, Tokenizers]:
    return open_networks(checkpoint), Tokenizers(*checkpoint.load_tokenizers())


def rows_of(
    model: tuple[Networks, Tokenizers],
    prompts: tuple[str, ...],
    sampler: SamplerInputs,
    guidance: float | None,
    references: int = 3,
    scale: float | None = 0.4,
    negative: str = NEGATIVE_PROMPT,
) -> list[FrameRows]:
    """What frames of one story read."""
    networks, width = model[0], model[0].geometry.image_embedding_width
    group = TextGroup((negative, *prompts), 64, 64)
    drawn = torch.randn(references, width, generator=torch.manual_seed(references))
    attended = References(tuple(map(str, range(references))), drawn) if scale is not None else None
    with torch.inference_mode():
        bad, *texts = TextCache(*model).take([(group, index) for index in range(len(group.texts))], keep=99)
        story, nothing = ReferenceBank(networks).take([(scale, attended), (scale, None)])
    if guidance is None:
        return [FrameRows(text, story, sampler) for text in texts]
    return [FrameRows(text, story, sampler, bad, nothing, guidance) for text in texts]


def sampler_inputs(networks: Networks, name: str, steps: int, seed: int = 0) -> SamplerInputs:
    table = build_sampler(name, steps)
    return SamplerInputs.upload(table, draw_noise(seed, 8, 8, table), networks.device)


def plainly(
    networks: Networks, frames: list[FrameRows], name: str, steps: int, seed: int = 0, tokens: int = 4
) -> Tensor:
    """The loop of one story's frames, [F, 4, h, w], with a fresh tensor for everything; R is at least `tokens`."""
    table = build_sampler(name, steps)
    noise = draw_noise(seed, 8, 8, table)
    guided, count = frames[0].guidance is not None, len(frames)
    texts = [*([frames[0].negative] if guided else []), *(frame.text for frame in frames)]
    bank = [*([frames[0].unconditional] if guided else []), frames[0].references]
    if len(bank) < 2 or bank[0] is bank[1]:
        bank = [bank[-1], bank[-1]]
    own = torch.arange(int(guided), count + int(guided), dtype=torch.int32)
    text_row = torch.cat((torch.zeros(count, dtype=torch.int32), own)) if guided else own
    fixed = {
        "added_embedding": torch.stack([text.added_embedding for text in texts])[text_row],
        "text_row": text_row,
        "ref_row": torch.tensor([0] * (count if guided else 0) + [1] * count, dtype=torch.int32),
        "ref_length": torch.tensor([row.length for row in bank], dtype=torch.int32),
    }
    for width in networks.geometry.widths:
        channels = width.channels
        fixed[text_kv_name(channels)] = torch.stack([text.kv[channels] for text in texts], 1)
        kv = torch.zeros(width.layers, 2, 2, max(tokens, *(row.length for row in bank)), channels)
        for index, row in enumerate(bank):
            if row.kv:
                kv[:, index, :, : row.length] = row.kv[channels]
        fixed[ref_kv_name(channels)] = kv
    coefficients = table.coefficients()
    x = table.initial_latents(noise.initial).expand(count, -1, -1, -1).contiguous()
    x0 = torch.zeros_like(x)
    for call in range(table.calls):
        index = torch.tensor([call])
        latents = scale_input(coefficients, index, x)
        latents = torch.cat((latents, latents)) if guided else latents
        timestep = timestep_at(coefficients, index).repeat(len(latents))
        output = networks["denoiser"]({"latents": latents, "timestep": timestep, **fixed})["noise"]
        if guided:
            unconditional, conditional = output.chunk(2)
            here = frames[0].guided_calls is None or call in frames[0].guided_calls
            output = unconditional + (frames[0].guidance if here else 1.0) * (conditional - unconditional)
        x, x0 = step(coefficients, index, x, output, x0, noise.per_step[call] if len(noise.per_step) else None)
    return x


@pytest.mark.parametrize("calls", [range(1, 3), range(0, 4), range(5, 5)])
def test_calls_outside_the_guidance_interval_have_half_the_rows(
    model: tuple[Networks, Tokenizers], calls: range
) -> None:
    networks, counts = counting(model[0], "denoiser")
    frames = [
        replace(frame, guided_calls=calls) for frame in rows_of(model, PROMPTS, sampler_inputs(networks, "lcm", 5), 7.3)
    ]
    with torch.inference_mode():
        *_, x = denoise(networks, frames)
        expected = plainly(model[0], frames, "lcm", 5)
        everywhere = plainly(model[0], [replace(frame, guided_calls=None) for frame in frames], "lcm", 5)
    assert counts["denoiser rows"] == 3 * (5 + len(calls))
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert (x - everywhere).abs().max() > 2e-4 * float(expected.abs().max())


def test_an_interval_of_all_steps_changes_no_bit(model: tuple[Networks, Tokenizers]) -> None:
    frames = rows_of(model, PROMPTS, sampler_inputs(model[0], "ddim", 3), 5.0)
    with torch.inference_mode():
        *_, plain = denoise(model[0], frames)
        *_, x = denoise(model[0], [replace(frame, guided_calls=range(3)) for frame in frames])
    assert torch.equal(x, plain)


@pytest.mark.parametrize("guidance", [None, 7.3])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "lcm"])
def test_it_computes_what_the_plain_loop_computes(
    model: tuple[Networks, Tokenizers], name: str, guidance: float | None
) -> None:
    networks = model[0]
    frames = rows_of(model, PROMPTS, sampler_inputs(networks, name, 5), guidance)
    with torch.inference_mode():
        *before, x = denoise(networks, frames)
        expected = plainly(networks, frames, name, 5)
    assert len(before) == 4
    assert torch.equal(x, expected)


@pytest.mark.parametrize("guided", [False, True])
def test_frames_of_several_stories_in_one_batch_are_what_each_is_alone(
    model: tuple[Networks, Tokenizers], guided: bool
) -> None:
    """Other prompts, negative prompts, seeds, guidance, λ and numbers of references, and one without any."""
    networks = model[0]
    stories = [
        (("a fox", "an owl in the snow"), 0, 7.3, 3, 0.4, "fog"),
        (("a bear",), 5, 2.0, 5, 0.5, "snow"),
        (("a wolf",), 6, 4.0, 1, None, "fog"),
    ]
    frames, expected = [], []
    for prompts, seed, guidance, references, scale, negative in stories:
        sampler = sampler_inputs(networks, "lcm", 3, seed)
        rows = rows_of(model, prompts, sampler, guidance if guided else None, references, scale, negative)
        frames += rows
        with torch.inference_mode():
            expected.append(plainly(networks, rows, "lcm", 3, seed))
    with torch.inference_mode():
        *_, x = denoise(networks, frames)
    torch.testing.assert_close(x, torch.cat(expected), rtol=1e-3, atol=1e-3)


class Recorder:
    """Does what a graph does: the first step of a key is all that it ever runs."""

    def __init__(self) -> None:
        self.steps: dict[Hashable, Callable[[], None]] = {}

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        self.steps.setdefault(key, step)()

    def forget(self) -> None:
        self.steps.clear()


def test_a_recorded_step_serves_every_batch_of_its_shape(model: tuple[Networks, Tokenizers]) -> None:
    recorder = Recorder()
    networks = replace(model[0], run_step=recorder, padding_is_free=True)
    states = StatePool(networks)
    drawn = []
    for name, steps, guidance in (("ddim", 3, 5.0), ("euler", 4, 2.0)):
        sampler = sampler_inputs(networks, name, steps, seed=steps)
        for scale in (None, 0.4):
            for count in (3, 2):
                frames = rows_of(model, PROMPTS[:count], sampler, guidance, scale=scale)
                with torch.inference_mode():
                    state = states.take(frames, references=3)
                    state.load(frames)
                    for _ in range(sampler.calls):
                        state.advance()
                    expected = plainly(model[0], frames, name, steps, seed=steps, tokens=16)
                assert torch.equal(state.x, expected)
                drawn.append(state.x.clone())
                states.give(state)
    assert len(recorder.steps) == 2  # one per number of frames
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 8


def test_buffers_belong_to_one_user_at_a_time_and_grow_for_all(model: tuple[Networks, Tokenizers]) -> None:
    networks = replace(model[0], padding_is_free=True)
    states, sampler = StatePool(networks), sampler_inputs(networks, "ddim", 1)
    few, many = (rows_of(model, PROMPTS[:1], sampler, 5.0, references=count) for count in (1, 9))
    one, other = states.take(few), states.take(few)
    address = ref_kv_name(networks.geometry.widths[0].channels)
    assert one is not other and one.inputs[address].data_ptr() != other.inputs[address].data_ptr()
    states.give(one)
    assert states.take(few) is one
    states.give(one)
    larger = states.take(many)
    assert larger is not one and larger.inputs[address].shape[3] == 64
    states.give(larger)
    assert states.take(few) is larger  # there is room for less
    states.give(larger)
    states.clear()
    assert states.take(few) is not larger


def test_where_padding_takes_time_there_is_none(model: tuple[Networks, Tokenizers]) -> None:
    states, sampler = StatePool(model[0]), sampler_inputs(model[0], "ddim", 1)
    for references in (1, 9, 5):
        state = states.take(rows_of(model, PROMPTS[:1], sampler, 5.0, references=references))
        assert {kv.shape[3] for name, kv in state.inputs.items() if name.startswith("ref_kv")} == {4 * references}
        states.give(state)
