"""Training rows of the UNet: references resemble the target as asked, masks and λ are what they say."""

import pytest
import torch

from storyadapter.demo.training.dataset import WorldSize
from storyadapter.demo.training.rows import SLOTS, RowDraw, Rows
from storyadapter.demo.vocabulary import TRAITS

WORLD = WorldSize(visible=5, identities=12, views=3)
BATCH = 400


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Every picture's latents, embedding and caption hold its own number."""
    torch.manual_seed(0)
    count = WORLD.pictures
    labels = torch.stack([torch.randint(len(values), (count,)) for values in TRAITS.values()], 1)
    labels = labels.view(-1, WORLD.views, len(TRAITS))[:, :1].expand(-1, WORLD.views, -1).reshape(count, -1)
    number = torch.arange(1, count + 1)
    draw = RowDraw(
        WORLD,
        BATCH,
        latents=number.float()[:, None, None, None].expand(-1, 4, 2, 2),
        embeddings=number.float()[:, None, None].expand(-1, 2, 6),
        tokens=number[:, None, None, None].expand(-1, 2, 2, 77),
        dropped=torch.zeros(2, 2, 77, dtype=torch.long),
        labels=labels,
    )
    draw._noise = 0.0  # so that a reference's number can be read
    return draw()


def test_shapes(rows: Rows) -> None:
    assert rows.latents.shape == (BATCH, 4, 2, 2) and rows.tokens.shape == (BATCH, 2, 77)
    assert rows.references.shape == (BATCH, SLOTS, 6)
    assert rows.mask.shape == (BATCH, 1, 1, 4 * SLOTS) and rows.scale.shape == (BATCH, 1, 1)


def test_every_row_has_a_reference_and_every_number_of_them_occurs(rows: Rows) -> None:
    per_image = rows.mask[:, 0, 0].unflatten(-1, (SLOTS, 4))
    assert (per_image.all(-1) == per_image.any(-1)).all()
    assert set(per_image[..., 0].sum(-1).tolist()) == set(range(1, SLOTS + 1))


def test_captions_tell_the_target_and_unconditional_rows_have_no_references(rows: Rows) -> None:
    free = rows.tokens[:, 0, 0] == 0
    assert 0.05 < free.float().mean() < 0.2
    assert (rows.tokens[~free, 0, 0] == rows.latents[~free, 0, 0, 0]).all()
    assert (rows.references[free] == 0).all() and (rows.references[~free] > 0).all()


def test_scale_is_none_or_between_the_methods_bounds(rows: Rows) -> None:
    scale = rows.scale.flatten()
    assert 0.15 < (scale == 0).float().mean() < 0.35
    assert (scale[scale > 0] >= 0.3).all() and (scale <= 1).all()


def test_references_range_from_all_the_same_character_to_none(rows: Rows) -> None:
    shown = rows.tokens[:, 0, 0] > 0
    target = (rows.latents[shown, 0, 0, 0] - 1) // WORLD.views
    who = (rows.references[shown, :, 0] - 1) // WORLD.views
    same = (who == target[:, None]).float().mean(1)
    assert (same == 1).any() and (same <= 0.25).any() and 0.2 < same.mean() < 0.95
    kind = who // WORLD.identities == (target // WORLD.identities)[:, None]
    assert 0.8 < kind.float().mean() < 1  # a few guests of other kinds
