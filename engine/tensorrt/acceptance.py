"""How TensorRT is accepted on a machine: everything that was written without a GPU that runs its engines, executed.

What any backend must do is in `engine.trial`; here is what TensorRT alone has: layer lists, graphs, caches, the plugin.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from storyadapter.checkpoint import CheckpointPaths
from storyadapter.engine import trial
from storyadapter.engine.acceptance import AcceptancePlan, Check
from storyadapter.engine.backend import installed_version
from storyadapter.engine.tensorrt import engine_name, layers_name, runtime_cache_name
from storyadapter.engine.tensorrt.builder import embeds_kernel, timing_cache_name
from storyadapter.engine.tensorrt.library import Library, choose_library, gpu_target, multiplies
from storyadapter.engine.tensorrt.networks import TensorRTNetwork
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.engine.tensorrt.worker import Layer, parse_layers
from storyadapter.engine.trial import Trial, TrialError
from storyadapter.export.grca_node import OP_TYPE
from storyadapter.method.errors import UnavailableError
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.numerics import NUMBER_FORMATS, NumberFormat

_RANGES: Final = ShapeRanges(4, 16, Range(64, 128), Range(64, 128))
_RESOLUTION: Final = (128, 128)  # that of the story whose pictures are compared: a profile of its own


def plan(folder: Path) -> AcceptancePlan:
    """Every check that this machine's GPU and TensorRT can pass; see `Backend.acceptance_plan`."""
    library, targets = choose_library((), gpu_target())
    if _formats(targets[0]) and installed_version("nvidia-modelopt") is None:
        raise UnavailableError(
            "backend tensorrt can't be accepted here: nvidia-modelopt, which finds scales, isn't installed",
            advice="type: pip install 'storyadapter-trt[quantize]'",
        )
    paths = CheckpointPaths.given(None, None, None)
    options = BuildOptions(4 if library.has_levels else None, 1024, (_RESOLUTION,))
    tried = Trial("tensorrt", folder, paths, _RANGES, options)
    return plan_for(library, targets[0], tried, embeds=embeds_kernel(library, targets))


def plan_for(library: Library, target: str, tried: Trial, *, embeds: bool) -> AcceptancePlan:
    """The checks of one TensorRT on one architecture; `embeds`: whether engines hold the fused kernel."""
    checks = [
        Check("build", "build the demo model's engines, fp16", build),
        Check("load", "load them, compare with the contract", trial.load),
        Check("networks", "run each, compare with eager", trial.compare_networks),
        Check("shapes", "12 shapes in turn, two profiles", trial.compare_shapes),
        Check("graphs", "capture and replay CUDA graphs", replay),
        Check("streams", "keep the order of CUDA streams", trial.compare_streams),
        Check("scratch", "share scratch memory among networks", trial.compare_interleaved),
    ]
    left_out = []
    if library.has_plugins:
        checks.append(Check("timing cache", "build again with what was measured", build_with_timing_cache))
    else:
        checks.append(Check("runtime cache", "keep and read compiled kernels", read_runtime_cache))
    if embeds:
        checks.append(Check("plugin", "the fused kernel inside the engine", find_plugin))
    else:
        left_out.append(("plugin", f"{library} embeds no kernel for {target}"))
    checks.append(Check("pictures", "two iterations, compare with eager", trial.compare_pictures))
    formats = _formats(target)
    for form in formats[:1]:
        checks += [
            Check(f"{form} build", f"the same with {form} products", build, form),
            Check(f"{form} networks", "run each, compare with eager", trial.compare_networks, form),
            Check(f"{form} pictures", "two iterations, compare with eager", trial.compare_pictures, form),
        ]
    left_out += [(form, f"{target} doesn't multiply {form} numbers") for form in NUMBER_FORMATS if form not in formats]
    return AcceptancePlan(tried, checks, left_out)


def _formats(target: str) -> list[NumberFormat]:
    return [form for form in NUMBER_FORMATS if multiplies(form, target)]


def build(tried: Trial) -> str:
    """Build the engine, and read what the builder says of its layers."""
    said = trial.build(tried)
    reports: list[dict[str, Any]] = list(tried.engine().details["builds"].values())
    layers, fused, products = (
        sum(report[name] for report in reports) for name in ("layers", "fused_attentions", "quantized_products")
    )
    if tried.number_format and not products:
        raise TrialError(f"{said}, but none of its {layers} layers is a product of 8-bit operands")
    return f"{said}, {layers} layers, of them {fused} attentions in one kernel, {products} products of 8-bit operands"


def replay(tried: Trial) -> str:
    """The same call gives the same bytes, also from a captured graph."""
    _, networks = tried.open()
    trial.repeat(networks, tried)
    denoiser = networks["denoiser"]
    assert isinstance(denoiser, TensorRTNetwork)
    if not denoiser.replays:
        raise TrialError("no CUDA graph was replayed")
    return f"equal bytes, {denoiser.replays} replays"


def read_runtime_cache(tried: Trial) -> str:
    """What TensorRT-RTX compiled when a network was first run is read by the next process's session."""
    path = tried.engine().folder / runtime_cache_name("denoiser")
    path.unlink(missing_ok=True)
    seconds = []
    for again in (False, True):
        _, networks = tried.open()
        denoiser = networks["denoiser"]
        assert isinstance(denoiser, TensorRTNetwork)
        if denoiser.runtime_cache_was_read != again:
            raise TrialError(f"{path.name} was {'not read' if again else 'read, though it was removed'}")
        started = time.perf_counter()
        trial.repeat(networks, tried)
        seconds.append(time.perf_counter() - started)
        if not path.is_file():
            raise TrialError(f"{path.name} wasn't written")
    without, with_it = seconds
    return (
        f"{path.stat().st_size / 2**20:.1f} MiB; first calls took {without:.1f} s without it, {with_it:.1f} s with it"
    )


def build_with_timing_cache(tried: Trial) -> str:
    """What TensorRT measured of layers is kept, and read by the next build."""
    library, targets = choose_library((), gpu_target())
    path = tried.folder / timing_cache_name(library, targets)
    if not path.is_file():
        raise TrialError("the build left no timing cache")
    smaller = replace(tried, ranges=replace(tried.ranges, max_frames=1))
    started, before = time.perf_counter(), tried.engine().build_seconds
    trial.build(smaller)
    seconds = time.perf_counter() - started
    return f"{path.stat().st_size / 2**10:.0f} KiB; {before:.0f} s for the first build, {seconds:.0f} s for one with it"


def find_plugin(tried: Trial) -> str:
    """The denoiser's layer list names the plugin."""
    folder = tried.engine().folder
    layers = parse_layers((folder / layers_name("denoiser")).read_text(encoding="utf-8"))
    found = plugin_layers(layers)
    if not found:
        kinds = ", ".join(sorted({layer.type for layer in layers}))
        raise TrialError(f"no layer of {engine_name('denoiser')} is the plugin; there are {kinds}")
    return f"{len(found)} of {len(layers)} layers"


def plugin_layers(layers: tuple[Layer, ...]) -> list[Layer]:
    """Those that are our plugin, by type or name."""
    return [layer for layer in layers if "plugin" in layer.type.lower() or OP_TYPE in layer.name]
