"""Options that several benchmarks have. Imports nothing heavy."""

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, cast

from storyadapter.cli.options import given_checkpoint_options
from storyadapter.cli.sessions import choose_engine
from storyadapter.demo.shipped import MODEL
from storyadapter.demo.vocabulary import FRAMES_AT_MOST
from storyadapter.engine.backends import AUTO, BACKENDS
from storyadapter.method.errors import InputError
from storyadapter.model.numerics import PRECISIONS, VAE_NUMBER_FORMATS, NumberFormat, Precision


def add_engine_options(
    parser: argparse.ArgumentParser,
    *,
    backend: str = "",
    default: str = AUTO,
    precision: str = "of all networks",
    number_formats: Sequence[NumberFormat] = (),
    vae_precision: str = "",
) -> None:
    """Precision, engine store and, with helps for them, backend and the VAE's precision.

    Args:
        backend, precision: what they are for, in the help; without the first, the benchmark runs several backends.
        default: backend.
        number_formats: of quantized products that can be asked for.
        vae_precision: what that is for; without it, there is no option for it.
    """
    if backend:
        auto = "auto, as run" if default == AUTO else default
        parser.add_argument(
            "--backend", default=default, choices=(AUTO, *BACKENDS), help=f"{backend} (default: {auto})"
        )
    parser.add_argument(
        "--precision",
        default=AUTO,
        choices=(AUTO, *PRECISIONS, *number_formats),
        help=f"{precision} (default: auto, fp16 on a GPU, fp32 on a CPU)",
    )
    if vae_precision:
        served = (AUTO, *PRECISIONS, *VAE_NUMBER_FORMATS)
        parser.add_argument("--vae-precision", default=AUTO, choices=served, help=f"{vae_precision} (default: auto)")
    parser.add_argument("--engine-dir", type=Path, metavar="D", help="engine store (default: in the user's cache)")


def add_count(
    parser: argparse._ActionsContainer, name: str, default: int, help_text: str = "", metavar: str | None = None
) -> None:
    """An option for a whole number, whose help ends with its default."""
    help_text = f"{help_text} (default: %(default)s)".strip()
    parser.add_argument(name, type=int, default=default, metavar=metavar, help=help_text)


@dataclass(frozen=True)
class EngineChoice:
    """What runs a model: see `add_engine_options`."""

    backend: str  # that is measured
    precision: Precision  # of all networks but the VAE
    vae: Precision | None = None  # the VAE's; None for what the model asks for
    engine_dir: Path | None = None  # of the engine store; the user's cache folder if None

    @classmethod
    def typed(cls, args: argparse.Namespace, backend: str | None = None) -> Self:
        """From the options; with `backend`, where there is no option for it."""
        asked = getattr(args, "vae_precision", AUTO)
        found, precision = choose_engine(backend or args.backend, args.precision, asked)
        vae = cast(Precision, asked) if asked in PRECISIONS else None
        return cls(found.name, precision, vae, engine_dir=args.engine_dir)

    def with_fast_vae(self) -> Self:
        """The VAE in bf16, if all else is in half precision and the backend has it so."""
        fast = self.precision != "fp32" and "bf16" in BACKENDS[self.backend].vae_precisions
        return replace(self, vae="bf16") if fast else self


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raises InputError if the number typed for an option, here by its name in `args`, is less than this."""
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected {low} or more")


def check_frames(args: argparse.Namespace) -> None:
    """Raises InputError if a held-out story is to have more frames than there are scenes."""
    if args.frames > FRAMES_AT_MOST:
        raise InputError(f"--frames is {args.frames}; expected {FRAMES_AT_MOST} or fewer: so many scenes there are")


def add_demo_model_option(parser: argparse.ArgumentParser) -> None:
    """Whose held-out stories are drawn."""
    parser.add_argument(
        "--model", type=Path, default=MODEL, metavar="DIR", help="folder of a demo model (default: the shipped one)"
    )


def check_demo_model(args: argparse.Namespace) -> None:
    """Raises InputError if `--model` has none."""
    if not (args.model / "model_index.json").is_file():
        raise InputError(
            f"--model {args.model}: no model_index.json there; expected the folder of a trained demo model"
        )


def number(text: str, wanted: str, is_valid: Callable[[float], bool]) -> float:
    """A number typed for an option; argparse's error says what is `wanted` where it isn't valid."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)) and is_valid(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def add_report_options(parser: argparse.ArgumentParser, files: str = "FILE.md and FILE.json") -> None:
    """Where a report is written, and the commit that it names; `files` are told in the help."""
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write {files}")
    parser.add_argument("--commit", metavar="SHA", help="commit to report, where the checkout has no history")


def refuse_checkpoint_options(args: argparse.Namespace, *instead: str) -> None:
    """Raises InputError if files of a model were typed where its weights are random; `instead`: options for those."""
    for option in given_checkpoint_options(args):
        raise InputError(f"{option} with random weights; expected one of {', '.join((option, *instead))}")
