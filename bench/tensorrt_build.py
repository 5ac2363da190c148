"""What it takes to build the full-size SDXL denoiser with TensorRT: seconds, memory, size, layers, fused attention.

`python -m storyadapter.bench.tensorrt_build --target sm89,sm120 --folder sdxl-build --report tensorrt-build.md`
needs no GPU with TensorRT-RTX, about 20 GB of memory and 15 GB of disk.
"""

import argparse
import platform
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from storyadapter.bench.options import add_count
from storyadapter.bench.report import opening, table
from storyadapter.bench.synthetic import SDXL, SyntheticCheckpoint
from storyadapter.engine.backend import installed_version
from storyadapter.engine.tensorrt.builder import build_request, run_worker
from storyadapter.engine.tensorrt.library import AUTO, Library, choose_library, gpu_target, parse_targets
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.engine.tensorrt.worker import BuildReport, Layer, parse_layers, peak_memory
from storyadapter.export.onnx_export import export_compared
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.networks import TORCH_DTYPES
from storyadapter.model.numerics import PRECISIONS
from storyadapter.model.unet import split_unet

# Where the attentions of one transformer block come from, by the names of their ONNX nodes.
SELF, TEXT, REFERENCES = "self-attention", "text attention", "reference attention"


@dataclass(frozen=True)
class Measured:
    """One full-size build."""

    library: Library
    targets: tuple[str, ...]
    precision: str
    ranges: ShapeRanges
    export_seconds: float
    export_peak_bytes: int
    error: float
    report: BuildReport
    layers: tuple[Layer, ...]


def fused_by_kind(layers: Sequence[Layer]) -> dict[str, int]:
    """How many attentions of each kind are one kernel."""
    found = dict.fromkeys((SELF, TEXT, REFERENCES), 0)
    for nodes in (" ".join(layer.nodes) for layer in layers if layer.is_fused_attention):
        operator = re.search(r"GlobalReferenceCrossAttention/(Attention|MatMul|Softmax)", nodes)
        found[SELF if operator is None else TEXT if operator[1] == "Attention" else REFERENCES] += 1
    return found


def measure(args: argparse.Namespace) -> Measured:
    """Make, export, compare and build the denoiser in `args.folder`."""
    library, targets = choose_library(parse_targets(args.target), gpu_target())
    pixels = Range(args.pixels, args.pixels)
    ranges = ShapeRanges(args.max_frames, args.max_references, pixels, pixels)
    letters = ranges.letters()
    spec = network_specs(SDXL.geometry)["denoiser"]
    args.folder.mkdir(parents=True)
    started = time.perf_counter()
    checkpoint, dtype = SyntheticCheckpoint(SDXL, torch.device("cpu")), TORCH_DTYPES[args.precision]
    module = split_unet(checkpoint.load("unet", dtype), checkpoint.load_ip_adapter(dtype), grca)["denoiser"]

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - started:.0f} s: {what}", file=sys.stderr)

    tell("random weights made")
    exporting = time.perf_counter()
    path, error = export_compared(spec, module, letters, args.precision, args.folder, tell)
    export_seconds, export_peak = time.perf_counter() - exporting, peak_memory()
    tell("building")
    request = build_request(spec, path, args.folder, letters, args.precision, library, targets, BuildOptions())
    report = run_worker(spec.name, request, lambda fraction: None)
    layers = parse_layers(Path(request.layers).read_text(encoding="utf-8"))
    return Measured(library, targets, args.precision, ranges, export_seconds, export_peak, error, report, layers)


def write_report(measured: Measured, command: str) -> str:
    """The page on one build, in Markdown."""
    m, report, letters = measured, measured.report, measured.ranges.letters()
    blocks = sum(width.layers for width in SDXL.geometry.widths)
    types = ", ".join(f"{count} {kind}" for kind, count in Counter(layer.type for layer in m.layers).most_common())
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB memory"
    onnx, onnxruntime = installed_version("onnx"), installed_version("onnxruntime")
    peaks = [f"peak memory {peak / 2**30:.1f} GiB" for peak in (m.export_peak_bytes, report.peak_memory_bytes)]
    facts = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, {memory}, no GPU",
        "versions": f"{m.library}, PyTorch {torch.__version__}, onnx {onnx}, onnxruntime {onnxruntime}",
        "precision": f"{m.precision}, strongly typed",
        "ranges": ", ".join(f"{name} {letters[name]}" for name in ("B", "P", "G", "R", "h", "w")),
        "export to ONNX and comparison with eager": f"{m.export_seconds:.0f} s, {peaks[0]}, "
        f"relative error {m.error:.1e}",
        "parse and build": f"{report.seconds:.0f} s, of which parse {report.parse_seconds:.0f} s; {peaks[1]}",
        "engine": f"{report.engine_bytes / 2**30:.2f} GiB for {len(m.targets)} architectures",
        "layers": f"{report.layers}: {types}",
        "longest time without a word from the builder": f"{report.longest_step_seconds:.0f} s",
    }
    text = (
        "SDXL's denoiser (the UNet without the layers that the two projections took over) with random weights, built",
        f"for {' and '.join(m.targets)} in one build, on a CPU without a GPU or a driver. The engine was not executed:",
        "no machine here has a GPU that this library runs on.",
        "",
        f"Command: `{command}`",
        "",
    )
    fused = [(kind, f"{count} of {blocks}") for kind, count in fused_by_kind(m.layers).items()]
    lines = opening("Building the full-size denoiser with TensorRT", facts, *text)
    lines += [f"Attentions that are one kernel, of the {blocks} transformer blocks:", ""]
    return "\n".join([*lines, *table(("attention", "fused"), fused)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one build and write the report."""
    parser = argparse.ArgumentParser(prog="python -m storyadapter.bench.tensorrt_build", description=__doc__)
    parser.add_argument(
        "--target", default=AUTO, help="architectures, such as sm89,sm120 (default: this machine's GPU)"
    )
    parser.add_argument("--precision", default="fp16", choices=[name for name in PRECISIONS if name != "fp32"])
    add_count(parser, "--pixels", 1024, "height and width")
    add_count(parser, "--max-frames", 8)
    add_count(parser, "--max-references", 100)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for the ONNX file and the engine")
    parser.add_argument("--report", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(arguments)
    measured = measure(args)
    words = list(arguments if arguments is not None else sys.argv[1:])
    command = shlex.join(["python", "-m", "storyadapter.bench.tensorrt_build", *words])
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(write_report(measured, command), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
