"""SDXL's networks under the names of the original single file: the reverse of what the checkpoint reads."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def single_file(
    unet: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module, vae: nn.Module
) -> dict[str, Tensor]:
    """All tensors of an SDXL base model in one file."""
    text = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in text_encoder.state_dict().items()}
    return {
        **_prefixed("model.diffusion_model.", original_unet(unet)),
        **_prefixed("conditioner.embedders.0.transformer.", text),
        **_prefixed("conditioner.embedders.1.model.", open_clip(text_encoder_2)),
        **_prefixed("first_stage_model.", original_vae(vae)),
    }


def original_unet(unet: nn.Module) -> dict[str, Tensor]:
    per_block = unet.config.layers_per_block + 1
    attends = ["CrossAttn" in kind for kind in unet.config.get("up_block_types", ())]

    def block(name: str) -> str:
        down = re.match(r"down_blocks\.(\d+)\.(\w+)\.(\d+)", name)
        up = re.match(r"up_blocks\.(\d+)\.(\w+)\.(\d+)", name)
        mid = re.match(r"mid_block\.(\w+)\.(\d+)", name)
        if down:
            i, part, j = int(down[1]), down[2], int(down[3])
            new = {
                "resnets": f"input_blocks.{1 + i * per_block + j}.0",
                "attentions": f"input_blocks.{1 + i * per_block + j}.1",
                "downsamplers": f"input_blocks.{(i + 1) * per_block}.0",
            }[part]
            return (
                new + name[down.end() :].replace(".conv.", ".op.")
                if part == "downsamplers"
                else new + name[down.end() :]
            )
        if up:
            i, part, j = int(up[1]), up[2], int(up[3])
            new = {
                "resnets": f"output_blocks.{i * per_block + j}.0",
                "attentions": f"output_blocks.{i * per_block + j}.1",
                "upsamplers": f"output_blocks.{(i + 1) * per_block - 1}.{2 if attends[i] else 1}",
            }[part]
            return new + name[up.end() :]
        if mid:
            return f"middle_block.{1 if mid[1] == 'attentions' else 2 * int(mid[2])}" + name[mid.end() :]
        return _replaced(name, _UNET_ENDS)

    def rename(name: str) -> str:
        return block(_replaced(name, _RESNET) if ".resnets." in name else name)

    return _renamed(unet, rename)


def original_controlnet(controlnet: nn.Module) -> dict[str, Tensor]:
    own = {
        r"controlnet_cond_embedding\.conv_in": lambda m: "input_hint_block.0",
        r"controlnet_cond_embedding\.blocks\.(\d+)": lambda m: f"input_hint_block.{2 * int(m[1]) + 2}",
        r"controlnet_cond_embedding\.conv_out": lambda m: "input_hint_block.14",
        r"controlnet_down_blocks\.(\d+)": lambda m: f"zero_convs.{m[1]}.0",
        r"controlnet_mid_block": lambda m: "middle_block_out.0",
    }

    def rename(name: str) -> str:
        for pattern, new in own.items():
            name = re.sub(rf"^{pattern}\.", lambda m, new=new: f"{new(m)}.", name)
        return name

    renamed = zip(controlnet.state_dict(), original_unet(controlnet).items(), strict=True)
    return {rename(name) if name.startswith("controlnet_") else other: tensor for name, (other, tensor) in renamed}


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1

    def rename(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        return _replaced(name, attention if ".attn_1." in name else {"conv_shortcut": "nin_shortcut"})

    tensors = _renamed(vae, rename)
    # The attention's matrices are 1x1 convolutions there.
    return {name: t[:, :, None, None] if ".attn_1." in name and t.ndim == 2 else t for name, t in tensors.items()}


def open_clip(text_encoder: nn.Module) -> dict[str, Tensor]:
    import torch

    state = text_encoder.state_dict()
    result = {"text_projection": state.pop("text_projection.weight").T.contiguous(), "logit_scale": torch.tensor(4.6)}
    for name, tensor in state.items():
        if projection := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            result[f"transformer.resblocks.{projection[1]}.attn.in_proj_{projection[2]}"] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            result[_replaced(name, _OPEN_CLIP)] = tensor
    return result


def _renamed(network: nn.Module, rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): t for name, t in network.state_dict().items()}


def _replaced(name: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: t.contiguous() for name, t in tensors.items()}
