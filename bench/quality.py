"""`storyadapter-trt bench quality`: does the method keep its character, measured on pictures of held-out stories."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from storyadapter.bench import options
from storyadapter.engine.backends import AUTO, BACKENDS
from storyadapter.method import constants
from storyadapter.method.errors import InputError
from storyadapter.method.plan import FRAMES_UNMEASURED
from storyadapter.model.numerics import NUMBER_FORMATS, VAE_NUMBER_FORMATS

STUDIES = ("references", "edit", "long-prompts")  # of `storyadapter.bench.quality_studies`
HELP = "does the method keep its character, on held-out stories of the demo model"
DESCRIPTION = """\
Draws held-out stories with the demo model and reads the characters' traits off the pictures: on how many do the frames
of a story agree, and do they still show what was prompted? Exit code 1 if consistency hasn't clearly risen from the
first iteration to the last, or fidelity has clearly fallen; with --precision or --vae-precision fp8, if its last
iteration isn't as good as the exact one's (the lower bound of the difference, story by story, is under -0.02), or one
with wrong scales is.
MODEL.md of the demo model has a command that took 28 minutes on 2 CPU cores.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_demo_model_option(parser)
    options.add_count(parser, "--stories", 24, "held-out stories, 2 or more", "N")
    options.add_count(parser, "--frames", 8, "frames of each story, 2 or more", "N")
    options.add_count(parser, "--seeds", 3, "drawings of each story", "N")
    options.add_count(parser, "--iterations", constants.ITERATIONS, "after the first", "K")
    options.add_count(parser, "--steps", constants.STEPS, "denoising steps")
    options.add_count(parser, "--max-frames", FRAMES_UNMEASURED, "frames drawn together, of any stories", "F")
    parser.add_argument(
        "--study",
        choices=("method", *STUDIES),
        default="method",
        help="method: as above; references: do frames show who is in two pictures of their character (needs a "
        "checkout, which paints them); edit: is an edited frame as good as one drawn anew; long-prompts: is what "
        "stands behind the 75th token drawn (default: %(default)s)",
    )
    parser.add_argument("--guidance", type=float, default=constants.GUIDANCE, help="(default: %(default)s)")
    parser.add_argument(
        "--sampler",
        choices=("pipeline", "batched"),
        default="pipeline",
        help="pipeline: what run uses, all stories together; batched: a plain second implementation in PyTorch "
        "that draws all stories at once (default: %(default)s)",
    )
    text = "of the pipeline; its engine is built first where the store has none"
    precision = "of the pipeline; fp8, int8: as auto, and beside it the same stories so and with wrong scales"
    options.add_engine_options(
        parser,
        backend=text,
        default="eager",
        precision=precision,
        number_formats=NUMBER_FORMATS,
        vae_precision="of the VAE alone; fp8: as auto, and beside it so and with wrong scales",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write quality.json and a sheet per story here")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if the method's claim doesn't hold on these stories."""
    options.check_least(args, stories=2, frames=2, seeds=1, iterations=1, max_frames=1)
    options.check_demo_model(args)
    options.check_frames(args)
    other = args.backend == AUTO or BACKENDS[args.backend].builds or args.precision not in (AUTO, "fp32")
    if args.sampler == "batched" and (other or args.vae_precision not in (AUTO, "fp32")):
        raise InputError(
            "--sampler batched is plain PyTorch in fp32; expected no other --backend, --precision or --vae-precision"
        )
    if args.study != "method" and args.sampler != "pipeline":
        raise InputError(f"--sampler {args.sampler} with --study {args.study}; expected the pipeline, which run uses")
    quantized = args.precision in NUMBER_FORMATS or args.vae_precision in VAE_NUMBER_FORMATS
    if args.study != "method" and quantized:
        raise InputError(f"fp8 or int8 with --study {args.study}; expected --study method, which judges them")
    if args.study == "references" and not find_spec("storyadapter.demo.training"):
        raise InputError(
            "--study references paints its pictures as the demo model's training does, which only a checkout has"
        )
    if args.sampler == "batched" and not find_spec("storyadapter.demo.training"):
        raise InputError("--sampler batched belongs to the training of demo models, which only a checkout has")
    from storyadapter.bench.quality_run import judge, save_sheets

    if args.study != "method":
        return _run_study(args)
    if quantized:
        return _run_fp8(args)
    drawn, quality = judge(args)
    print(quality.table())
    print(f"consistency of independent characters: {quality.chance:.3f}")
    print(f"agreement with the iteration before: {quality.own}; with another story's references: {quality.control}")
    if args.out:
        _write(args, quality.as_dict())
        save_sheets(drawn, args.out)
    risen, kept = quality.holds()
    print(f"consistency risen: {'yes' if risen else 'no'}; fidelity kept: {'yes' if kept else 'no'}")
    return 0 if risen and kept else 1


def _run_study(args: argparse.Namespace) -> int:
    from storyadapter.bench import quality_studies

    study = quality_studies.STUDIES[args.study](quality_studies.Studio.open(args))
    print(study.text())
    if args.out:
        _write(args, study.as_dict())
    return 0 if all(study.claims.values()) else 1


def _run_fp8(args: argparse.Namespace) -> int:
    """Exit code 1 if the quantized model isn't as good as the exact one, or wrong scales aren't found out."""
    from storyadapter.bench import fp8_quality

    found = fp8_quality.judge(args)
    print(f"scales: {found.scales}")
    print(found.table())
    if args.out:
        _write(args, found.as_dict())
    return 0 if found.holds() else 1


def _write(args: argparse.Namespace, found: dict[str, object]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)}
    result = {"settings": settings, **found}
    (args.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
