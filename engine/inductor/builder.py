"""Build of the backend `inductor`: groups of networks compiled at once, each group in a process of its own."""

import base64
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

import torch

from storyadapter.engine.inductor.compilation import BuildRequest, BuiltNetwork
from storyadapter.engine.inductor.complaints import last_complaint
from storyadapter.engine.inductor.target import check_compilers
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import ShapeRanges
from storyadapter.model.modules import ModelParts
from storyadapter.model.numerics import Numerics

# A compiler works on one core most of the time, and the denoiser takes as long as all others together.
_GROUPS: Final = (
    ("denoiser",),
    ("image_encoder", "vae_decoder"),
    ("text_encoder", "text_encoder_2", "text_projection", "reference_projection"),
)
_KILLED: Final = -9

ReportStage = Callable[[str, str], None]


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
    """Compile the seven networks into `folder`, each compared with eager on `device`.

    Args:
        checkpoint: an opened checkpoint, or anything else that gives the model's parts and can be pickled.
        ranges: shapes to be served; one package serves them all.
        on_stage: called with a network's name ("" for none in particular) and what is done to it; from several
            threads, one at a time.
        only: names of the networks to compile; None for all.

    Raises:
        UnavailableError: see `check_compilers`.
        EngineBuildError: a network can't be compiled, computes something else than eager, or a compiler ended early.
        OSError: a file can't be written.
    """
    check_compilers(device)
    letters = ranges.letters(checkpoint.geometry.pixels_per_latent)
    groups = [tuple(name for name in group if only is None or name in only) for group in _GROUPS]
    requests = [BuildRequest(checkpoint, names, numerics, letters, device, folder) for names in groups if names]
    workers = _Workers(on_stage)
    with ThreadPoolExecutor(min(len(requests), os.cpu_count() or 1)) as pool:
        try:
            results = [pool.submit(workers.run, request) for request in requests]
            for result in as_completed(results):
                result.result()  # what fails first is told at once, not when the others are done
            return {name: network for result in results for name, network in result.result().items()}
        finally:
            workers.stop()


class _Workers:
    """The processes of one build."""

    def __init__(self, on_stage: ReportStage) -> None:
        self._on_stage = on_stage
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def stop(self) -> None:
        """End all of them at once, with the compilers that they started, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def run(self, request: BuildRequest) -> dict[str, BuiltNetwork]:
        """One group, in a process of its own; see `build_inductor`."""
        with tempfile.TemporaryFile() as complaints:
            with self._lock:
                if self._stopped:
                    return {}
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "storyadapter.engine.inductor.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    # the terminal's Ctrl-C reaches this process alone, which ends the others, each with its own group
                    start_new_session=True,
                )
                self._processes.append(process)
            assert process.stdin and process.stdout
            last: dict[str, Any] = {}
            with process:
                process.stdin.write(pickle.dumps(request))
                process.stdin.flush()
                for line in process.stdout:
                    last = json.loads(line)
                    if "stage" in last:
                        with self._lock:
                            self._on_stage(last["network"], last["stage"])
                process.wait()
            if "built" in last:
                return {name: BuiltNetwork(*network) for name, network in last["built"].items()}
            if "raised" in last:
                raise pickle.loads(base64.b64decode(last["raised"]))
            complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 8000))
            complaint = last_complaint(complaints.read().decode(errors="replace"))
        where = last.get("network") or " and ".join(request.networks)
        if process.returncode == _KILLED:
            raise EngineBuildError(f"{where}: the compiler was killed, most likely for want of memory; make some free")
        raise EngineBuildError(
            f"{where}: the compiler ended early while {last.get('stage', 'starting')}, exit code "
            f"{process.returncode}: {complaint}"
        )
