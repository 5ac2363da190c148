"""The parser of `storyadapter-trt`, and how errors, Ctrl-C and SIGTERM, which is as tidy, end a command."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import storyadapter
from storyadapter.cli import examples, options, output_options
from storyadapter.cli.control_options import add_control_options, add_controlnet_option
from storyadapter.cli.frame_changes import FrameChange
from storyadapter.cli.interrupts import exit_code_of, sigterm_as_interrupt
from storyadapter.cli.libraries import libraries_silenced
from storyadapter.cli.printing import tell
from storyadapter.cli.reference_vae import add_reference_vae_option
from storyadapter.cli.values import decimal, not_negative
from storyadapter.engine.backends import BACKENDS
from storyadapter.method.errors import InputError, RunError, StoryAdapterError
from storyadapter.method.memory_errors import is_out_of_memory, refuse_small_limit
from storyadapter.output.files import is_full
from storyadapter.serve.limits import Limits

_DESCRIPTION = """\
Draws long stories with Story-Adapter (arXiv 2410.06244) on SDXL: every frame from text first, then more iterations in
which each frame attends to all frames of the one before, so that characters stay the same.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others of the program."""

    def __init__(self, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter if "epilog" in settings else argparse.HelpFormatter
        super().__init__(**{"formatter_class": form, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; for all options type {self.prog} --help")

    def parse_known_args(  # type: ignore[override]  # argparse has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does it, but what is unknown is told by the command that it was typed for.

        Raises:
            InputError: something is unknown; the text names the option that comes closest.
        """
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"unknown: {' '.join(unknown)}{hint}; for all options type {self.prog} --help")
        return parsed, unknown


# What `add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def build_parser() -> tuple[Parser, Commands]:
    """The command line of this room, and its commands, to which others can be added."""
    parser = Parser(prog="storyadapter-trt", description=_DESCRIPTION, epilog=examples.PROGRAM)
    parser.add_argument("--version", action="version", version=f"storyadapter-trt {storyadapter.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_build(commands)
    _add_run(commands)
    _add_edit(commands)
    _add_serve(commands)
    text = "GPU, driver, versions, which backends can serve here and why the others can't"
    doctor = commands.add_parser("doctor", help=text, description=f"Tells {text}.")
    doctor.add_argument("--json", action="store_true", help="as one JSON object")
    doctor.add_argument(
        "--accept",
        choices=[backend.name for backend in BACKENDS.values() if backend.accepted_first],
        help="try a backend that its developers had no GPU for: build and run the demo model, compare its pictures "
        "with eager's (minutes), print a table and a text to send them; if all is right, auto chooses it here",
    )
    doctor.set_defaults(run=_later("machine", "doctor"))
    _add_engines(commands)
    _add_story(commands)
    _add_book(commands)
    return parser, commands


def _add_build(commands: Commands) -> None:
    parser = commands.add_parser(
        "build",
        help="prepare the networks of a model for this machine, once",
        description="Exports the networks of a model, checks each against eager PyTorch, and puts them into the\n"
        "engine store, where run finds them. Building the same again takes what is there.",
        epilog=examples.BUILD,
    )
    options.add_model_options(parser)
    add_controlnet_option(parser)
    add_reference_vae_option(parser)
    options.add_size_options(parser, as_range=True)
    options.add_backend_options(parser)
    options.add_calibration_option(parser)
    output_options.add_output_options(parser)
    parser.set_defaults(run=_later("commands", "build"))


def _add_run(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="draw a story",
        description="Draws every frame of a story: from text alone, then again in each further iteration with\n"
        "references to all frames of the one before.",
        epilog=examples.RUN,
    )
    options.add_story_options(parser)
    options.add_method_options(parser)
    options.add_size_options(parser, as_range=False)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default="story-out", metavar="DIR", help="output folder (default: %(default)s)")
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last finished iteration in --out, or begin if there is none",
    )
    output.add_argument(
        "--keep",
        default="all",
        choices=("all", "last"),
        help="frames of all iterations, or of the last alone (default: %(default)s)",
    )
    output_options.add_overview_options(output)
    options.add_model_options(parser)
    add_reference_vae_option(parser)
    add_control_options(parser)
    options.add_worker_options(parser)
    output_options.add_output_options(parser)
    parser.set_defaults(run=_later("commands", "run"))


def _add_edit(commands: Commands) -> None:
    parser = commands.add_parser(
        "edit",
        help="draw some frames of a finished story again",
        description="Draws some frames of a finished story again, in every iteration, with references to all others\n"
        "as they are. Model, engine and settings are those of the run, where none are typed.",
        epilog=examples.EDIT,
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="the output folder of a finished run")
    changes = parser.add_argument_group("frames; what is typed after --frame N is of that one")
    changes.add_argument(
        "--frame",
        type=not_negative,
        action=FrameChange,
        metavar="N",
        help="a frame that is drawn again, by the number in its file's name; may be given several times",
    )
    changes.add_argument("--prompt", action=FrameChange, metavar="TEXT", help="its new prompt")
    changes.add_argument("--negative", action=FrameChange, metavar="TEXT", help="what it must not show")
    changes.add_argument("--seed", type=int, action=FrameChange, metavar="N", help="another seed for it")
    changes.add_argument(
        "--control",
        nargs="+",
        action=FrameChange,
        metavar="P",
        help="another picture for the run's ControlNet, with several of them one for each; none takes it away",
    )
    parser.add_argument(
        "--all-iterations",
        action="store_true",
        help="the other frames follow: every iteration after the first is drawn again whole, as run would",
    )
    output = parser.add_argument_group("output")
    place = output.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: OUT-edited)")
    place.add_argument(
        "--in-place", action="store_true", help="change OUT itself; the old frames are kept in OUT/before-edit-01"
    )
    place.add_argument("--resume", action="store_true", help="go on with an edit of OUT that was stopped")
    output_options.add_overview_options(output)
    options.add_model_options(parser)
    options.add_worker_options(parser)
    output_options.add_output_options(parser)
    parser.set_defaults(run=_later("editing", "edit"), preset=None, changes={})


def _add_story(commands: Commands) -> None:
    text = "look at a story before it is drawn"
    parser = commands.add_parser("story", help=text, description=f"To {text}.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    check = actions.add_parser(
        "check",
        help="what would be drawn: final prompts, tokens, characters, what is cut off, cost",
        description="Tells what would be drawn of a story, and draws nothing: final prompts, their tokens by the\n"
        "model's own tokenizers, the characters found in them, what the model won't read, and the cost.",
        epilog=examples.CHECK,
    )
    check.add_argument("story", nargs="+", metavar="FILE", help=options.STORY_HELP)
    options.add_language_option(check)
    options.add_method_options(check)
    options.add_checkpoint_options(check)
    check.set_defaults(run=_later("stories", "check"), height=None, width=None, max_frames=None)
    text = "print the JSON Schema of story files, for editors"
    schema = actions.add_parser("schema", help=text, description=f"To {text}.", epilog=examples.SCHEMA)
    schema.set_defaults(run=_later("stories", "schema"))


def _add_book(commands: Commands) -> None:
    text = "make one file of a finished story, a page per frame with its prompt"
    parser = commands.add_parser("book", help=text, description=f"To {text}.")
    parser.add_argument("folder", type=Path, metavar="OUT", help="the output folder of a finished run")
    parser.add_argument(
        "--format",
        default="html",
        choices=("html", "pdf", "cbz"),
        help="html: one page with the pictures inside, for any browser; pdf; cbz, for readers of comics; it is written "
        "to OUT/book.html and so on (default: %(default)s)",
    )
    output_options.add_font_option(parser)
    parser.set_defaults(run=_later("stories", "book"))


def _add_serve(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="draw stories that come over HTTP (extra serve)",
        description="Accepts stories over HTTP, draws them together, and tells what becomes of them. Accepted stories\n"
        "outlive the process: it may be killed at any moment, and goes on when it is started again.",
        epilog=examples.SERVE,
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    server.add_argument(
        "--data", default="story-server", metavar="DIR", help="queue and pictures (default: %(default)s)"
    )
    server.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="API keys, a NAME:SHA256 per line; needed where others can reach the server",
    )
    server.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which the server may be called; may be given several times",
    )
    server.add_argument(
        "--gpu-price", type=float, metavar="P", help="of an hour of a device, to tell what stories cost"
    )
    limits = parser.add_argument_group("limits")
    for setting in fields(Limits):
        text = f"{setting.metadata['help']} (default: %(default)s)"
        limits.add_argument(options.option(setting.name), type=int, default=setting.default, metavar="N", help=text)
    options.add_size_options(parser, as_range=True)
    options.add_preset_option(limits, "of requests that name none, and no settings of their own beside it")
    options.add_model_options(parser)
    options.add_worker_options(parser)
    output_options.add_output_options(parser)
    parser.set_defaults(run=_later("serving", "serve"))


def _add_engines(commands: Commands) -> None:
    text = "what the engine store holds, and delete what of it is old, outdated or too much"
    parser = commands.add_parser("engines", help=f"tell {text}", description=f"Tells {text}.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    text = "a table of all engines: for what, for which models, how large, when last used"
    table = actions.add_parser("list", help=text, description=f"Prints {text}.")
    table.set_defaults(run=_later("machine", "list_engines"))
    prune = actions.add_parser(
        "prune",
        help="delete engines by age, size and program version",
        description="Deletes engines, the least recently used first; never one that is in use or being built.",
        epilog=examples.PRUNE,
    )
    for name, unit, text in (
        ("--older-than", "DAYS", "those that were not used for so many days"),
        ("--keep-under", "GIB", "as many as it takes to keep less than this"),
    ):
        prune.add_argument(name, type=decimal, metavar=unit, help=text)
    prune.add_argument("--outdated", action="store_true", help="those that this version of the program can't open")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.set_defaults(run=_later("machine", "prune_engines"))
    text = "read every file of every engine and say which isn't what was built"
    verify = actions.add_parser("verify", help=text, description=f"{text[0].upper()}{text[1:]}; build repairs it.")
    verify.set_defaults(run=_later("machine", "verify_engines"))
    for action in (table, prune, verify):
        options.add_store_option(action)


def run_program(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Run the command that was typed.

    Args:
        parser: its commands say what runs them, as `run`.
        argv: what was typed, without the program's name; that of this process if None.

    Returns:
        The exit code: 0, 1 (it had to stop), 2 (it can't be done as typed; nothing was written), 130 (Ctrl-C) or
        143 (SIGTERM).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no λ is no reason to fail
    try:
        with sigterm_as_interrupt():
            args = parser.parse_args(argv)
            refuse_small_limit()
            with nullcontext() if getattr(args, "verbose", False) else libraries_silenced():
                return args.run(args)
    except StoryAdapterError as error:
        tell(f"storyadapter-trt: error: {options.typed(error)}")
        return error.exit_code
    except KeyboardInterrupt as stop:
        # where it came within an `exec` of text, as dataclasses make their methods, Python has noted that it wasn't
        # handled, and would end the process by SIGINT instead of with this code; another `exec` takes the note back
        exec("")
        tell("; ".join(["storyadapter-trt: stopped", *getattr(stop, "__notes__", ())]))
        return exit_code_of(stop)
    except BrokenPipeError:  # as when the output is piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail again
        return 1
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            tell(f"error: {error.filename or 'a file'} can't be written: {error.strerror}")
        elif is_out_of_memory(error):
            tell("error: out of memory; end other programs, or raise the limit of this one (ulimit -v)")
        else:
            raise
        return RunError.exit_code


def _later(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """What runs a command, in a module of this room that isn't imported before."""

    def run(args: argparse.Namespace) -> int:
        return getattr(import_module(f"storyadapter.cli.{module}"), function)(args)

    return run
