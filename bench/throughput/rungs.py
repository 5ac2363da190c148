"""The rungs of the ladder, each of which adds one thing to the one before, with the same weights, inputs and noise; and
what others offer for the same work: diffusers' own IP-Adapter with all N pictures in one list, and TensorRT."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from storyadapter.bench.throughput.inputs import SCALE, CaseInputs, bind
from storyadapter.bench.throughput.published import (
    Attend,
    denoise_with,
    install,
    materialized,
    published_steps,
    text_rows,
)
from storyadapter.bench.throughput.workbench import Workbench
from storyadapter.checkpoint import IPAdapterWeights
from storyadapter.checkpoint.ip_adapter import cross_attentions
from storyadapter.checkpoint.outline import Outline
from storyadapter.method.errors import UnavailableError
from storyadapter.method.sampler import SamplerTable
from storyadapter.model.grca import grca
from storyadapter.model.networks import Networks, run_directly
from storyadapter.model.numerics import NumberFormat
from storyadapter.runtime.denoising import denoise

# Denoises some frames of a case over a sampler's table; yields their state [F, 4, h, w] fp32 after each step, perhaps
# always the same tensor.
Steps = Callable[[CaseInputs, SamplerTable, range], Iterator[Tensor]]


@dataclass(frozen=True)
class Rung:
    """A way to denoise."""

    name: str  # as typed after `--rungs`
    adds: str  # what it has that the rung below has not; or what a baseline is
    # makes the steps; raises UnavailableError where it can't run, with the reason
    prepare: Callable[[Workbench], Steps]
    frame_by_frame: bool = False  # draws one frame at a time
    baseline: bool = False  # not a rung of the ladder, but what others offer
    number_format: NumberFormat | None = None  # of a quantized denoiser, which draws other pictures than rungs below

    def at_once(self, frames: int) -> int:
        """Frames of one UNet call."""
        return 1 if self.frame_by_frame else frames


def _published(attend: Attend, workbench: Workbench) -> Steps:
    unet, adapter = workbench.unet()
    install(unet, adapter, attend, SCALE)
    return functools.partial(published_steps, unet, adapter)


def contract_steps(networks: Networks, inputs: CaseInputs, table: SamplerTable, frames: range) -> Iterator[Tensor]:
    """The project's own loop over all frames of a case."""
    if frames != range(inputs.case.frames):
        raise ValueError(f"frames are {frames}; expected all {inputs.case.frames}")
    with torch.inference_mode():
        steps = denoise(networks, bind(networks, inputs, table))
    while True:
        with torch.inference_mode():
            state = next(steps, None)
        if state is None:
            return
        yield state


def _need_gpu(workbench: Workbench, what: str) -> None:
    if workbench.model.device.type != "cuda":
        raise UnavailableError(f"{what} a CUDA GPU")


def _cached(workbench: Workbench) -> Steps:
    return functools.partial(contract_steps, workbench.eager(grca))


def _fused(workbench: Workbench) -> Steps:
    _need_gpu(workbench, "the fused kernel needs")
    try:
        from storyadapter.kernels.grca.launch import grca_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UnavailableError("triton is not installed") from None
    return functools.partial(contract_steps, workbench.eager(grca_triton))


def _compiled(workbench: Workbench) -> Steps:
    networks = replace(workbench.networks("inductor"), run_step=run_directly)  # not replayed
    return functools.partial(contract_steps, networks)


def _graphs(workbench: Workbench) -> Steps:
    _need_gpu(workbench, "CUDA graphs need")
    return functools.partial(contract_steps, workbench.networks("inductor"))


def _fp8(workbench: Workbench) -> Steps:
    return functools.partial(contract_steps, workbench.networks("inductor", quantized=True))


LADDER: Final = (
    Rung(
        "published",
        "the published processors, frame by frame: scores in memory, text and reference keys and values projected in "
        "every step, N references in every row",
        functools.partial(_published, materialized),
        frame_by_frame=True,
    ),
    Rung("batched", "frames in one batch", functools.partial(_published, materialized)),
    Rung(
        "sdpa",
        "PyTorch's fused attention instead of scores in memory",
        functools.partial(_published, scaled_dot_product_attention),
    ),
    Rung("cached", "keys and values projected once, one bank of references for all rows", _cached),
    Rung("fused", "text and reference attention in one kernel", _fused),
    Rung("compiled", "the networks compiled ahead of time (backend inductor)", _compiled),
    Rung("graphs", "a step replayed as a CUDA graph", _graphs),
)
# the last rung where it is asked for
FP8: Final = Rung(
    "fp8",
    "the denoiser's linear layers and 3x3 convolutions over e4m3 operands: other pictures, whose quality bench quality "
    "--precision fp8 measures",
    _fp8,
    number_format="fp8",
)


def _load_ip_adapter(unet: UNet2DConditionModel, adapter: IPAdapterWeights, scale: float) -> None:
    """Give the UNet diffusers' own processors and image projection, as `pipeline.load_ip_adapter` does."""
    index = {layer.module: layer.index for layer in cross_attentions(Outline.of(unet))}
    layers = {f"{index[layer.module]}.to_k_ip.weight": layer.to_k for layer in adapter.layers}
    layers |= {f"{index[layer.module]}.to_v_ip.weight": layer.to_v for layer in adapter.layers}
    projection = {"proj.weight": adapter.projection_weight, "proj.bias": adapter.projection_bias}
    projection |= {"norm.weight": adapter.norm_weight, "norm.bias": adapter.norm_bias}
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
        both = [torch.cat((torch.zeros_like(images), images))]
        added = {"text_embeds": pooled, "time_ids": sizes, "image_embeds": both}

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return call(latents, timestep, text, added_cond_kwargs=added, return_dict=False)[0]

    return denoise_with(predict, inputs, table, frames, unet.dtype)


def _diffusers(workbench: Workbench, user: str = "diffusers") -> Steps:
    unet, adapter = workbench.unet(user)
    if user == "diffusers, xformers":
        unet.enable_xformers_memory_efficient_attention()
    _load_ip_adapter(unet, adapter, SCALE)
    call = torch.compile(unet, dynamic=False) if user == "diffusers, compiled" else unet
    return functools.partial(_steps, unet, call)


def _diffusers_compiled(workbench: Workbench) -> Steps:
    _need_gpu(workbench, "this baseline's compilation takes longer on a CPU than the benchmark; it needs")
    return _diffusers(workbench, "diffusers, compiled")


def _diffusers_xformers(workbench: Workbench) -> Steps:
    if find_spec("xformers") is None:
        raise UnavailableError("xformers is not installed; type: pip install 'storyadapter-trt[xformers]'")
    _need_gpu(workbench, "xformers needs")
    return _diffusers(workbench, "diffusers, xformers")


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
