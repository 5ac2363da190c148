"""The options of the command line, and from them the typed values of the program. Imports nothing heavy."""

import argparse
import shlex
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from storyadapter.checkpoint import CheckpointPaths, ControlNetSpec, LoraSpec
from storyadapter.cli.control_options import control_settings
from storyadapter.cli.devices import device_name
from storyadapter.cli.values import PLAN_VALUES, decimal, frames_or_auto, pixel_range, positive, scales_list
from storyadapter.engine.backend import Backend
from storyadapter.engine.backends import AUTO, BACKENDS
from storyadapter.method import constants
from storyadapter.method.errors import InputError, StoryAdapterError, spelled
from storyadapter.method.plan import FRAMES_UNMEASURED, RunPlan
from storyadapter.method.presets import PRESETS, with_preset
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.numerics import NUMBER_FORMATS, PRECISIONS, VAE_NUMBER_FORMATS, Numerics

MAX_REFERENCES = 100
STORY_HELP = (
    "a story file (.yaml, .yml, .json, .csv, .tsv, .txt, .md), - for standard input, a story folder of ViStoryBench, "
    "or several prompts"
)
PLAN_HELP = {item.name: item.metadata["help"] for item in fields(RunPlan) if item.metadata.get("typed", True)}


def option(name: str) -> str:
    """A setting's option: "vae_precision" → "--vae-precision"."""
    return "--" + name.replace("_", "-")


def typed(error: Exception) -> str:
    """An error's text, with the options to type where it names settings."""
    return error.text(option) if isinstance(error, StoryAdapterError) else str(error)


def add_story_options(parser: argparse.ArgumentParser) -> None:
    """Which story."""
    group = parser.add_argument_group("story")
    story = group.add_mutually_exclusive_group()
    story.add_argument("--story", nargs="+", metavar="FILE", help=STORY_HELP)
    story.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one prompt per frame")
    add_language_option(group)


def add_language_option(parser: argparse._ActionsContainer) -> None:
    """Of stories that are there in several."""
    parser.add_argument(
        "--language",
        default="en",
        metavar="L",
        help="of a folder of ViStoryBench, whose texts are there in en and ch (default: %(default)s)",
    )


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """What decides the pictures besides story, model and size."""
    look = parser.add_argument_group("method (defaults are the published values, but that of --prompt-chunks)")
    look.add_argument(
        "--style", metavar="STYLE", help="comic, film, realistic or none (default: the story's, or comic)"
    )
    count = look.add_mutually_exclusive_group()
    count.add_argument(
        "--iterations",
        type=int,
        metavar="K",
        help="iterations after the text-only one, with λ from 0.3 to 0.5; of a run that is gone on with, what it lacks "
        f"repeats its last λ (default: {constants.ITERATIONS}, or a preset's)",
    )
    count.add_argument("--scales", type=scales_list, metavar="λ,λ,…", help=PLAN_HELP["scales"])
    add_plan_options(look)


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which model and LoRAs."""
    model = parser.add_argument_group(
        "model", "Without these, the demo model of this project is used. The published scripts' spellings work too."
    )
    model.add_argument(
        "--base-model",
        "--base_model_path",
        metavar="P",
        help="SDXL checkpoint: a diffusers folder, a hub name in the local cache, or one .safetensors file",
    )
    model.add_argument(
        "--image-encoder",
        "--image_encoder_path",
        metavar="P",
        help="folder of the adapter's CLIP image encoder with projection, or OWNER/NAME/FOLDER in the local hub cache",
    )
    model.add_argument(
        "--ip-adapter",
        "--ip_ckpt",
        metavar="P",
        help="IP-Adapter for SDXL with 4 tokens, .safetensors or .bin, or OWNER/NAME/FILE in the local hub cache",
    )
    model.add_argument(
        "--base-config", metavar="DIR", help="diffusers folder with the configuration of a single-file --base-model"
    )
    model.add_argument(
        "--unet",
        metavar="P",
        help="another UNet of SDXL in place of the checkpoint's own, such as LCM's or SDXL-Lightning's: a diffusers "
        "folder or a file",
    )
    model.add_argument("--vae", metavar="P", help="another VAE: a diffusers folder or a .safetensors file")
    model.add_argument("--variant", metavar="V", help="prefer weight files of this variant, such as fp16")
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="P[:SCALE]",
        help="LoRA or LoCon fused into the model, with its scale (default 1); may be given several times. Read are the "
        "layouts of kohya, diffusers, peft, OneTrainer, ComfyUI and LyCORIS (docs/model-files.md); demo-lcm is the "
        "demo model's own, for --preset lcm-lora",
    )
    parser.set_defaults(controlnet=(), reference_vae=None)  # of commands that take none


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, LoRAs, backend and engine; the same for `build` and `run`."""
    add_checkpoint_options(parser)
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend",
        default=AUTO,
        choices=(AUTO, *BACKENDS),
        help="what runs the networks (default: auto, the fastest here that has the precisions typed; see doctor)",
    )
    engine.add_argument(
        "--device",
        type=device_name,
        metavar="D",
        help="cuda:1 for the second GPU, cpu for none (default: the first GPU, if there is one)",
    )
    engine.add_argument(
        "--precision",
        default=AUTO,
        choices=(AUTO, *PRECISIONS, *NUMBER_FORMATS),
        help="of weights and activations (default: auto, fp16 on a GPU, fp32 on a CPU); fp8, int8: the denoiser's "
        "products over 8-bit operands, whose scales build finds by drawing stories (needs nvidia-modelopt once)",
    )
    engine.add_argument(
        "--vae-precision",
        default=AUTO,
        choices=(AUTO, *PRECISIONS, *VAE_NUMBER_FORMATS),
        help="of the VAE alone: fp32 is the safest and takes several times as long to decode on a GPU; bf16 is fast "
        "and rounds the most; fp16 is fast too, with activations divided by 16 where the VAE's configuration says "
        "force_upcast, as SDXL's own overflow in it; fp8: bf16, its convolutions over 8-bit operands, whose scales "
        "build finds as for --precision fp8 (default: auto, fp32 if it says so, else as --precision)",
    )
    engine.add_argument(
        "--max-frames",
        type=frames_or_auto,
        default=AUTO,
        metavar="F",
        help=f"{PLAN_HELP['max_frames']} (default: auto, for run as many as the engine takes and "
        f"the GPU's memory holds, for build and without a GPU {FRAMES_UNMEASURED})",
    )
    add_store_option(engine)
    parser.set_defaults(calibration_story=None)  # of commands that calibrate nothing


def add_calibration_option(parser: argparse.ArgumentParser) -> None:
    """How `build` finds the scales of 8-bit products."""
    group = parser.add_argument_group("8-bit products (--precision fp8 or int8, --vae-precision fp8)")
    group.add_argument(
        "--calibration-story",
        metavar="FILE",
        help="draw this story to find their scales: for a model that knows other words than the 64 built-in prompts. "
        "run takes the scales by the story that was typed last, and says which (default: the built-in ones)",
    )


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """On how many devices stories are drawn."""
    group = parser.add_argument_group("many devices (extra ray)")
    group.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="draw on N GPUs of this machine, or in N processes without one (default: in this process; with --ray, on "
        "every GPU of the cluster)",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="draw on the machines of a running Ray cluster, such as 10.0.0.1:6379, or auto; model and engine lie at "
        "the same paths on all of them, and whoever can reach the cluster can run programs on it",
    )


def add_store_option(parser: argparse._ActionsContainer) -> None:
    """Where engines lie."""
    parser.add_argument("--engine-dir", type=Path, metavar="D", help="engine store (default: in the user's cache)")


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """How `build` builds: each backend's own settings."""
    for backend in BACKENDS.values():
        if backend.settings:
            group = parser.add_argument_group(f"backend {backend.name}")
        for setting in backend.settings:
            group.add_argument(
                option(setting.name),
                type=setting.kind,
                action="append" if setting.several else "store",
                default=setting.default,
                metavar=setting.placeholder,
                help=spelled(setting.help, option),
            )


def backend_options(args: argparse.Namespace, backend: Backend) -> Any:
    """How a backend is to build; see `Backend.options`.

    Raises:
        InputError: a value that can't be served, or a setting of another backend's.
    """
    for other in BACKENDS.values():
        given = [s.name for s in other.settings if getattr(args, s.name) != s.default]
        if given and other is not backend:
            names = " and ".join(map(option, given))
            raise InputError(f"{names} given for backend {backend.name}", expected=f"--backend {other.name} with it")
    return backend.options({setting.name: getattr(args, setting.name) for setting in backend.settings})


def add_size_options(parser: argparse.ArgumentParser, *, as_range: bool) -> None:
    """--height and --width: one number, or what an engine is to serve: also ranges, and the length of stories."""
    group = parser.add_argument_group("picture size")
    for name in ("height", "width"):
        extra = "; MIN:MAX builds for a range" if as_range else ""
        group.add_argument(
            f"--{name}",
            type=pixel_range if as_range else int,
            metavar=name[0].upper(),
            help=f"{PLAN_HELP[name]} (default: the model's own, 1024 for SDXL){extra}",
        )
    if as_range:
        parser.add_argument(
            "--max-references",
            type=int,
            default=MAX_REFERENCES,
            metavar="N",
            help="frames of the longest story (default: %(default)s)",
        )
        parser.add_argument(
            "--max-prompt-chunks",
            type=int,
            default=1,
            metavar="M",
            help="chunks of 75 tokens of the longest prompt (default: %(default)s)",
        )


def add_preset_option(group: "argparse._ArgumentGroup", wins: str) -> None:
    """--preset; `wins`: what is stronger, for the help."""
    words = "; ".join(f"{name}: {preset.purpose}" for name, preset in PRESETS.items())
    text = f"scheduler, time steps, steps, guidance and iterations by one word; {wins}. {words}"
    group.add_argument("--preset", choices=tuple(PRESETS), help=text.replace("%", "%%"))


def add_plan_options(group: "argparse._ArgumentGroup") -> None:
    """Options of those fields of a plan that are typed as they are, and presets of them."""
    add_preset_option(group, "what is typed beside it wins")
    for setting in fields(RunPlan):
        if setting.name not in PLAN_HELP or setting.name in ("height", "width", "scales", "max_frames"):
            continue  # these have forms of their own
        more = {**setting.metadata}
        shown = more.pop("shown", setting.default)
        if shown is MISSING:
            shown = "drawn, shown and written to story.json"
        more["help"] = f"{more['help']} (default: {shown})".strip().replace("%", "%%")
        if setting.type is bool:
            more |= {"action": "store_true", "default": None, "help": setting.metadata["help"]}
        elif setting.type == bool | None:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["type"] = PLAN_VALUES.get(setting.name, decimal if setting.type is float else setting.type)
        group.add_argument(option(setting.name), **more)


def given_checkpoint_options(args: argparse.Namespace) -> dict[str, list[str]]:
    """The values of those options of `add_checkpoint_options` that were typed, by option."""
    single = ("base_model", "image_encoder", "ip_adapter", "base_config", "unet", "vae", "reference_vae", "variant")
    given = {option(name): [getattr(args, name)] for name in single if getattr(args, name)}
    controlnets = [str(ControlNetSpec.parse(text).path) for text in args.controlnet]
    return given | {name: values for name, values in (("--lora", args.lora), ("--controlnet", controlnets)) if values}


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command is about; `label` names it for people."""

    paths: CheckpointPaths
    label: str


def model_choice(args: argparse.Namespace) -> ModelChoice:
    """The model that was asked for, or the demo model.

    Raises:
        InputError: only some of the three model options were given, or a LoRA can't be read off its option.
    """
    paths = CheckpointPaths.given(
        args.base_model,
        args.image_encoder,
        args.ip_adapter,
        base_config=args.base_config,
        unet=args.unet,
        vae=args.vae,
        loras=tuple(LoraSpec.parse(text) for text in args.lora),
        controlnets=tuple(ControlNetSpec.parse(text).path for text in args.controlnet),
        reference_vae=args.reference_vae,
        variant=args.variant,
    )
    return ModelChoice(paths, "the demo model" if args.base_model is None else str(args.base_model))


def shape_ranges(args: argparse.Namespace, default_pixels: int) -> ShapeRanges:
    """What `build` was asked to build for."""
    own = Range(default_pixels, default_pixels)
    max_frames = FRAMES_UNMEASURED if args.max_frames is None else args.max_frames
    height, width = args.height or own, args.width or own
    return ShapeRanges(max_frames, args.max_references, height, width, args.max_prompt_chunks)


def run_plan(args: argparse.Namespace, default_pixels: int, seed: int, recorded: tuple[float, ...] = ()) -> RunPlan:
    """The settings of `run`, checked.

    Args:
        recorded: λ of a run that is gone on with: more iterations than it has repeat the last one.

    Raises:
        InputError: a value that can't be served.
    """
    instead = {"height": default_pixels, "width": default_pixels}
    typed = {name: value for name in PLAN_HELP if (value := getattr(args, name)) is not None}
    if (asked := args.iterations) is not None and args.scales is None:
        if asked < 0:
            raise InputError(f"--iterations is {asked}", expected="0 (text only) or more")
        more = asked - len(recorded) if recorded else 0
        typed["scales"] = (*recorded, *recorded[-1:] * more) if more > 0 else constants.reference_scales(asked)
    settings: dict[str, Any] = {**instead, **with_preset(args.preset, typed), "seed": seed}
    return RunPlan(**settings, controls=control_settings(args))


def build_command(args: argparse.Namespace, backend: str, numerics: Numerics, ranges: ShapeRanges) -> str:
    """The `build` command whose engine serves these ranges, as it would be typed."""
    words: list[Any] = ["storyadapter-trt", "build"]
    for option, values in given_checkpoint_options(args).items():
        for value in values:
            words += [option, value]
    words += ["--device", args.device] if args.device else []
    words += ["--backend", backend, "--precision", numerics.name, "--vae-precision", numerics.named("vae_decoder")]
    words += ["--height", str(ranges.height).replace("..", ":"), "--width", str(ranges.width).replace("..", ":")]
    words += ["--max-frames", ranges.max_frames, "--max-references", max(MAX_REFERENCES, ranges.max_references)]
    if ranges.max_prompt_chunks > 1:
        words += ["--max-prompt-chunks", ranges.max_prompt_chunks]
    if args.calibration_story:
        words += ["--calibration-story", args.calibration_story]
    if args.engine_dir:
        words += ["--engine-dir", args.engine_dir]
    return shlex.join(map(str, words))
