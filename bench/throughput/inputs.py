"""What all rungs of a case share: text and image embeddings, noise, sampler; made once, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from torch import Tensor

from storyadapter.bench.throughput.cases import Case
from storyadapter.method import constants
from storyadapter.method.noise import Noise, draw_noise
from storyadapter.method.sampler import SamplerTable, build_sampler
from storyadapter.model.contract import text_kv_name
from storyadapter.model.networks import Networks
from storyadapter.runtime.conditioning import TextRow, Tokenizers
from storyadapter.runtime.denoising import FrameRows, SamplerInputs
from storyadapter.runtime.reference_bank import project

SCALE: Final = 0.4  # λ, the middle of the published schedule
SEED: Final = 0
TIMED_STEPS: Final = constants.STEPS  # of the loop that is timed step by step
_WORDS: Final = (
    "fox",
    "owl",
    "forest",
    "river",
    "castle",
    "snow",
    "night",
    "boat",
    "garden",
    "mountain",
    "soup",
    "lamp",
)


def prompts(count: int) -> list[str]:
    """As many different prompts."""
    random = Random(SEED)
    return [f"a {' and a '.join(random.sample(_WORDS, 4))}, frame {index}" for index in range(count)]


def image_embeddings(networks: Networks, count: int) -> Tensor:
    """[count, width], drawn instead of encoded: an image encoder of random weights hardly tells pictures apart, and a
    comparison in which all references are the same would not miss one."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(count, networks.geometry.image_embedding_width, generator=generator)
    return drawn.to(networks.device, networks.dtype("denoiser"))


@dataclass(frozen=True, eq=False)
class TextInputs:
    """Encoded prompts, the negative prompt first, then one per frame: P of them, on the networks' device.

    text_embedding, text_embedding_2: [P, T, width]; pooled_text: [P, width]; sizes: [P, 6] fp32.
    """

    text_embedding: Tensor
    text_embedding_2: Tensor
    pooled_text: Tensor
    sizes: Tensor


def encode_prompts(
    networks: Networks, tokenizers: Tokenizers, texts: Sequence[str], height: int, width: int
) -> TextInputs:
    """Run the two text encoders."""
    ids, ids_2 = (ids.to(networks.device) for ids in tokenizers.input_ids(texts))
    second = networks["text_encoder_2"]({"input_ids": ids_2})
    size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=networks.device)
    return TextInputs(
        networks["text_encoder"]({"input_ids": ids})["text_embedding"].clone(),
        second["text_embedding_2"].clone(),
        second["pooled_text"].clone(),
        size.repeat(len(texts), 1),
    )


@dataclass(frozen=True, eq=False)
class CaseInputs:
    """Inputs of one case, in the precision of the networks and on their device."""

    case: Case  # the case
    text: TextInputs  # of its F frames
    image_embedding: Tensor  # [N, width]
    table: SamplerTable  # of the drawings that are compared
    timed_table: SamplerTable  # of the loop that is timed
    noise: Noise  # raw, shared by all frames


def make_inputs(
    networks: Networks, tokenizers: Tokenizers, cases: Sequence[Case], prediction_type: str
) -> dict[str, CaseInputs]:
    """The inputs of every case by its name."""
    embeddings = image_embeddings(networks, max(case.references for case in cases))
    made = {}
    for case in cases:
        texts = [constants.NEGATIVE_PROMPT, *prompts(case.frames)]
        with torch.inference_mode():
            text = encode_prompts(networks, tokenizers, texts, case.height, case.width)
        table = build_sampler(constants.SCHEDULER, case.check_steps, prediction_type=prediction_type)
        scale = networks.geometry.pixels_per_latent
        made[case.name] = CaseInputs(
            case,
            text,
            embeddings[: case.references],
            table,
            build_sampler(constants.SCHEDULER, TIMED_STEPS, prediction_type=prediction_type),
            draw_noise(SEED, case.height // scale, case.width // scale, table),
        )
    return made


def bind(networks: Networks, inputs: CaseInputs, table: SamplerTable) -> list[FrameRows]:
    """What all frames of a case read in the contract's UNet calls, by these networks' own projections."""
    text = inputs.text
    outputs = networks["text_projection"](
        {
            "text_embedding": text.text_embedding,
            "text_embedding_2": text.text_embedding_2,
            "pooled_text": text.pooled_text,
            "sizes": text.sizes,
        }
    )
    kv = {width.channels: outputs[text_kv_name(width.channels)].clone() for width in networks.geometry.widths}
    added = outputs["added_embedding"].clone()
    negative, *prompted = (
        TextRow({channels: value[:, row] for channels, value in kv.items()}, added[row]) for row in range(len(added))
    )
    story = project(networks, inputs.image_embedding, SCALE)
    nothing = project(networks, torch.zeros_like(inputs.image_embedding[:1]), SCALE)
    sampler = SamplerInputs.upload(table, inputs.noise, networks.device)
    return [FrameRows(prompt, story, sampler, negative, nothing, constants.GUIDANCE) for prompt in prompted]
