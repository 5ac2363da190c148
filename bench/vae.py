"""How long decoding a frame takes, kernel by kernel: `python -m storyadapter.bench.vae --out FILE`.

A VAE of random weights, compiled alone as the engine compiles it and compared with fp32. In fp8 its scales are found by
decoding other latents first; `eager` is the emulation then.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from storyadapter.bench.environment import describe
from storyadapter.bench.options import add_report_options
from storyadapter.bench.report import check_out, give_report, opening, table
from storyadapter.bench.synthetic import MODELS, SyntheticCheckpoint
from storyadapter.bench.timing import measure
from storyadapter.cli.main import Parser, run_program
from storyadapter.engine.backend import default_device
from storyadapter.engine.backends import find_backend
from storyadapter.engine.inductor.compilation import build_network
from storyadapter.engine.inductor.fusion import prepare
from storyadapter.engine.inductor.networks import InductorNetwork
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.modules import VaeDecoder
from storyadapter.model.networks import TORCH_DTYPES
from storyadapter.model.numerics import PRECISIONS, VAE_NUMBER_FORMATS, Numerics, Precision, vae_arithmetic
from storyadapter.quantization.layers import OPERANDS
from storyadapter.quantization.recipe import Recipe, recipe_of
from storyadapter.quantization.scales import Scales

SERVED = (*PRECISIONS, *VAE_NUMBER_FORMATS)
_KERNELS_SHOWN = 25


def build_parser() -> Parser:
    """The command's options."""
    parser = Parser(prog="python -m storyadapter.bench.vae", description=__doc__)
    parser.add_argument("--synthetic-weights", choices=tuple(MODELS), default="sdxl", help="sizes (default: sdxl)")
    parser.add_argument("--precisions", nargs="+", choices=SERVED, default=["fp16", "bf16"])
    parser.add_argument("--pixels", type=int, help="height and width (default: the model's own)")
    add_report_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print and write.

    Raises:
        UnavailableError: a precision that can't be had here.
        EngineBuildError: the decoder can't be compiled, or computes something else than eager.
    """
    check_out(args.out)
    asked = {name: Numerics.of("fp32", vae_decoder=vae_arithmetic(name)) for name in args.precisions}
    for numerics in asked.values():
        find_backend("inductor").check(numerics)
    device = default_device()
    checkpoint = SyntheticCheckpoint(MODELS[args.synthetic_weights], device)
    spec = network_specs(checkpoint.geometry)["vae_decoder"]
    pixels = args.pixels or checkpoint.geometry.default_pixels
    side = pixels // checkpoint.geometry.pixels_per_latent
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    letters = ShapeRanges(8, 8, Range(pixels, pixels), Range(pixels, pixels)).letters(
        checkpoint.geometry.pixels_per_latent
    )

    def exact(precision: Precision) -> VaeDecoder:
        return VaeDecoder(checkpoint.load("vae", TORCH_DTYPES[precision], device)).eval()

    scales: Scales | None = None

    def decoder(numerics: Numerics) -> VaeDecoder:
        """In the VAE's arithmetic."""
        nonlocal scales
        made = exact(numerics["vae_decoder"])
        if quantization := numerics.quantizations.get("vae_decoder"):
            others = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
            others = others.to(device, TORCH_DTYPES[numerics["vae_decoder"]])
            recipe = recipe_of("vae_decoder", quantization.number_format)
            scales = scales or Scales(recipe, checkpoint.label, largest_inputs(made, recipe, others))
            scales.apply(made)
        return made

    with torch.inference_mode():
        expected = exact("fp32")(latents)
    found: list[dict[str, Any]] = []
    for name, numerics in asked.items():
        precision = numerics["vae_decoder"]
        own = latents.to(TORCH_DTYPES[precision])
        with torch.inference_mode():
            eager = decoder(numerics)
            found.append(_measured("eager", name, lambda eager=eager, own=own: eager(own), expected, device))
            del eager
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            built = build_network(spec, decoder(numerics), numerics, letters, Path(folder))
            seconds = time.perf_counter() - started
            # fresh weights: the memory of those that were compared is given back
            weights = prepare(decoder(numerics), device)
            network = InductorNetwork(spec, Path(folder), precision, device, letters, weights)
            for tried in (False, True):
                torch.backends.cudnn.benchmark = tried
                words = "compiled, convolutions tried out" if tried else "compiled"
                call = lambda network=network, own=own: network({"latents": own})["image"]  # noqa: E731
                measured = _measured(words, name, call, expected, device)
                found.append(measured | {"build_seconds": seconds, "error_to_eager": built.relative_error})
            torch.backends.cudnn.benchmark = False
        print({**found[-1], "kernels": "…"}, file=sys.stderr, flush=True)
    environment = describe(device, args.commit)
    data = {"kind": "vae", "version": 1, "environment": environment, "pixels": pixels, "measured": found}
    give_report(args.out, _page(environment, args.synthetic_weights, pixels, found), data)
    return 0


def largest_inputs(network: nn.Module, recipe: Recipe, *inputs: Tensor) -> dict[str, float]:
    """The scales of a recipe's layers by one call, without what calibrates models."""
    found: dict[str, float] = {}

    def measure(name: str) -> Callable[..., None]:
        largest = OPERANDS[recipe.number_format].largest
        return lambda _, given: found.update({name: float(given[0].abs().max()) / largest})

    hooks = [layer.register_forward_pre_hook(measure(name)) for name, layer in recipe.layers(network).items()]
    with torch.inference_mode():
        network(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def _measured(way: str, precision: str, call: Any, expected: Tensor, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    out = call().float()
    timing = measure([call], lambda: None, device, graph=False)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
    return {
        "way": way,
        "precision": precision,
        "ms": timing.median,
        "error": float((out - expected).norm() / expected.norm()),
        "finite": bool(out.isfinite().all()),
        "peak_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else 0,
        "kernels": _kernels(call) if on_gpu else [],
    }


def _kernels(call: Any) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of every kernel of one call, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    rows = [(one.key, one.count, one.self_device_time_total / 1000) for one in seen.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def _page(environment: dict[str, str], model: str, pixels: int, found: list[dict[str, Any]]) -> str:
    lines = opening("Decoding one frame", environment | {"model": f"random weights, {model}", "pixels": pixels})
    rows = [
        (one["precision"], one["way"], f"{one['ms']:.2f}", f"{one['error']:.1e}", f"{one['peak_bytes'] / 2**30:.2f}")
        for one in found
    ]
    lines += [*table(("precision", "way", "ms per frame", "error against fp32", "GiB at the highest"), rows), ""]
    for one in found:
        if one["kernels"]:
            lines += [f"## {one['precision']}, {one['way']}", ""]
            kernels = [(name[:100], count, f"{ms:.3f}") for name, count, ms in one["kernels"][:_KERNELS_SHOWN]]
            lines += [*table(("kernel", "calls", "ms"), kernels), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_program(build_parser()))
