"""The reference bank: what is projected, how it is packed, and what an empty one does."""

import pytest
import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine import open_networks
from storyadapter.model.networks import Networks
from storyadapter.runtime.reference_bank import ReferenceBank, bank_rows


@pytest.fixture(scope="module")
def networks(checkpoint: Checkpoint) -> Networks:
    return open_networks(checkpoint)


@pytest.fixture(scope="module")
def embeddings(networks: Networks) -> torch.Tensor:
    width = networks.geometry.image_embedding_width
    return torch.randn(5, width, generator=torch.Generator().manual_seed(0))


def test_rows_hold_the_story_and_one_unconditional_reference(networks: Networks, embeddings: torch.Tensor) -> None:
    bank = ReferenceBank.project(networks, embeddings, 1.0)
    nothing = ReferenceBank.project(networks, torch.zeros_like(embeddings[:1]), 1.0)
    assert bank.ref_length.tolist() == [4, 20]
    for width in networks.geometry.widths:
        kv = bank.ref_kv[width.channels]
        assert kv.shape == (width.layers, 2, 2, 20, width.channels)
        assert kv.is_contiguous()
        torch.testing.assert_close(kv[:, 0, :, :4], nothing.ref_kv[width.channels][:, 1])
        assert not kv[:, 0, :, 4:].any()  # padding is zeros


def test_each_picture_has_its_own_four_tokens_in_story_order(networks: Networks, embeddings: torch.Tensor) -> None:
    bank = ReferenceBank.project(networks, embeddings, 0.5)
    for index in range(5):
        alone = ReferenceBank.project(networks, embeddings[index : index + 1], 0.5)
        for channels, kv in bank.ref_kv.items():
            torch.testing.assert_close(kv[:, 1, :, 4 * index : 4 * index + 4], alone.ref_kv[channels][:, 1])


def test_the_scale_is_folded_into_the_values_alone(networks: Networks, embeddings: torch.Tensor) -> None:
    whole, half = (ReferenceBank.project(networks, embeddings, scale) for scale in (1.0, 0.5))
    for channels, kv in whole.ref_kv.items():
        torch.testing.assert_close(half.ref_kv[channels][:, :, 0], kv[:, :, 0])
        torch.testing.assert_close(half.ref_kv[channels][:, :, 1], 0.5 * kv[:, :, 1])


def test_an_empty_bank_is_one_zero_token_per_row(networks: Networks, embeddings: torch.Tensor) -> None:
    used = ReferenceBank.project(networks, embeddings, 0.5)
    used.clear()
    for bank, references in ((ReferenceBank.empty(networks), 1), (used, 5)):
        assert bank.ref_length.tolist() == [1, 1]
        for width in networks.geometry.widths:
            assert bank.ref_kv[width.channels].shape == (width.layers, 2, 2, 4 * references, width.channels)
            assert not bank.ref_kv[width.channels].any()


def test_a_bank_that_is_filled_again_stays_where_it_is(networks: Networks, embeddings: torch.Tensor) -> None:
    bank = ReferenceBank.project(networks, embeddings, 0.5)
    addresses = [tensor.data_ptr() for tensor in (bank.ref_length, *bank.ref_kv.values())]
    for kv in bank.ref_kv.values():
        kv.fill_(7)
    bank.fill(networks, embeddings.flip(0), 0.3)
    fresh = ReferenceBank.project(networks, embeddings.flip(0), 0.3)
    assert torch.equal(bank.ref_length, fresh.ref_length)
    assert all(torch.equal(kv, fresh.ref_kv[channels]) for channels, kv in bank.ref_kv.items())
    assert [tensor.data_ptr() for tensor in (bank.ref_length, *bank.ref_kv.values())] == addresses


def test_unconditional_rows_come_first(networks: Networks) -> None:
    assert bank_rows(3, True, networks.device).tolist() == [0, 0, 0, 1, 1, 1]
    assert bank_rows(3, False, networks.device).tolist() == [1, 1, 1]
