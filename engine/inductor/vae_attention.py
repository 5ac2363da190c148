"""The VAE's self-attention as matrix products, for which PyTorch has no fused kernel that is fast.

Its one head is as wide as the layer, 512 in SDXL, where fused attention for a GPU's matrix units ends at 256: PyTorch
falls back to a kernel that takes … of a frame's decoding. Plain matrix products run at their full rate, and a part of
the queries at a time keeps the scores small.
"""

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from storyadapter.modules import VaeDecoder

# At 1024x1024 the scores of one part are 128 MiB; there are never fewer tokens, as pictures are multiples of 32 pixels.
PARTS = 8


class PictureAttention(nn.Module):
    """Self-attention of one head over all positions of a picture, with its norm and its residual connection."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.group_norm = attention.group_norm
        projections = (attention.to_q, attention.to_k, attention.to_v)
        self.weight = nn.Parameter(torch.cat([part.weight for part in projections]).detach(), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([part.bias for part in projections]).detach(), requires_grad=False)
        self.to_out = attention.to_out[0]

    def forward(self, hidden_states: Tensor, temb: None = None) -> Tensor:
        """hidden_states [F, C, h, w] → [F, C, h, w]; the argument names are those by which diffusers calls it."""
        frames, channels, height, width = hidden_states.shape
        tokens = self.group_norm(hidden_states).permute(0, 2, 3, 1).reshape(frames, height * width, channels)
        q, k, v = functional.linear(tokens, self.weight, self.bias).chunk(3, dim=-1)
        keys = k.transpose(1, 2)
        out = []
        for queries in q.unflatten(1, (PARTS, -1)).unbind(1):
            weights = torch.softmax(_scores(queries * channels**-0.5, keys), dim=-1).to(v.dtype)
            out.append(torch.bmm(weights, v))
        result = self.to_out(torch.cat(out, dim=1)).view(frames, height, width, channels)
        return result.permute(0, 3, 1, 2) + hidden_states


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """[F, S/8, C], [F, C, S] → [F, S/8, S] fp32: rounded to bf16, a score of 50 would be off by a tenth."""
    if queries.is_cuda and queries.dtype != torch.float32:
        return torch.bmm(queries, keys, out_dtype=torch.float32)
    return torch.bmm(queries, keys).float()


def fuse_vae(decoder: VaeDecoder) -> None:
    """Rewrite the attention of a VAE's decoder in place.

    Raises:
        ValueError: an attention that isn't that of SDXL's VAE.
    """
    found = [(name, part) for name, part in decoder.named_modules() if isinstance(part, Attention)]
    for name, attention in found:
        plain = attention.heads == 1 and attention.group_norm is not None and attention.to_q.bias is not None
        if not plain or not attention.residual_connection or attention.rescale_output_factor != 1:
            raise ValueError(f"{name} isn't the attention of SDXL's VAE; expected one head with a norm and a residual")
        parent, _, child = name.rpartition(".")
        decoder.get_submodule(parent).register_module(child, PictureAttention(attention))
