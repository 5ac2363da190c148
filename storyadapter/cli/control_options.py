"""The options of ControlNets and of their pictures, and what they come to."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from storyadapter.checkpoint import ControlNetSpec
from storyadapter.method.control import PREPROCESSINGS, ControlSettings
from storyadapter.method.errors import InputError, Text

if TYPE_CHECKING:
    from storyadapter.method.story import Story


def add_controlnet_option(parser: argparse.ArgumentParser) -> None:
    """Of the model that is built or drawn with."""
    parser.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="P[:SCALE[:START-END]]",
        help="ControlNet for SDXL, by which pictures such as poses guide frames: a diffusers folder, a file or a hub "
        "name, with its scale (default 1) and its share of the steps (default 0-1), which an engine doesn't depend on; "
        "may be given several times",
    )


def add_control_options(parser: argparse.ArgumentParser) -> None:
    """ControlNets, and their pictures."""
    add_controlnet_option(parser)
    group = parser.add_argument_group("pictures for --controlnet (or `control:` of a frame of the story file)")
    group.add_argument(
        "--control-images",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a picture per frame in the order of their names, 2.png before 10.png; frames behind the last have none; "
        "given once for each --controlnet",
    )
    group.add_argument(
        "--preprocess",
        action="append",
        default=[],
        choices=PREPROCESSINGS,
        help="canny: draw the pictures' edges, for a ControlNet of edges; none (default): they are poses, depths or "
        "edges already; given once, or once for each --controlnet",
    )


def control_settings(args: argparse.Namespace) -> tuple[ControlSettings, ...]:
    """How each ControlNet is used. Raises InputError: there are other numbers of settings than of ControlNets."""
    if not args.controlnet:  # as of commands that take none
        return ()
    specs = [ControlNetSpec.parse(text) for text in args.controlnet]
    preprocess = args.preprocess * len(specs) if len(args.preprocess) == 1 else args.preprocess or ["none"] * len(specs)
    if len(preprocess) != len(specs):
        expected = f"once, or {len(specs)} times: once for each --controlnet"
        raise InputError(f"--preprocess is given {len(preprocess)} times", expected=expected)
    pairs = zip(specs, preprocess, strict=True)
    return tuple(replace(spec.settings, preprocess=name) for spec, name in pairs)


def with_controls(args: argparse.Namespace, story: "Story", on_notice: Callable[[Text], None]) -> "Story":
    """The story with the pictures of `--control-images`.

    Raises:
        InputError: they can't be used, or an option has no ControlNet that it is for.
    """
    from storyadapter.method.control_pictures import with_control_images  # most of a second

    for option, given in (("--control-images", args.control_images), ("--preprocess", args.preprocess)):
        if given and not args.controlnet:
            raise InputError(f"{option} is given", expected="--controlnet with it")
    if not args.control_images:
        if args.controlnet and not any(frame.control for frame in story.frames):
            advice = "name one in the story file (control: poses/1.png), or give --control-images"
            raise InputError("--controlnet is given, and no frame has a picture for it", advice=advice)
        return story
    if len(args.control_images) != len(args.controlnet):
        count = f"{len(args.control_images)} for {len(args.controlnet)} ControlNets"
        raise InputError(f"--control-images: {count}", expected="one folder for each --controlnet")
    return with_control_images(story, args.control_images, on_notice)
