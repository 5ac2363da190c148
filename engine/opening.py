"""From a checkpoint to the networks of a backend, by its name: engines are found in the store, or built into it."""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.checkpoint.not_finite import explain_not_finite
from storyadapter.engine.backend import EngineRequest, OpenRequest, ReportBytes, ReportFraction, ReportStage
from storyadapter.engine.backends import find_backend
from storyadapter.engine.identity import EngineIdentity, ModelWeights, contract_digest, model_weights
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.engine.uses import ERRORS, hold, note_use
from storyadapter.method.errors import CheckpointError, EngineMismatchError
from storyadapter.model.contract import Geometry, Range, ShapeRanges
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics

_FP32: Final = Numerics("fp32")


def why_outdated(engine: StoredEngine) -> list[str]:
    """In which fields an engine differs from all that this version of the program asks for, in words; empty if in none.

    Not by the libraries that are installed: with others, the same engine may serve.
    """
    stored = engine.identity
    try:
        contract = contract_digest(Geometry.from_dict(engine.details["geometry"]))
    except (KeyError, TypeError):
        return ["its model is described otherwise than by this version of the program"]
    recipe = find_backend(stored.backend).recipe(stored.architecture)
    return stored.differences(replace(stored, contract=contract, build_options=recipe))


def build_engine(
    checkpoint: Checkpoint,
    identity: EngineIdentity,
    ranges: ShapeRanges,
    *,
    options: Any = None,
    engine_dir: Path | None = None,
    on_stage: ReportStage = lambda network, stage: None,
    on_bytes: ReportBytes | None = None,
    on_fraction: ReportFraction = lambda network, fraction: None,
    on_wait: Callable[[str], None] = lambda message: None,
) -> StoredEngine:
    """The engine of this identity for these ranges: from the store if it is there, else built.

    Code that is there is compared with eager if it never was with this checkpoint's weights.

    Args:
        options: those that `identity` was made with.
        on_bytes: called while weight files are read that were never hashed before.

    Raises:
        UnavailableError: the backend can't serve on this machine.
        InputError: the backend needs no build, an option doesn't fit, or the store can't be written.
        EngineBuildError: a compiler or TensorRT refused a network, or it doesn't compute what eager computes.
        RunError: no space is left.
    """
    backend, store = find_backend(identity.backend), EngineStore(engine_dir)
    backend.check(identity.numerics, ranges)
    _check_quantized(checkpoint, identity.numerics)
    weights = model_weights(checkpoint, on_bytes)
    details: dict[str, Any] = {}

    def write(folder: Path) -> dict[str, Any]:
        request = EngineRequest(checkpoint, identity, ranges, options, folder, store.root, on_stage, on_fraction)
        details.update(backend.build(request))
        return {**details, "geometry": checkpoint.geometry.as_dict()}

    engine = store.build(identity, ranges, write, on_wait)
    if not details:
        backend.accept(engine, checkpoint, on_stage)
    note_use(engine.folder, weights.key, checkpoint.label, {ERRORS: details[ERRORS]} if ERRORS in details else None)
    return engine


def open_networks(
    checkpoint: Checkpoint,
    *,
    backend: str = "eager",
    numerics: Numerics = _FP32,
    device: torch.device | str | None = None,
    ranges: ShapeRanges | None = None,
    engine_dir: Path | None = None,
    build_command: str = "storyadapter-trt build",
    on_stage: ReportStage = lambda network, stage: None,
    on_bytes: ReportBytes | None = None,
) -> Networks:
    """The networks of a checkpoint on a backend.

    Args:
        checkpoint: opened model files.
        backend: its name.
        numerics: such as `checkpoint.geometry.numerics("fp16")`; fp32 throughout by default.
        device: of a backend that runs on any; a CUDA GPU if there is one, unless said otherwise. Others have their own:
            the current GPU, or the CPU; no other may be asked for.
        ranges: what the networks are to be used for; a backend with engines takes one that covers them. By default
            one frame of the model's own size and one reference.
        engine_dir: of the engine store; the user's cache folder by default.
        build_command: told to the user when there is no such engine.

    Raises:
        UnavailableError: the backend can't serve here, or not in these numerics, or not on this device.
        EngineMismatchError: no engine in the store fits, or the one that does is damaged.
        CheckpointError: a weight file isn't what it was when it was hashed.
        EngineBuildError: code for any weights computes something else than eager with these.
    """
    chosen = find_backend(backend)
    chosen.check(numerics)
    _check_quantized(checkpoint, numerics)
    own_device = chosen.device(None if device is None else torch.device(device))
    weights = model_weights(checkpoint, on_bytes)
    engine = None
    if chosen.builds:
        own = Range(checkpoint.geometry.default_pixels, checkpoint.geometry.default_pixels)
        identity = chosen.identity(checkpoint, numerics)
        engine = EngineStore(engine_dir).find(identity, ranges or ShapeRanges(1, 1, own, own), build_command)
        release = hold(engine.folder)
    try:
        if engine is not None and (damage := engine.damage()):
            advice = f"build it again: {build_command}"
            raise EngineMismatchError(f"the engine in {engine.folder} is damaged: {damage}", advice=advice)
        request = OpenRequest(checkpoint, numerics, own_device, engine, on_stage)
        if chosen.holds_weights:
            networks = chosen.open(request)
        else:
            with _hashed_while_read(checkpoint, weights):
                networks = chosen.open(request)
        networks = replace(
            networks,
            explain_not_finite=partial(explain_not_finite, checkpoint),
            load_fp32=partial(_load_fp32, checkpoint, weights, own_device),
        )
    except BaseException:
        if engine is not None:
            release()
        raise
    if engine is not None:
        weakref.finalize(networks, release)
        note_use(engine.folder, weights.key, checkpoint.label)
    return networks


def _load_fp32(checkpoint: Checkpoint, weights: ModelWeights, device: torch.device, name: str) -> Networks:
    """See `Networks.load_fp32`."""
    from storyadapter.engine.eager.networks import open_fp32  # imports diffusers, which a run can do without

    if model_weights(checkpoint) != weights:
        raise CheckpointError(f"a file of {checkpoint.label} was changed while it was in use")
    return open_fp32(checkpoint.rewritten({}), device, name)


def _check_quantized(checkpoint: Checkpoint, numerics: Numerics) -> None:
    """Raises ValueError: numerics say that a network is quantized, and this checkpoint doesn't quantize it."""
    for network in numerics.quantizations.keys() - checkpoint.rewrites.keys():
        raise ValueError(f"the checkpoint's {network} isn't quantized; expected scales applied to it for {numerics}")


@contextmanager
def _hashed_while_read(checkpoint: Checkpoint, weights: ModelWeights) -> Iterator[None]:
    """Inside, weights are loaded, and hashed beside that: what is recorded of them is what was read.

    Raises:
        CheckpointError: a file isn't what it was when it was hashed before, under the same size and times.
    """
    left = False

    def watch(done: int, total: int) -> None:
        if left:
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(model_weights, checkpoint, watch, anew=True)
        try:
            yield
            read = reading.result()
        finally:
            left = True  # where something failed, the rest needn't be read
        names = [file.name for file in weights.files] + [lora.name for lora in weights.loras]
        pairs = zip((*weights.files, *weights.loras), (*read.files, *read.loras), strict=True)
        for name, (before, now) in zip(names, pairs, strict=True):
            if before != now:
                raise CheckpointError(
                    f"{name} isn't what it was when it was hashed, though its size and times are the same",
                    advice="type the same command again if it is to be used as it is now",
                )
