"""`storyadapter-trt bench kernel`: the fused kernels against the other ways to compute the same functions."""

import argparse

from storyadapter.bench.options import add_report_options
from storyadapter.bench.report import check_out, give_report

HELP = "the fused kernels against their baselines"
DESCRIPTION = """\
Times the fused kernels on the layers of SDXL, beside PyTorch's ways to compute the same: text and reference attention
(grca), product and activation of the feed-forward layer (geglu), residual addition and layer norm (layer_norm), group
norm with SiLU (group_norm), and in fp8 3x3 convolutions, linear and GEGLU layers (convolution_fp8, …). Says what share
of the device's measured limits they reach. Results are compared with fp32 first.
"""
KERNELS = ("grca", "geglu", "layer_norm", "convolution_fp8", "linear_fp8", "geglu_fp8", "group_norm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", choices=KERNELS, help="only this one (default: all)")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="float16", help="element type (%(default)s)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, … or cpu with --smoke (%(default)s)")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timed repeats, at least 30 (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny cases: does the benchmark itself work?")
    add_report_options(parser, "FILE.md and FILE.json besides the table")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, unless a contender computes something else, which raises `WrongResult`."""
    import torch

    from storyadapter.bench.timing import MIN_REPEATS
    from storyadapter.method.errors import InputError, UnavailableError

    if args.repeats < MIN_REPEATS:
        raise InputError(f"--repeats {args.repeats}: expected at least {MIN_REPEATS}")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise InputError(f"--device {args.device}: expected cuda, cuda:<index> or cpu") from None
    if device.type == "cpu" and not args.smoke:
        raise InputError("--device cpu: the full table needs a GPU; expected --smoke with it")
    if device.type == "cpu" and args.dtype == "bfloat16":
        raise InputError("--dtype bfloat16: Triton's interpreter computes it wrongly; expected float16, or a GPU")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(f"--device {args.device}: no CUDA device here; try --device cpu --smoke")
    try:
        from storyadapter.bench.kernels.cases import ALL_CASES, SMOKE_CASES
        from storyadapter.bench.kernels.run import as_data, compare, markdown
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UnavailableError("triton is not installed; expected Triton 3.6 or later: pip install triton") from None

    check_out(args.out)
    cases = [case for case in (SMOKE_CASES if args.smoke else ALL_CASES) if args.kernel in (None, case.kernel)]
    report = compare(cases, device, getattr(torch, args.dtype), args.repeats, args.commit)
    give_report(args.out, markdown(report), as_data(report), indent=None)
    return 0
