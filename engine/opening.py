"""From a checkpoint to the networks of a backend: the one place where backends and the method meet."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backends import check_available, default_device, installed_version
from storyadapter.engine.fingerprint import fingerprint_files
from storyadapter.engine.identity import EngineIdentity, FusedLora, WeightFile, contract_digest
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.engine.tensorrt.library import Library, choose_library, gpu_target
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.export import EXPORT_VERSION, OPSET
from storyadapter.method.errors import Field, InputError, UnavailableError
from storyadapter.model.contract import Geometry, Range, ShapeRanges
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import Numerics

_FP32: Final = Numerics("fp32")

ReportStage = Callable[[str, str], None]  # network ("" for none in particular), what is being done
ReportBytes = Callable[[int, int], None]  # bytes read, bytes to be read
ReportFraction = Callable[[str, float], None]  # network, how much of its engine is built


def identify(
    checkpoint: Checkpoint,
    backend: str,
    numerics: Numerics,
    on_bytes: ReportBytes | None = None,
    *,
    targets: tuple[str, ...] = (),
    options: BuildOptions | None = None,
) -> EngineIdentity:
    """Everything that what a backend computes with this checkpoint depends on.

    Args:
        on_bytes: called while weight files are read that were never hashed before.
        targets: architectures that `tensorrt` builds for, such as "sm89"; by default that of the GPU here.
        options: how `tensorrt` builds.

    Raises:
        CheckpointError: a file can't be read.
        UnavailableError: no TensorRT that is installed serves the targets.
    """
    version, architecture = installed_version("torch" if backend == "eager" else backend) or "", "any"
    if backend == "tensorrt":
        library, targets = choose_library(targets, gpu_target())
        version, architecture = str(library), "+".join(targets)
    elif backend == "inductor":
        from storyadapter.engine.inductor import target

        version, architecture = target.compiler_versions(default_device()), target.target_architecture(default_device())
    components = checkpoint.files_by_component
    loras = [lora.path for lora in checkpoint.loras]
    digests = fingerprint_files([*(path for paths in components.values() for path in paths), *loras], on_bytes)
    return EngineIdentity(
        backend=backend,
        backend_version=version,
        numerics=numerics,
        architecture=architecture,
        contract=contract_digest(checkpoint.geometry),
        weights=tuple(
            WeightFile(component, path.name, digests[path]) for component, paths in components.items() for path in paths
        ),
        loras=tuple(FusedLora(lora.path.name, digests[lora.path], lora.scale) for lora in checkpoint.loras),
        build_options=_build_options(backend, default_device()),
        tuning=options.named() if options else (),
    )


def _build_options(backend: str, device: torch.device) -> tuple[tuple[str, str], ...]:
    """What in this version of the program decides what a backend's build makes, name and value."""
    if backend == "eager":
        return ()
    if backend == "inductor":
        from storyadapter.engine.inductor import target

        return target.build_options(device)
    return ("opset", str(OPSET)), ("export", str(EXPORT_VERSION))


def why_outdated(engine: StoredEngine) -> list[str]:
    """In which fields an engine differs from all that this version of the program asks for, in words; empty if in none.

    Not by the libraries that are installed: with others, the same engine may serve.
    """
    stored = engine.identity
    device = torch.device("cuda" if stored.architecture.startswith("sm") else "cpu")
    try:
        contract = contract_digest(Geometry.from_dict(engine.details["geometry"]))
    except (KeyError, TypeError):
        return ["its model is described otherwise than by this version of the program"]
    asked = replace(stored, contract=contract, build_options=_build_options(stored.backend, device))
    return stored.differences(asked)


def check_build(backend: str, numerics: Numerics, ranges: ShapeRanges) -> None:
    """What can be told of a build before the weights are read.

    Raises:
        UnavailableError: the backend can't serve on this machine.
        InputError: it can't be built for these ranges.
    """
    check_available(backend, numerics, to_build=True)
    if backend == "inductor":
        from storyadapter.engine.inductor.builder import check_ranges

        check_ranges(ranges)


def build_engine(
    checkpoint: Checkpoint,
    identity: EngineIdentity,
    ranges: ShapeRanges,
    *,
    options: BuildOptions | None = None,
    engine_dir: Path | None = None,
    on_stage: ReportStage = lambda network, stage: None,
    on_fraction: ReportFraction = lambda network, fraction: None,
    on_wait: Callable[[str], None] = lambda message: None,
) -> StoredEngine:
    """The engine of this identity for these ranges: from the store if it is there, else built.

    Args:
        options: those that `identity` was made with.

    Raises:
        UnavailableError: the backend can't serve on this machine.
        InputError: the backend needs no build, an option doesn't fit, or the store can't be written.
        ExportError: an exported network doesn't compute what eager computes.
        EngineBuildError: a compiler or TensorRT refused a network.
        RunError: no space is left.
    """
    check_build(identity.backend, identity.numerics, ranges)
    store = EngineStore(engine_dir)
    if identity.backend == "tensorrt":
        options = options or BuildOptions()
        library, targets = choose_library(tuple(identity.architecture.split("+")), gpu_target())
        options.check(ranges, library)
        from storyadapter.engine.tensorrt.builder import build_tensorrt

        def write(folder: Path) -> dict[str, Any]:
            return build_tensorrt(
                checkpoint,
                identity.numerics,
                ranges,
                library,
                targets,
                options,
                folder,
                _timing_cache(store, library, targets),
                on_stage,
                on_fraction,
            )

    elif identity.backend == "onnxruntime":
        from storyadapter.engine.onnxruntime.builder import build_onnx

        def write(folder: Path) -> dict[str, Any]:
            errors = build_onnx(checkpoint, identity.numerics, ranges, folder, on_stage)
            return {"relative_error_against_eager": errors}

    elif identity.backend == "inductor":
        from storyadapter.engine.inductor.builder import build_inductor

        def write(folder: Path) -> dict[str, Any]:
            errors = build_inductor(checkpoint, identity.numerics, ranges, folder, default_device(), on_stage)
            return {"relative_error_against_eager": errors}

    else:
        raise InputError(f"backend {identity.backend} needs no build; type the same command with run instead of build")

    def write_with_geometry(folder: Path) -> dict[str, Any]:
        return {**write(folder), "geometry": checkpoint.geometry.as_dict()}

    return store.build(identity, ranges, write_with_geometry, on_wait)


def _timing_cache(store: EngineStore, library: Library, targets: tuple[str, ...]) -> Path | None:
    """Where TensorRT keeps what it measured of single layers, for all builds; TensorRT-RTX measures nothing."""
    return store.root / f"timing-{library.version}-{targets[0]}.cache" if library.has_plugins else None


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
    """The seven networks of a checkpoint on a backend.

    Args:
        checkpoint: opened model files.
        backend: a name of `storyadapter.engine.backends.BACKENDS`.
        numerics: such as `checkpoint.geometry.numerics("fp16")`; fp32 throughout by default.
        device: of `eager`; a CUDA GPU if there is one, unless said otherwise. Others have their own: the current GPU,
            or the CPU; no other may be asked for.
        ranges: what the networks are to be used for; a backend with engines takes one that covers them. By default
            one frame of the model's own size and one reference.
        engine_dir: of the engine store; the user's cache folder by default.
        build_command: told to the user when there is no such engine.

    Raises:
        UnavailableError: the backend can't serve here, or not in these numerics, or not on this device.
        EngineMismatchError: no engine in the store fits.
    """
    geometry = checkpoint.geometry
    check_available(backend, numerics)
    if backend == "eager":
        from storyadapter.engine.eager import open_eager

        chosen = torch.device(device) if device else default_device()
        return open_eager(checkpoint, numerics, chosen, lambda network: on_stage(network, "loading weights"))
    if backend == "tensorrt" and gpu_target() is None:
        raise UnavailableError(
            "backend tensorrt builds here but can't run here: there is no GPU that PyTorch can use",
            expected=("another ", Field("backend"), ", or a machine with a GPU"),
        )
    own_device = torch.device("cpu") if backend == "onnxruntime" else default_device()
    if device is not None and not _is_device(torch.device(device), own_device):
        raise UnavailableError(
            f"backend {backend} runs on {own_device} here; {device} asked for; expected no device, or backend eager"
        )
    own = Range(geometry.default_pixels, geometry.default_pixels)
    wanted = ranges or ShapeRanges(1, 1, own, own)
    identity = identify(checkpoint, backend, numerics, on_bytes)
    engine = EngineStore(engine_dir).find(identity, wanted, build_command)
    letters = engine.ranges.letters(geometry.pixels_per_latent)
    if backend == "inductor":
        from storyadapter.engine.inductor.session import open_inductor

        return open_inductor(engine.folder, geometry, numerics, letters, default_device(), on_stage)
    if backend == "tensorrt":
        from storyadapter.engine.tensorrt.session import open_tensorrt as open_engines
    else:
        from storyadapter.engine.onnxruntime.session import open_onnxruntime as open_engines
    return open_engines(
        engine.folder,
        geometry,
        numerics,
        letters,
        lambda network: on_stage(network, "loading engine"),
    )


def _is_device(asked: torch.device, own: torch.device) -> bool:
    """Whether a device is the one that a backend runs on; of a GPU without a number, the current one."""
    if asked.type != own.type:
        return False
    return asked.type != "cuda" or asked.index in (None, torch.cuda.current_device())
