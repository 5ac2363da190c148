"""The reference bank: what is projected, and how often."""

import pytest
import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.opening import open_networks
from storyadapter.model.networks import Networks
from storyadapter.runtime.jobs import References
from storyadapter.runtime.reference_bank import ReferenceBank, project
from tests.storyadapter.runtime.replaced import counting


@pytest.fixture(scope="module")
def networks(checkpoint: Checkpoint) -> Networks:
    return open_networks(checkpoint)


@pytest.fixture(scope="module")
def embeddings(networks: Networks) -> torch.Tensor:
    width = networks.geometry.image_embedding_width
    return torch.randn(5, width, generator=torch.Generator().manual_seed(0))


def test_each_picture_has_its_own_four_tokens_in_story_order(networks: Networks, embeddings: torch.Tensor) -> None:
    row = project(networks, embeddings, 0.5)
    assert row.length == 20
    for width in networks.geometry.widths:
        assert row.kv[width.channels].shape == (width.layers, 2, 20, width.channels)
    for index in range(5):
        alone = project(networks, embeddings[index : index + 1], 0.5)
        for channels, kv in row.kv.items():
            torch.testing.assert_close(kv[:, :, 4 * index : 4 * index + 4], alone.kv[channels])


def test_the_scale_is_folded_into_the_values_alone(networks: Networks, embeddings: torch.Tensor) -> None:
    whole, half = (project(networks, embeddings, scale) for scale in (1.0, 0.5))
    for channels, kv in whole.kv.items():
        torch.testing.assert_close(half.kv[channels][:, 0], kv[:, 0])
        torch.testing.assert_close(half.kv[channels][:, 1], 0.5 * kv[:, 1])


def test_the_unconditional_row_is_one_all_zero_embedding(networks: Networks, embeddings: torch.Tensor) -> None:
    references = References(tuple("abcde"), embeddings)
    story, unconditional, nothing = ReferenceBank(networks).take([(0.4, references), (0.4, None), (None, None)])
    expected = project(networks, torch.zeros_like(embeddings[:1]), 0.4)
    assert (story.length, unconditional.length, nothing.length) == (20, 4, 1)
    for channels, kv in unconditional.kv.items():
        assert torch.equal(kv, expected.kv[channels])
        assert torch.equal(story.kv[channels], project(networks, embeddings, 0.4).kv[channels])
    assert nothing.kv == {}


def test_references_are_projected_once_for_all_that_attend_to_them(
    networks: Networks, embeddings: torch.Tensor
) -> None:
    counted, counts = counting(networks, "reference_projection")
    bank = ReferenceBank(counted)
    story = References(("a", "b"), embeddings[:2])
    for _ in range(3):
        rows = bank.take([(0.4, story), (0.4, None), (0.4, story), (0.4, None)])
        assert rows[0] is rows[2] and rows[1] is rows[3]
    assert counts == {"reference_projection": 2, "reference_projection rows": 2 + 1}
    others = [References((str(number),), embeddings[:1]) for number in range(6)]
    for other in others:
        bank.take([(0.4, other)])
    assert bank.take([(0.4, story)])[0] is not rows[0]  # what wasn't used for long is projected again
    bank.forget()
    calls = counts["reference_projection"]
    bank.take([(0.4, story)])
    assert counts["reference_projection"] == calls + 1
