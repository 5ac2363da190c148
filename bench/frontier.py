"""`storyadapter-trt bench frontier`: what cheaper ways to draw cost in consistency and fidelity."""

import argparse
from dataclasses import asdict
from pathlib import Path

from storyadapter.bench import options
from storyadapter.bench.frontier_modes import EXACT, MODES
from storyadapter.bench.report import check_out, give_report, report_file, writing
from storyadapter.demo.shipped import LCM_LORA
from storyadapter.method import constants
from storyadapter.method.errors import InputError

HELP = "what cheaper ways to draw cost in consistency and fidelity, on held-out stories of the demo model"
DESCRIPTION = """\
Draws held-out stories of the demo model in every mode (fewer steps, other samplers, guidance in an interval, later
starts, its LCM-LoRA) and reads the characters' traits off the pictures. From what it finds it chooses the cheapest mode
that keeps the exact one's consistency and fidelity (balanced) and the cheapest that keeps 95 % of both (fast), and
confirms them on other stories. Exit code 1 if there is none.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_demo_model_option(parser)
    parser.add_argument(
        "--lora",
        type=Path,
        default=LCM_LORA,
        metavar="FILE",
        help="its LCM-LoRA, for the modes that need it (default: the shipped one)",
    )
    parser.add_argument(
        "--modes", metavar="NAME;NAME;…", help=f"some of: {'; '.join(MODES)} (default: all; {EXACT} always)"
    )
    options.add_count(parser, "--stories", 12, "held-out stories to choose by, 2 or more", "N")
    options.add_count(parser, "--others", 20, "other held-out stories, to confirm by, 2 or more", "N")
    options.add_count(parser, "--frames", 8, "frames of each story, 2 or more", "N")
    options.add_count(parser, "--seeds", 2, "drawings of each story", "N")
    options.add_count(parser, "--iterations", constants.ITERATIONS, "after the first", "K")
    options.add_count(parser, "--max-frames", 8, "frames drawn together, of any stories", "F")
    options.add_engine_options(
        parser, backend="that draws; its engine is built first where the store has none", default="eager"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep what is found of each mode here; what is there isn't drawn again"
    )
    parser.add_argument(
        "--only-draw",
        choices=("choose", "confirm"),
        help="only draw the stories to choose by, or to confirm by, into --work, so that several processes can share "
        "the drawing",
    )
    options.add_report_options(parser, "FILE.md, FILE.json and FILE.png")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if no mode passes."""
    options.check_least(args, stories=2, others=2, frames=2, seeds=1, iterations=1, max_frames=1)
    check_out(args.out)
    names = [name.strip() for name in args.modes.split(";")] if args.modes else list(MODES)
    for name in names:
        if name not in MODES:
            raise InputError(f"--modes has {name!r}; expected some of {'; '.join(MODES)}")
    options.check_demo_model(args)
    options.check_frames(args)
    if any(MODES[name].lora for name in names) and not args.lora.is_file():
        raise InputError(f"--lora {args.lora}: no such file; expected the demo model's LCM-LoRA")
    from storyadapter.bench.frontier_report import chart, markdown
    from storyadapter.bench.frontier_run import draw_only, measure_frontier

    if args.only_draw:
        if args.work is None:
            raise InputError("--only-draw without --work; expected a folder to draw into")
        draw_only(args, names)
        return 0
    found = measure_frontier(args, [EXACT, *(name for name in names if name != EXACT)])
    give_report(args.out, markdown(found), {"kind": "frontier", "version": 1, **asdict(found)})
    if args.out:
        path = report_file(args.out, "png")
        with writing(path):
            chart(found).save(path)
    return 0 if all(choice.confirmed for choice in found.choices) else 1
