"""From a model's files to a pipeline, in one call: where Python programs begin."""

import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from storyadapter.checkpoint import Checkpoint, CheckpointPaths, LoraSpec
from storyadapter.engine.backend import ReportBytes, ReportStage, checked_device
from storyadapter.engine.backends import AUTO, find_backend
from storyadapter.engine.calibration import find_scales, quantized
from storyadapter.engine.identity import model_weights
from storyadapter.engine.opening import open_networks
from storyadapter.method.control_pictures import Controls, control_identity, control_paths, read_controls
from storyadapter.method.errors import EngineMismatchError, Field, InputError, UnavailableError
from storyadapter.method.events import Event, RunFinished
from storyadapter.method.plan import RunPlan
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.numerics import (
    NUMBER_FORMATS,
    PRECISIONS,
    VAE_NUMBER_FORMATS,
    NumberFormat,
    Numerics,
    Precision,
    Quantization,
    vae_arithmetic,
)
from storyadapter.output.edits import Edit
from storyadapter.output.frame_files import frame_text
from storyadapter.output.run_folder import RunFolder
from storyadapter.output.run_record import json_values
from storyadapter.runtime.conditioning import Tokenizers
from storyadapter.runtime.given_pictures import picture_keys
from storyadapter.runtime.pipeline import Pipeline, StoryPipeline

if TYPE_CHECKING:
    from storyadapter.runtime.ray_pipeline import RayPipeline

# Ray reads it when it is imported: without it, its processes listen on all addresses of a machine, also under Linux
_RAY_BEYOND_LOOPBACK: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def open(  # as of a file: what it gives is ready for use
    base_model: Path | str | None = None,
    image_encoder: Path | str | None = None,
    ip_adapter: Path | str | None = None,
    *,
    backend: str = AUTO,
    precision: str = AUTO,
    vae_precision: str = AUTO,
    device: str | None = None,
    loras: Sequence[LoraSpec | str] = (),
    controlnets: Sequence[Path | str] = (),
    unet: Path | str | None = None,
    vae: Path | str | None = None,
    reference_vae: Path | str | None = None,
    base_config: Path | str | None = None,
    variant: str | None = None,
    height: int | None = None,
    width: int | None = None,
    max_references: int = 1,
    max_prompt_chunks: int = 1,
    engine_dir: Path | None = None,
    on_stage: ReportStage = lambda network, stage: None,
) -> StoryPipeline:
    """A pipeline of a model, with the command line's defaults; of the demo model if no model is named.

    >>> import storyadapter
    >>> pipeline = storyadapter.open(backend="eager")  # the demo model, with plain PyTorch
    >>> story = storyadapter.Story.from_prompts(["a red fox is reading a book", "a red fox is running at night"])
    >>> for event in pipeline.run(story, storyadapter.RunPlan(seed=7)):
    ...     if isinstance(event, storyadapter.FrameFinished):
    ...         event.picture.save(f"{event.iteration}-{event.frame}.png")

    Args:
        base_model: a diffusers SDXL folder, a hub name in the local cache, or one .safetensors file.
        image_encoder, ip_adapter: those that go with it; all three are given or none.
        backend: "auto" (the fastest here that has the precisions named) or a name, see `storyadapter-trt doctor`. All
            but "eager" need an engine in the store, which `storyadapter-trt build` makes.
        precision: "auto" (fp16 on a GPU, fp32 on a CPU), "fp32", "fp16", "bf16", or "fp8" or "int8" for a denoiser with
            8-bit products, whose scales `storyadapter-trt build` finds.
        vae_precision: of the VAE alone; "auto" is fp32 where the checkpoint asks for it, else as `precision`; "fp8" is
            for its convolutions over 8-bit operands, all else in bf16, with scales as of a denoiser.
        device: "cpu", "cuda" or "cuda:1"; by default the current GPU if there is one. Another GPU becomes the current
            one of the calling thread, and of those that draw.
        loras: "style.safetensors:0.8", or `LoraSpec`; fused in this order.
        controlnets: for SDXL; a plan's `controls` say how each is used, a story's frames have the pictures.
        unet, vae, base_config, variant: see `CheckpointPaths`.
        reference_vae: a tiny VAE that decodes every iteration but the last, whose pictures only become references.
        height, width: that an engine is to serve; the model's own by default.
        max_references: frames of the longest story that an engine is to serve.
        max_prompt_chunks: of 75 tokens, of the longest prompt that an engine is to serve.
        engine_dir: of the engine store; the user's cache folder by default.
        on_stage: called with a network's name and what is done with it.

    Raises:
        InputError: only some of the three parts are given, or a value can't be served; `field` names it.
        CheckpointError: a file is missing or corrupt, or the parts don't fit each other.
        UnavailableError: the backend, the device or the precision can't be had here.
        EngineMismatchError: the store has no such engine, or no scales of a model that is to be quantized; the text has
            the command that builds it.
    """
    asked = None if device is None else checked_device(device)
    asked_for = (("precision", precision, NUMBER_FORMATS), ("vae_precision", vae_precision, VAE_NUMBER_FORMATS))
    for field, name, more in asked_for:
        if name not in (AUTO, *PRECISIONS, *more):
            raise InputError(Field(field), f" is {name}", expected=f"one of {', '.join((AUTO, *PRECISIONS, *more))}")
    chosen = find_backend(backend, asked, precision=precision, vae_precision=vae_precision)
    main = cast(Precision, precision) if precision in PRECISIONS else chosen.default_precision(asked)
    of_vae = vae_arithmetic(vae_precision)
    quantization = Quantization(cast(NumberFormat, precision)) if precision in NUMBER_FORMATS else None
    chosen.check(Numerics.of(main, quantization, vae_decoder=of_vae))
    specs = tuple(lora if isinstance(lora, LoraSpec) else LoraSpec.parse(lora) for lora in loras)
    paths = CheckpointPaths.given(
        base_model,
        image_encoder,
        ip_adapter,
        base_config=base_config,
        unet=unet,
        vae=vae,
        reference_vae=reference_vae,
        loras=specs,
        controlnets=tuple(controlnets),
        variant=variant,
    )
    checkpoint = Checkpoint.open(paths)
    numerics = checkpoint.geometry.numerics(main, of_vae, quantization)
    if numerics.quantizations:
        if (scales := find_scales(engine_dir, model_weights(checkpoint).key, numerics.quantizations)) is None:
            of_network = {"denoiser": f" --precision {precision}", "vae_decoder": f" --vae-precision {vae_precision}"}
            options = "".join(words for name, words in of_network.items() if name in numerics.quantizations)
            advice = f"build it: storyadapter-trt build{options}"
            raise EngineMismatchError(f"no scales of {checkpoint.label} in the engine store", advice=advice)
        checkpoint, numerics = quantized(checkpoint, numerics, scales)
    own = checkpoint.geometry.default_pixels
    tall, wide = (Range(pixels or own, pixels or own) for pixels in (height, width))
    return open_checkpoint(
        checkpoint,
        backend=chosen.name,
        numerics=numerics,
        device=device,
        ranges=ShapeRanges(1, max_references, tall, wide, max_prompt_chunks),
        engine_dir=engine_dir,
        on_stage=on_stage,
    )


def open_checkpoint(
    checkpoint: Checkpoint,
    *,
    backend: str = AUTO,
    numerics: Numerics | None = None,
    device: str | None = None,
    ranges: ShapeRanges | None = None,
    engine_dir: Path | None = None,
    build_command: str = "storyadapter-trt build",
    on_stage: Callable[[str, str], None] = lambda network, stage: None,
    on_bytes: ReportBytes | None = None,
) -> StoryPipeline:
    """A pipeline of a checkpoint that is open already; what it draws is keyed by the checkpoint's files.

    Args:
        checkpoint: opened model files.
        backend: its name; by default the fastest that serves here.
        numerics: such as `checkpoint.geometry.numerics("fp16")`; by default the backend's usual precision, and fp32 for
            a VAE whose configuration asks for it.
        device: as of `open`.
        ranges, engine_dir, build_command, on_stage: see `open_networks`.
        on_bytes: called while weight files are read that were never hashed before.

    Raises:
        UnavailableError, EngineMismatchError, EngineBuildError: see `open_networks`.
        CheckpointError: a file can't be read.
    """
    asked = None if device is None else checked_device(device)
    if asked is not None and asked.index is not None:
        torch.cuda.set_device(asked)
    named = {"precision": numerics.name, "vae_precision": numerics.named("vae_decoder")} if numerics else {}
    chosen = find_backend(backend, asked, **named)
    networks = open_networks(
        checkpoint,
        backend=chosen.name,
        numerics=numerics or checkpoint.geometry.numerics(chosen.default_precision(asked)),
        device=asked,
        ranges=ranges,
        engine_dir=engine_dir,
        build_command=build_command,
        on_stage=on_stage,
        on_bytes=on_bytes,
    )
    return StoryPipeline(
        networks,
        checkpoint.load_tokenizers(),
        model=model_weights(checkpoint, on_bytes).key,
        sampling=checkpoint.sampling,
    )


def edit(
    pipeline: Pipeline,
    folder: Path | str,
    changes: Mapping[int, str | Mapping[str, Any]],
    *,
    out: Path | str | None = None,
    all_iterations: bool = False,
) -> Generator[Event, None, None]:
    """Draw some frames of a finished run again, in every iteration, with references to all others as they are.

    >>> for event in storyadapter.edit(pipeline, "tale", {7: "Ada sleeps", 9: {"seed": 3}}, out="tale-2"):
    ...     print(event)

    Args:
        pipeline: of the model that drew the run.
        folder: of the run, as `storyadapter-trt run` and the server leave it.
        changes: frame → its new prompt, or those of "prompt", "negative", "seed" and "control" that are new.
        out: a new folder; by default the run's own is changed, and the old frames are kept in `before-edit-01`.
        all_iterations: whether the other frames follow: every iteration after the first is drawn again whole.

    Yields:
        Events, as `Pipeline.run`; the folder is finished before `RunFinished`.

    Raises:
        InputError: before the first event, and with nothing written: see `Edit.of`; or another model drew the run.
        RunError, torch.OutOfMemoryError: as `Pipeline.run`.
    """
    named = {number: {"prompt": new} if isinstance(new, str) else new for number, new in changes.items()}
    changed = Edit.of(Path(folder), named, follows=all_iterations)
    before, numerics = changed.run.record.identity, pipeline.networks.numerics
    drew = before.get("numerics", (before.get("precision"), before.get("vae_precision")))
    if before.get("model") != pipeline.model or drew not in (
        json_values(numerics.as_values()),
        (numerics.name, numerics.named("vae_decoder")),
    ):
        raise InputError(f"{folder} was drawn by another model, or in another precision", expected="the same")
    plan = pipeline.decided(changed.run.plan)
    keys = picture_keys(pipeline.check(changed.story, plan, changed.run.style))
    controls = read_controls(changed.story, plan)
    changed.check(None if out is None else Path(out))
    identity = changed.identity(keys, control_identity(controls).get("control"))
    return _edited(pipeline, changed, identity, plan, controls, None if out is None else Path(out))


def _edited(
    pipeline: Pipeline, changed: Edit, identity: Mapping[str, Any], plan: RunPlan, controls: Controls, out: Path | None
) -> Generator[Event, None, None]:
    story, style = changed.story, changed.run.style
    with (
        RunFolder.open(
            changed.begin(identity, out),
            identity,
            frames=len(story.frames),
            scales=changed.run.record.scales,
            resume=True,
            keep=changed.run.keep,
            details={"control_pictures": control_paths(story)} if any(controls) else {},
            text=frame_text(story.final_frames(plan, style)),
            edited=True,
        ) as store,
        closing(pipeline.run(story, plan, style=style, store=store, controls=controls)) as events,
    ):
        for event in events:
            if isinstance(event, RunFinished):
                store.finish(event.seconds, story.prompts, story.title)
            yield event


def open_workers(
    checkpoint: Checkpoint,
    *,
    workers: int | None = None,
    address: str | None = None,
    on_wait: Callable[[str], None] = lambda message: None,
    **how: Any,
) -> Pipeline:
    """A pipeline whose frames are drawn by Ray actors, each on a device of its own; close it.

    Args:
        checkpoint: opened model files, which lie at the same paths on every machine.
        workers: how many; by default one for each GPU of the cluster.
        address: of a running Ray cluster; by default Ray is started on this machine alone.
        on_wait: called with one line when no worker could begin for a while, as where no device is free.
        how: other arguments of `open_checkpoint`, which every actor calls.

    Raises:
        UnavailableError: Ray isn't installed.
        StoryAdapterError: see `open_checkpoint`, and `RayPipeline`.
    """
    tokenizers = Tokenizers(*checkpoint.load_tokenizers())
    opening = partial(open_checkpoint, checkpoint, **how)
    return open_ray(opening, tokenizers, workers=workers, address=address, on_wait=on_wait)


def open_ray(
    open_pipeline: Callable[[], StoryPipeline],
    tokenizers: Tokenizers,
    *,
    workers: int | None = None,
    address: str | None = None,
    on_wait: Callable[[str], None] = lambda message: None,
) -> "RayPipeline":
    """The same for any model that every actor can open.

    Args:
        open_pipeline: is pickled, and called in every actor.
        tokenizers: of the same checkpoint.
        workers, address, on_wait: as of `open_workers`.

    Raises:
        UnavailableError: Ray isn't installed.
        InputError: Ray was imported before, and would listen beyond the loopback address.
        StoryAdapterError: see `RayPipeline`.
    """
    if address is None:
        imported = sys.modules.get("ray")
        if imported and os.environ.get(_RAY_BEYOND_LOOPBACK) != "0" and not imported.is_initialized():
            raise InputError(
                "Ray was imported before workers were opened, and would listen on every address of this machine",
                advice=f"import it later, or set {_RAY_BEYOND_LOOPBACK}=0 before, or call ray.init yourself",
            )
        os.environ[_RAY_BEYOND_LOOPBACK] = "0"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it tells its makers
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # or it prints what it thinks of each lost worker
    try:
        from storyadapter.runtime.ray_pipeline import RayPipeline
    except ImportError as error:
        advice = "pip install 'storyadapter-trt[ray]'"
        raise UnavailableError("Ray isn't installed, which runs workers", advice=advice) from error
    return RayPipeline(open_pipeline, tokenizers, workers=workers, address=address, on_wait=on_wait)
