"""Options of what a command leaves and tells. Imports nothing heavy."""

import argparse
from pathlib import Path


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """How a command tells what it does."""
    group = parser.add_argument_group("messages").add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", action="store_true", help="print details, and what libraries print")
    group.add_argument("--quiet", action="store_true", help="print errors only")
    group.add_argument("--json-log", action="store_true", help="one JSON object per event on standard output")


def add_font_option(parser: argparse._ActionsContainer) -> None:
    """What captions and titles are drawn with."""
    parser.add_argument(
        "--font",
        type=Path,
        metavar="FILE",
        help="draw captions and titles with this .ttf, .otf or .ttc; letters that it lacks come from the package's own "
        "font or the system's",
    )


def add_overview_options(parser: argparse._ActionsContainer) -> None:
    """What is made of the last iteration."""
    parser.add_argument(
        "--animation",
        default="gif",
        choices=("gif", "webp"),
        help="of the last iteration; webp has all colours and a fraction of the size (default: %(default)s)",
    )
    add_font_option(parser)
