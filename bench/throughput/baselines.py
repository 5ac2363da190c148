"""What others offer for the same work: diffusers' own IP-Adapter with all N pictures in one list, and TensorRT."""

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from storyadapter.bench.throughput.inputs import SCALE, CaseInputs
from storyadapter.bench.throughput.published import denoise_with, text_rows
from storyadapter.bench.throughput.rungs import Rung, Steps, contract_steps
from storyadapter.bench.throughput.workbench import Workbench
from storyadapter.checkpoint import IPAdapterWeights
from storyadapter.checkpoint.ip_adapter import cross_attentions
from storyadapter.method.errors import UnavailableError
from storyadapter.method.sampler import SamplerTable


def _load_ip_adapter(unet: UNet2DConditionModel, adapter: IPAdapterWeights, scale: float) -> None:
    """Give the UNet diffusers' own processors and image projection, as `pipeline.load_ip_adapter` does."""
    index = {layer.module: layer.index for layer in cross_attentions(unet)}
    layers = {}
    for layer in adapter.layers:
        layers[f"{index[layer.module]}.to_k_ip.weight"] = layer.to_k
        layers[f"{index[layer.module]}.to_v_ip.weight"] = layer.to_v
    projection = {
        "proj.weight": adapter.projection_weight,
        "proj.bias": adapter.projection_bias,
        "norm.weight": adapter.norm_weight,
        "norm.bias": adapter.norm_bias,
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [scale]


def _steps(
    unet: UNet2DConditionModel,
    call: Callable[..., tuple[Tensor]],
    inputs: CaseInputs,
    table: SamplerTable,
    frames: range,
) -> Iterator[Tensor]:
    with torch.inference_mode():
        text, pooled, sizes = text_rows(inputs, frames)
        images = inputs.image_embedding.expand(len(frames), -1, -1)
        added = {
            "text_embeds": pooled,
            "time_ids": sizes,
            "image_embeds": [torch.cat((torch.zeros_like(images), images))],
        }

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return call(latents, timestep, text, added_cond_kwargs=added, return_dict=False)[0]

    return denoise_with(predict, inputs, table, frames, unet.dtype)


def _diffusers(workbench: Workbench) -> Steps:
    unet, adapter = workbench.unet("diffusers")
    _load_ip_adapter(unet, adapter, SCALE)
    return functools.partial(_steps, unet, unet)


def _diffusers_compiled(workbench: Workbench) -> Steps:
    if workbench.model.device.type != "cuda":
        raise UnavailableError(
            "this baseline is for CUDA GPUs: on a CPU its compilation takes longer than the benchmark"
        )
    unet, adapter = workbench.unet("diffusers, compiled")
    _load_ip_adapter(unet, adapter, SCALE)
    return functools.partial(_steps, unet, torch.compile(unet, dynamic=False))


def _diffusers_xformers(workbench: Workbench) -> Steps:
    if find_spec("xformers") is None:
        raise UnavailableError("xformers is not installed; type: pip install 'storyadapter-trt[xformers]'")
    if workbench.model.device.type != "cuda":
        raise UnavailableError("xformers needs a CUDA GPU")
    unet, adapter = workbench.unet("diffusers, xformers")
    unet.enable_xformers_memory_efficient_attention()
    _load_ip_adapter(unet, adapter, SCALE)
    return functools.partial(_steps, unet, unet)


def _tensorrt(workbench: Workbench) -> Steps:
    return functools.partial(contract_steps, workbench.networks("tensorrt"))


BASELINES: Final = (
    Rung(
        "diffusers", "diffusers' own IP-Adapter, N pictures in one list, frames in one batch", _diffusers, baseline=True
    ),
    Rung("diffusers-compile", "the same with torch.compile", _diffusers_compiled, baseline=True),
    Rung("diffusers-xformers", "the same with xformers' attention", _diffusers_xformers, baseline=True),
    Rung("tensorrt", "this project's backend tensorrt, step by step", _tensorrt, baseline=True),
)
