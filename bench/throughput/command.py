"""`storyadapter-trt bench throughput`: from the published method to this project, step by step; whole stories."""

import argparse

from storyadapter.bench.options import add_engine_options, add_report_options, number, refuse_checkpoint_options
from storyadapter.bench.report import check_out
from storyadapter.cli.options import add_checkpoint_options
from storyadapter.cli.values import positive
from storyadapter.method.errors import InputError

HELP = "from the published method to this project, one step at a time; and whole stories"
DESCRIPTION = """\
Measures UNet rows per second (a row is one latent picture in one UNet call; a frame has two per step) on a ladder in
which each rung adds one thing: the published method frame by frame, batched, fused attention (sdpa), keys and values
cached with one bank of references (cached), the fused kernel (fused), compiled networks (compiled), CUDA graphs
(graphs). A rung is compared with the one below and timed only if it draws the same. Then whole stories: one thing after
the other, and overlapped as run draws them. Beside them stand diffusers' own IP-Adapter and other baselines.
"""
_EPILOG = """\
examples:
  storyadapter-trt bench throughput --smoke                 does the benchmark itself work? (a CPU will do)
  storyadapter-trt bench throughput --synthetic-weights sdxl --gpu-price 2.5 --out sdxl
  storyadapter-trt bench throughput --synthetic-weights sdxl --cases n16 --rungs sdpa,graphs
  storyadapter-trt bench throughput --synthetic-weights sdxl --synthetic-controlnets 1 --cases n16,control
  storyadapter-trt bench throughput --synthetic-weights sdxl --rungs graphs,overlapped --precision fp8
  storyadapter-trt bench compare before.json after.json     what got slower

The full table takes about 8 minutes on an H100; the engine is built first where the store has none.
"""

RUNGS = ("published", "batched", "sdpa", "cached", "fused", "compiled", "graphs", "overlapped")
BASELINES = ("diffusers", "diffusers-compile", "diffusers-xformers", "tensorrt")
MODELS = ("sdxl", "toy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--synthetic-weights",
        choices=MODELS,
        metavar="SIZE",
        help="sdxl: the full-size model with seeded random weights made on the device, which needs no files and takes "
        "the time of a trained one; toy: a tiny one of the same structure",
    )
    parser.add_argument(
        "--synthetic-controlnets",
        type=positive,
        default=0,
        metavar="N",
        help="as many ControlNets beside random weights; adds the case control, in which every frame has a picture for "
        "each of them, to the rungs that cache keys and values. Without a picture, in the other cases, none is run",
    )
    parser.add_argument(
        "--cases",
        type=_names,
        metavar="NAME,…",
        help="only these: n16 (all rungs and baselines), n8 and n100 (the cost over the number of references), story "
        "(16 frames, from prompts to pictures); of a model for small pictures: n3, n5, story; control, with "
        "--synthetic-controlnets",
    )
    parser.add_argument(
        "--rungs",
        type=_names,
        metavar="NAME,…",
        help=f"only these rungs ({', '.join(RUNGS)}) and baselines ({', '.join(BASELINES)}); a rung is then compared "
        "with the next lower one that is there",
    )
    add_engine_options(
        parser,
        precision="of all networks but the VAE; fp8: as auto, and beside it, as the last rung and the last way of a "
        "story, with the denoiser's products over 8-bit operands; scales are found first where the store has none",
        number_formats=("fp8",),
    )
    parser.add_argument(
        "--gpu-price",
        type=lambda text: number(text, "a price such as 2.5", lambda value: value >= 0),
        metavar="X",
        help="price of the device per hour: adds the money per frame",
    )
    parser.add_argument(
        "--device-memory",
        type=lambda text: number(text, "a size in GiB such as 15.5", lambda value: value > 0),
        metavar="GIB",
        help="as on a smaller GPU: a second process holds all memory but so much; whole stories are then drawn in one "
        "way, in micro-batches of as many frames as fit",
    )
    add_report_options(parser, "FILE.md, FILE.json (for bench compare) and FILE.png")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the toy model and tiny cases, also on a CPU: does the benchmark itself work?",
    )
    add_checkpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if a rung draws wrong pictures or fails."""
    if args.smoke and args.synthetic_weights == "sdxl":
        raise InputError("--smoke is for the toy model; expected no --synthetic-weights sdxl with it")
    if args.synthetic_controlnets and not (args.smoke or args.synthetic_weights):
        raise InputError("--synthetic-controlnets is given", expected="--synthetic-weights or --smoke with it")
    if args.smoke or args.synthetic_weights:
        refuse_checkpoint_options(args, "--synthetic-weights", "--smoke")
    if unknown := [name for name in args.rungs or () if name not in (*RUNGS, *BASELINES)]:
        raise InputError(f"--rungs {unknown[0]}: expected some of {','.join((*RUNGS, *BASELINES))}")
    check_out(args.out)
    from storyadapter.bench.device_memory import only_device_memory
    from storyadapter.bench.throughput.run import measure
    from storyadapter.engine.backend import default_device

    if args.device_memory is None:
        return measure(args)
    with only_device_memory(int(args.device_memory * 2**30), default_device()):
        return measure(args)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
