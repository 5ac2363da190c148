"""Entry point of `storyadapter-trt`: the parser, and how errors and Ctrl-C end a command."""

import argparse
import sys
from collections.abc import Sequence

import storyadapter
from storyadapter import method
from storyadapter.bench import kernel as bench_kernel
from storyadapter.cli import options
from storyadapter.errors import StoryAdapterError

INTERRUPTED = 130

_DESCRIPTION = """\
Draw long stories with Story-Adapter (arXiv 2410.06244) on SDXL: every frame from text first, then more rounds in which
each frame attends to all frames of the round before, so that characters stay the same.

  storyadapter-trt build      prepare the networks for this machine, once per model
  storyadapter-trt run        draw a story
  storyadapter-trt doctor     what this machine can run, and why not the rest
"""

_RUN_EPILOG = """\
examples:
  storyadapter-trt run                                      the demo story with the demo model
  storyadapter-trt run --story tale.yaml --out tale         a story file (YAML, JSON, or text: a prompt per line)
  storyadapter-trt run --prompt "a fox reads" "a fox sleeps in a forest" --seed 7
  storyadapter-trt run --base-model SDXL --image-encoder CLIP --ip-adapter ip-adapter_sdxl.safetensors --story tale.yaml
  storyadapter-trt run --story tale.yaml --out tale --resume    go on after Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="storyadapter-trt",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"storyadapter-trt {storyadapter.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build,run,bench,doctor}")
    _add_build(commands)
    _add_run(commands)
    _add_bench(commands)
    commands.add_parser(
        "doctor", help="what this machine can run", description="GPU, driver, versions, and which backends can serve."
    )
    return parser


def _add_build(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "build",
        help="prepare the networks for this machine",
        description="Export the networks of a model, check each against eager PyTorch, and put them into the engine "
        "store, where run finds them. Building the same again takes what is there.",
        allow_abbrev=False,
    )
    options.add_model_options(parser)
    options.add_size_options(parser, as_range=True)
    parser.add_argument(
        "--max-references",
        type=int,
        default=options.MAX_REFERENCES,
        metavar="N",
        help="frames of the longest story (default: %(default)s)",
    )
    options.add_output_options(parser)


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "run",
        help="draw a story",
        description="Draw every frame of a story: from text alone, then again in each further iteration with "
        "references to all frames of the one before.",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    story = parser.add_argument_group("story").add_mutually_exclusive_group()
    story.add_argument(
        "--story", nargs="+", metavar="FILE", help="a story file (.yaml, .yml, .json, .txt), or several prompts"
    )
    story.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one prompt per frame")
    look = parser.add_argument_group("method (defaults are the published values)")
    look.add_argument(
        "--style", metavar="STYLE", help="comic, film, realistic or none (default: the story's, or comic)"
    )
    count = look.add_mutually_exclusive_group()
    count.add_argument(
        "--iterations",
        type=int,
        default=method.ITERATIONS,
        metavar="K",
        help="iterations after the text-only one, with λ from 0.3 to 0.5 (default: %(default)s)",
    )
    count.add_argument(
        "--scales", type=options.scales_list, metavar="λ,λ,…", help="λ of each iteration after the text-only one"
    )
    look.add_argument("--steps", type=int, default=method.STEPS, help="denoising steps (default: %(default)s)")
    look.add_argument(
        "--scheduler", default=method.SCHEDULER, choices=tuple(method.SAMPLERS), help="sampler (default: %(default)s)"
    )
    look.add_argument("--karras", action="store_true", help="Karras noise levels, for euler and dpmpp_2m")
    look.add_argument(
        "--prediction-type",
        default="epsilon",
        choices=method.PREDICTION_TYPES,
        help="what the UNet was trained to predict (default: %(default)s)",
    )
    look.add_argument(
        "--guidance",
        type=float,
        default=method.GUIDANCE,
        help="classifier-free guidance; 1 or less computes no unconditional rows (default: %(default)s)",
    )
    look.add_argument("--seed", type=int, help="of the whole story (default: drawn, shown and written to story.json)")
    look.add_argument("--negative-prompt", default=method.NEGATIVE_PROMPT, metavar="T", help="(default: %(default)s)")
    options.add_size_options(parser, as_range=False)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default="story-out", metavar="DIR", help="output folder (default: %(default)s)")
    output.add_argument("--resume", action="store_true", help="go on after the last finished iteration in --out")
    output.add_argument(
        "--keep",
        default="all",
        choices=("all", "last"),
        help="frames of all iterations, or of the last alone (default: %(default)s)",
    )
    options.add_model_options(parser)
    options.add_output_options(parser)


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("bench", help="measure", description="Measure on this machine.", allow_abbrev=False)
    benches = parser.add_subparsers(dest="bench", required=True)
    kernel = benches.add_parser("kernel", help="the fused attention kernel against its rivals", allow_abbrev=False)
    bench_kernel.add_arguments(kernel)
    kernel.set_defaults(run_bench=bench_kernel.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 1 (it had to stop), 2 (it can't be done as typed), 130 (Ctrl-C)."""
    args = build_parser().parse_args(argv)
    try:
        match args.command:
            case "build":
                from storyadapter.cli.build import build

                return build(args)
            case "run":
                from storyadapter.cli.run import run

                return run(args)
            case "doctor":
                from storyadapter.cli.doctor import doctor

                return doctor()
            case _:
                return args.run_bench(args)
    except StoryAdapterError as error:
        print(f"storyadapter-trt: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("storyadapter-trt: stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
