"""Build of the backend `tensorrt`: every network exported, compared with eager, and built into an engine."""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from storyadapter.engine.backend import EngineRequest, installed_version
from storyadapter.engine.processes import EndedEarly, Processes
from storyadapter.engine.tensorrt import PROFILES, TENSORRT_NAMES, engine_name, layers_name
from storyadapter.engine.tensorrt.library import Library, choose_library, gpu_target
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.engine.tensorrt.worker import BuildReport, NetworkRequest, Refusal, TensorBounds, build, peak_memory
from storyadapter.engine.uses import ERRORS
from storyadapter.export.onnx_export import export_compared
from storyadapter.method.errors import EngineBuildError, Field, Text, UnavailableError
from storyadapter.model.contract import NetworkSpec, Range, TensorSpec, network_specs, size_of, split_dim
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Precision


def build_tensorrt(request: EngineRequest) -> dict[str, Any]:
    """Export, compare and build the networks, one after the other.

    Of each network there remain the engine, its layer list and the build's log; the ONNX files don't.

    Returns:
        For the manifest: relative error against eager, the report of each build, the export's peak memory, profiles.

    Raises:
        EngineBuildError: TensorRT refused, or an exported network doesn't compute what eager computes.
        InputError: an option that doesn't fit.
    """
    library, targets = choose_library(tuple(request.identity.architecture.split("+")), gpu_target())
    options: BuildOptions = request.options or BuildOptions()
    options.check(request.ranges, library)
    # what TensorRT measured of single layers, for all builds; TensorRT-RTX measures nothing
    cache = request.shared / timing_cache_name(library, targets) if library.has_plugins else None
    geometry, letters, numerics, folder = request.checkpoint.geometry, request.letters, request.numerics, request.folder
    scale = geometry.pixels_per_latent
    latent_sizes = tuple((height // scale, width // scale) for height, width in options.resolutions)
    specs = network_specs(geometry)
    errors: dict[str, float] = {}
    reports: dict[str, Any] = {}
    plugin = embeds_kernel(library, targets)
    onnx_folder = folder / "onnx"
    modules = iterate_modules(request.checkpoint, numerics, grca)
    while True:
        request.on_stage("", "loading weights")
        name, module = next(modules, ("", None))
        if module is None:
            break
        spec = specs[name]
        onnx_folder.mkdir()
        path, errors[name] = export_compared(
            spec, module, letters, numerics[name], onnx_folder, functools.partial(request.on_stage, name)
        )
        request.on_stage(name, f"building the engine for {', '.join(targets)} with {library}")
        asked = build_request(
            spec, path, folder, letters, numerics[name], library, targets, options, latent_sizes, cache, plugin
        )
        reports[name] = asdict(run_worker(name, asked, functools.partial(request.on_fraction, name)))
        shutil.rmtree(onnx_folder)
    profiles = {
        name: [{letter: astuple(range) for letter, range in profile.items()} for profile in found]
        for name, found in ((name, profiles_of(spec, letters, latent_sizes)) for name, spec in specs.items())
    }
    return {ERRORS: errors, "builds": reports, "export_peak_memory_bytes": peak_memory(), PROFILES: profiles}


def timing_cache_name(library: Library, targets: tuple[str, ...]) -> str:
    """File name, in an engine store, of what TensorRT measured of single layers."""
    return f"timing-{library.version}-{targets[0]}.cache"


def embeds_kernel(library: Library, targets: tuple[str, ...]) -> bool:
    """Whether engines for these targets hold the fused kernel; elsewhere attention is made of standard operators.

    Raises:
        UnavailableError: they would, but Triton isn't installed.
    """
    if not library.has_plugins:
        return False
    if installed_version("triton") is None:
        raise UnavailableError(
            f"{library} embeds the fused kernel; triton, which compiles it, is not installed; type: pip install triton"
        )
    from storyadapter.kernels.grca.aot import SHARED_MEMORY_LIMIT

    return all(int(target.removeprefix("sm")) in SHARED_MEMORY_LIMIT for target in targets)


def profiles_of(
    spec: NetworkSpec, letters: Mapping[str, Range], latent_sizes: Sequence[tuple[int, int]] = ()
) -> list[dict[str, Range]]:
    """The ranges of a network's letters, per optimization profile: the whole range first, then single sizes (h, w)."""
    own = {name: letters[name] for name in _letters_of(spec)}
    sizes = latent_sizes if "h" in own else ()
    return [own, *(own | {"h": Range(h, h), "w": Range(w, w)} for h, w in sizes)]


def build_request(
    spec: NetworkSpec,
    onnx: Path,
    folder: Path,
    letters: Mapping[str, Range],
    precision: Precision,
    library: Library,
    targets: tuple[str, ...],
    options: BuildOptions,
    latent_sizes: Sequence[tuple[int, int]] = (),
    timing_cache: Path | None = None,
    plugin: bool = False,
) -> NetworkRequest:
    """What the worker needs to build one exported network into `folder`."""
    profiles = profiles_of(spec, letters, latent_sizes)

    def bounds(tensor: TensorSpec, is_input: bool) -> TensorBounds:
        return TensorBounds(
            name=tensor.name,
            shape=tuple(_parsed_size(dim, letters) for dim in tensor.shape),
            dtype=TENSORRT_NAMES[tensor.dtype_name(precision)],
            profiles=tuple(profile_shapes(tensor, profile) for profile in profiles) if is_input else (),
        )

    return NetworkRequest(
        module=library.module,
        onnx=str(onnx),
        engine=str(folder / engine_name(spec.name)),
        log=str(folder / f"{spec.name}.log"),
        layers=str(folder / layers_name(spec.name)),
        targets=targets,
        inputs=tuple(bounds(tensor, True) for tensor in spec.inputs),
        outputs=tuple(bounds(tensor, False) for tensor in spec.outputs),
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_mib << 20 if options.workspace_mib else None,
        timing_cache=str(timing_cache) if timing_cache else None,
        plugin=plugin and spec.name == "denoiser",
    )


def profile_shapes(tensor: TensorSpec, profile: Mapping[str, Range]) -> tuple[tuple[int, ...], ...]:
    """(min, opt, max) of an input. The builder tunes for `opt`: full micro-batches, all references, two bank rows."""
    least = {name: value.minimum for name, value in profile.items()}
    most = {name: value.maximum for name, value in profile.items()}
    usual = most | ({"G": min(2, most["G"])} if "G" in most else {})
    return tuple(tuple(size_of(dim, values) for dim in tensor.shape) for values in (least, usual, most))


def run_worker(network: str, request: NetworkRequest, on_fraction: Callable[[float], None]) -> BuildReport:
    """Build in a process of its own; Ctrl-C, or any other exception in here, ends that process at once.

    Raises:
        EngineBuildError: TensorRT refused, in its own words, or the process died.
        OSError: a file can't be written.
    """
    try:
        with Processes() as processes:
            return processes.run(build, request, lambda told: on_fraction(told["fraction"]))
    except Refusal as refusal:
        words = " ".join(str(refusal).split())
        advice: Text = "another version of it may take this, or another backend: see doctor"
        if "memory" in words.lower():
            advice = ("close other programs, or lower ", Field("max_frames"), " or ", Field("workspace"))
        raise EngineBuildError(f"{network}: {request.module} refused: {words}", advice=advice) from refusal
    except EndedEarly as end:
        if end.killed:
            raise EngineBuildError(
                f"{network}: the build was killed, most likely for want of memory; the full-size denoiser needs about "
                "17 GB",
                advice="close other programs, or build on a larger machine",
            ) from end
        told = f"{network}: {request.module}'s builder ended early (exit code {end.code}): {end.printed}"
        raise EngineBuildError(told) from end


def _letters_of(spec: NetworkSpec) -> list[str]:
    dims = [dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, str)]
    return list(dict.fromkeys(split_dim(dim)[1] for dim in dims))


def _parsed_size(dim: int | str, letters: Mapping[str, Range]) -> int:
    """-1 for a dynamic dimension; a letter of one value was exported as a constant."""
    if isinstance(dim, int):
        return dim
    factor, letter = split_dim(dim)
    value = letters[letter]
    return int(factor * value.minimum) if value.minimum == value.maximum else -1
