"""The training's attention computes what diffusers' IP-Adapter computes."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

from storyadapter.demo.training.attention import ReferenceAttention, attach
from storyadapter.demo.training.networks import TINY, build


def test_one_layer_agrees_with_diffusers() -> None:
    torch.manual_seed(0)
    model = build(TINY)
    name = next(n for n in model.unet.attn_processors if n.endswith("attn2.processor"))
    layer = model.unet.get_submodule(name.removesuffix(".processor"))
    pair = model.adapter.ip_adapter["1"]
    theirs = IPAdapterAttnProcessor2_0(layer.to_q.in_features, TINY.cross_width, num_tokens=(8,), scale=0.4)
    theirs.to_k_ip[0].load_state_dict(pair["to_k_ip"].state_dict())
    theirs.to_v_ip[0].load_state_dict(pair["to_v_ip"].state_dict())
    hidden, text = torch.randn(2, 16, layer.to_q.in_features), torch.randn(2, 77, TINY.cross_width)
    references = torch.randn(2, 8, TINY.cross_width)
    with torch.no_grad():
        ours = ReferenceAttention(pair)(
            layer, hidden, text, references=references, reference_scale=torch.tensor(0.4).view(1, 1, 1)
        )
        expected = theirs(layer, hidden, (text, [references[:, None]]))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def _call(unet: UNet2DConditionModel, **extra: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    size = TINY.pixels // 8
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, size, size),
            torch.tensor(500),
            encoder_hidden_states=torch.randn(2, 77, TINY.cross_width),
            added_cond_kwargs={"text_embeds": torch.randn(2, TINY.embedding_width), "time_ids": torch.ones(2, 6)},
            cross_attention_kwargs=extra or None,
        ).sample


def test_a_scale_of_zero_is_the_plain_unet_and_masked_references_are_not_seen() -> None:
    torch.manual_seed(0)
    model = build(TINY)
    plain = _call(model.unet)
    attach(model.unet, model.adapter)
    references = torch.randn(2, 8, TINY.cross_width)
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    zero, full = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    seen = {"references": references, "reference_mask": mask, "reference_scale": full}
    torch.testing.assert_close(_call(model.unet, **(seen | {"reference_scale": zero})), plain, rtol=1e-4, atol=1e-5)
    assert (_call(model.unet, **seen) - plain).abs().max() > 1e-3
    mask[..., 4:] = False
    short = {"references": references[:, :4], "reference_mask": mask[..., :4], "reference_scale": full}
    torch.testing.assert_close(_call(model.unet, **seen), _call(model.unet, **short), rtol=1e-4, atol=1e-5)
