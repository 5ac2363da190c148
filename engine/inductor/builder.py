"""Build of the backend `inductor`: groups of networks compiled at once, each group in a process of its own."""

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

import torch

from storyadapter.engine.backend import ReportStage
from storyadapter.engine.inductor.compilation import BuildRequest, BuiltNetwork, build_networks
from storyadapter.engine.inductor.target import check_compilers
from storyadapter.engine.processes import EndedEarly, Processes
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import ShapeRanges, network_specs
from storyadapter.model.modules import ModelParts
from storyadapter.model.numerics import Numerics

# A compiler works on one core most of the time, and the denoiser takes as long as all others together.
_GROUPS: Final = (("denoiser",), ("image_encoder", "vae_decoder"))


def groups(networks: Collection[str]) -> list[tuple[str, ...]]:
    """Networks that are compiled in one process; those of a ControlNet that run in every step have one of their own."""
    found = [*_GROUPS, *((name,) for name in networks if name.startswith("controlnet_"))]
    grouped = {name for group in found for name in group}
    rest = tuple(name for name in networks if name not in grouped)
    parts = (tuple(name for name in group if name in networks) for group in (*found, rest))
    return [part for part in parts if part]


def build_inductor(
    checkpoint: ModelParts,
    numerics: Numerics,
    ranges: ShapeRanges,
    folder: Path,
    device: torch.device,
    on_stage: ReportStage = lambda network, what: None,
    *,
    only: Collection[str] | None = None,
) -> dict[str, BuiltNetwork]:
    """Compile the networks into `folder`, each compared with eager on `device`.

    Args:
        checkpoint: anything that gives the model's parts and can be pickled.
        ranges: shapes to be served; one package serves them all.
        on_stage: called from several threads, one at a time.
        only: names of the networks to compile; None for all.

    Raises:
        UnavailableError: see `check_compilers`.
        EngineBuildError: a network can't be compiled, computes something else than eager, or a compiler ended early.
        OSError: a file can't be written.
    """
    check_compilers(device)
    letters = ranges.letters(checkpoint.geometry.pixels_per_latent)
    wanted = groups([name for name in network_specs(checkpoint.geometry) if only is None or name in only])
    requests = [BuildRequest(checkpoint, names, numerics, letters, device, folder) for names in wanted]
    processes = Processes()
    with ThreadPoolExecutor(min(len(requests), os.cpu_count() or 1)) as pool:
        try:
            results = [pool.submit(_build_group, processes, request, on_stage) for request in requests]
            for result in as_completed(results):
                result.result()  # what fails first is told at once, not when the others are done
            return {name: network for result in results for name, network in result.result().items()}
        finally:
            processes.stop()  # before the pool waits for its threads


def _build_group(processes: Processes, request: BuildRequest, on_stage: ReportStage) -> dict[str, BuiltNetwork]:
    try:
        return processes.run(build_networks, request, lambda told: on_stage(told["network"], told["stage"]))
    except EndedEarly as end:
        where = end.told.get("network") or " and ".join(request.networks)
        if end.killed:
            raise EngineBuildError(
                f"{where}: the compiler was killed, most likely for want of memory; make some free"
            ) from end
        stage = end.told.get("stage", "starting")
        raise EngineBuildError(f"{where}: the compiler ended early while {stage}, {end}") from end
