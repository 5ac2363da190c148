"""What all rungs of a case share: text and image embeddings, noise, sampler; made once, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

import numpy as np
import torch
from torch import Tensor

from storyadapter.bench.throughput.cases import Case
from storyadapter.method import constants
from storyadapter.method.control_pictures import ControlPicture
from storyadapter.method.noise import Noise, draw_noise
from storyadapter.method.sampler import SamplerTable, build_sampler
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import Tokenizers, encode_texts, project_texts
from storyadapter.runtime.control import ControlRow, embed_control
from storyadapter.runtime.denoising import FrameRows, SamplerInputs
from storyadapter.runtime.jobs import TextGroup
from storyadapter.runtime.reference_bank import project

SCALE: Final = 0.4  # λ, the middle of the published schedule
SEED: Final = 0
TIMED_STEPS: Final = constants.STEPS  # of the loop that is timed step by step
_WORDS: Final = (
    *("fox", "owl", "forest", "river", "castle", "snow"),
    *("night", "boat", "garden", "mountain", "soup", "lamp"),
)


def prompts(count: int) -> list[str]:
    """As many different prompts."""
    random = Random(SEED)
    return [f"a {' and a '.join(random.sample(_WORDS, 4))}, frame {index}" for index in range(count)]


@dataclass(frozen=True, eq=False)
class CaseInputs:
    """Inputs of one case, in the precision of the networks and on their device."""

    case: Case  # the case
    text: dict[str, Tensor]  # inputs of `text_projection`: the negative prompt's, then those of the F frames
    image_embedding: Tensor  # [N, width]
    table: SamplerTable  # of the drawings that are compared
    timed_table: SamplerTable  # of the loop that is timed
    noise: Noise  # raw, shared by all frames


def make_inputs(
    networks: Networks, tokenizers: Tokenizers, cases: Sequence[Case], prediction_type: str
) -> dict[str, CaseInputs]:
    """The inputs of every case by its name."""
    # drawn instead of encoded: an image encoder of random weights hardly tells pictures apart, and a comparison in
    # which all references are the same would not miss one
    shape = (max(case.references for case in cases), networks.geometry.image_embedding_width)
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    embeddings = embeddings.to(networks.device, networks.dtype("denoiser"))
    made = {}
    for case in cases:
        texts = TextGroup((constants.NEGATIVE_PROMPT, *prompts(case.frames)), case.height, case.width)
        with torch.inference_mode():
            encoded = encode_texts(networks, tokenizers, texts)
        table, timed = (
            build_sampler(constants.SCHEDULER, steps, prediction_type=prediction_type)
            for steps in (case.check_steps, TIMED_STEPS)
        )
        scale = networks.geometry.pixels_per_latent
        noise = draw_noise(SEED, case.height // scale, case.width // scale, table)
        text = {name: tensor.clone() for name, tensor in encoded.items()}
        made[case.name] = CaseInputs(case, text, embeddings[: case.references], table, timed, noise)
    return made


def bind(networks: Networks, inputs: CaseInputs, table: SamplerTable) -> list[FrameRows]:
    """What all frames of a case read in the contract's UNet calls, by these networks' own projections."""
    negative, *prompted = project_texts(networks, inputs.text)
    story = project(networks, inputs.image_embedding, SCALE)
    nothing = project(networks, torch.zeros_like(inputs.image_embedding[:1]), SCALE)
    sampler = SamplerInputs.upload(table, inputs.noise, networks.device)
    rows = [FrameRows(prompt, story, sampler, negative, nothing, constants.GUIDANCE) for prompt in prompted]
    return [replace(row, controls=_controls(networks, inputs.case, n, table)) for n, row in enumerate(rows)]


def _controls(networks: Networks, case: Case, frame: int, table: SamplerTable) -> tuple[ControlRow | None, ...]:
    """A frame's rows of each ControlNet, all of whose pictures differ."""
    rows: list[ControlRow | None] = []
    for index in range(len(networks.geometry.controls)):
        row = None
        if case.controlled:
            values = np.random.default_rng([SEED, frame, index]).integers(
                0, 256, (case.height // 8, case.width // 8, 3)
            )
            pixels = values.astype(np.uint8).repeat(8, 0).repeat(8, 1)
            condition = embed_control(networks, index, ControlPicture(pixels, f"{frame}"))
            row = ControlRow(condition, 1.0, range(table.calls))
        rows.append(row)
    return tuple(rows)
