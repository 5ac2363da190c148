"""`storyadapter-trt bench parity`: a backend's pictures against those of eager in fp32, from the same references."""

import argparse
from dataclasses import asdict

from storyadapter.bench import options
from storyadapter.bench.report import check_out, give_report
from storyadapter.cli.options import add_checkpoint_options
from storyadapter.method import constants
from storyadapter.method.plan import FRAMES_UNMEASURED

HELP = "a backend's pictures against those of eager in fp32, from the same references"
DESCRIPTION = """\
Draws a story by eager in fp32 and by another backend: each iteration from eager's pictures of the one before, and all
iterations free-running. Exit code 1 if a picture drawn from the same references is further from eager's than half
precision may take it, or if half the λ isn't seen.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_count(parser, "--frames", 32, "frames of the story", "N")
    options.add_count(parser, "--steps", 20, "denoising steps")
    options.add_count(parser, "--iterations", constants.ITERATIONS, "iterations after the first", "K")
    options.add_count(parser, "--seed", 0, "of the story's noise")
    options.add_count(parser, "--max-frames", FRAMES_UNMEASURED, "frames of a micro-batch at the most", "F")
    text = "what is compared; the engine that build makes by default is built first where the store has none"
    options.add_engine_options(parser, backend=text)
    options.add_report_options(parser)
    add_checkpoint_options(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if pictures drawn from the same references are further from eager's than half precision may bring
    them, or if a wrong λ is no further than that."""
    options.check_least(args, frames=1, steps=1, iterations=1, max_frames=1)
    options.check_frames(args)
    from storyadapter.bench.parity_run import compare, markdown

    check_out(args.out)
    found = compare(args)
    data = {"kind": "parity", "version": 1, "passed": not found.problems, **asdict(found)}
    give_report(args.out, markdown(found), data)
    return 1 if found.problems else 0
