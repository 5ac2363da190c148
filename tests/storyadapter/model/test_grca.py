"""The operator's reference implementation against its definition in fp64, and its promises."""

import math

import pytest
import torch
from torch import Tensor

from storyadapter.model.grca import grca


def inputs(rows: int = 4, tokens: int = 9, heads: int = 2, head_size: int = 32, references: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = heads * head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        normal(rows, tokens, heads, head_size),
        normal(3, 2, 77, channels),
        torch.tensor([0, 1, 2, 0], dtype=torch.int32)[:rows],
        normal(2, 2, references, channels),
        torch.tensor([0, 1, 1, 0], dtype=torch.int32)[:rows],
        torch.tensor([4, references], dtype=torch.int32),
    ]


def definition(q: Tensor, text_kv: Tensor, text_row: Tensor, ref_kv: Tensor, ref_row: Tensor, length: Tensor) -> Tensor:
    """Row by row and head by head, in fp64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            part = slice(head * q.shape[3], (head + 1) * q.shape[3])
            for kv, keys in (
                (text_kv[text_row[row]], text_kv.shape[2]),
                (ref_kv[ref_row[row]], int(length[ref_row[row]])),
            ):
                k, v = kv[:, :keys, part].double()
                scores = q[row, :, head].double() @ k.T / math.sqrt(q.shape[3])
                out[row, :, head] += scores.softmax(-1) @ v
    return out


@pytest.mark.parametrize("references", [4, 8, 65])
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_computes_the_definition(tokens: int, references: int) -> None:
    arguments = inputs(tokens=tokens, references=references)
    expected = definition(*arguments)
    assert (grca(*arguments) - expected).norm() / expected.norm() < 1e-6


def test_two_softmaxes_are_not_one() -> None:
    q, text_kv, text_row, ref_kv, ref_row, length = inputs()
    joint = grca(q, torch.cat((text_kv[:2], ref_kv), dim=2), text_row % 2, torch.zeros_like(ref_kv), ref_row, length)
    assert (joint - grca(q, text_kv, text_row, ref_kv, ref_row, length)).norm() > 0.1 * joint.norm()


def test_padding_is_never_read() -> None:
    arguments = inputs()
    expected = grca(*arguments)
    arguments[3][0, :, 4:] = math.nan  # behind the unconditional row's length of 4
    assert torch.equal(grca(*arguments), expected)


def test_references_with_zero_values_add_exactly_nothing() -> None:
    q, text_kv, text_row, _, ref_row, _ = inputs()
    nothing = torch.zeros(2, 2, 1, 64)
    one = torch.ones(2, dtype=torch.int32)
    text_only = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *(t.view(4, 77, 2, 32).transpose(1, 2) for t in text_kv[text_row.long()].unbind(1))
    )
    assert torch.equal(grca(q, text_kv, text_row, nothing, ref_row, one), text_only.transpose(1, 2))


def test_takes_views_of_the_packed_tensors() -> None:
    q, text_kv, text_row, ref_kv, ref_row, length = inputs()
    packed_text, packed_ref = torch.stack((text_kv, text_kv + 1)), torch.stack((ref_kv, ref_kv + 1))
    wide_q = torch.cat((q, q), dim=2)[:, :, :2]
    assert torch.equal(
        grca(wide_q, packed_text[0], text_row, packed_ref[0], ref_row, length),
        grca(q, text_kv, text_row, ref_kv, ref_row, length),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operator_registration(dtype: torch.dtype) -> None:
    arguments = [t.to(dtype) if t.is_floating_point() else t for t in inputs()]
    torch.library.opcheck(torch.ops.storyadapter.grca.default, tuple(arguments))
    assert grca(*arguments).dtype == dtype
