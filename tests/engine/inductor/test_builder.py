"""A build's processes: what ends them, and what is told then."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from storyadapter.bench.synthetic import TOY, SyntheticCheckpoint
from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.inductor.backend import BACKEND
from storyadapter.engine.inductor.builder import build_inductor, groups
from storyadapter.method.errors import CheckpointError, EngineBuildError, InputError, UnavailableError
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.numerics import Numerics
from tests.engine.worker_processes import worker_processes
from tests.refusals import raises_typed

SIZES = Range(64, 64)
RANGES = ShapeRanges(2, 8, SIZES, SIZES)
CPU = torch.device("cpu")


def workers() -> list[psutil.Process]:
    return worker_processes()


def test_every_network_is_compiled_in_one_process() -> None:
    for controlnets in (0, 2):
        names = [*network_specs(SyntheticCheckpoint(TOY, CPU, controlnets=controlnets).geometry)]
        grouped = groups(names)
        assert sorted(name for group in grouped for name in group) == sorted(names)
        assert ("denoiser",) in grouped and len(grouped) == 3 + controlnets
    assert groups(["vae_decoder"]) == [("vae_decoder",)]


def test_a_killed_compiler_is_told_by_network(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def kill(network: str, what: str) -> None:
        if network:
            for process in workers():
                os.kill(process.pid, signal.SIGKILL)

    # a compiler that has told of none of its networks yet goes by all of them
    with pytest.raises(EngineBuildError, match=r"^\w+( and \w+)*: the compiler was killed, most likely for want of"):
        build_inductor(checkpoint, Numerics("fp32"), RANGES, tmp_path, CPU, kill)
    assert not workers()


def compilers() -> list[psutil.Process]:
    """The C++ compilers that the workers started and that still work."""
    started = [child for worker in workers() for child in worker.children(recursive=True)]
    return [process for process in started if process.name() == "cc1plus"]


def test_whatever_ends_the_program_ends_its_compilers(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # or nothing may be left to compile
    seen: list[psutil.Process] = []

    def stop(network: str, what: str) -> None:
        if what == "compiling":
            deadline = time.monotonic() + 60
            while not (found := compilers()) and time.monotonic() < deadline:
                time.sleep(0.02)
            seen.extend([*workers(), *found])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_inductor(checkpoint, Numerics("fp32"), RANGES, tmp_path, CPU, stop)
    assert not workers()
    assert any("cc1plus" in str(process) for process in seen)
    _, alive = psutil.wait_procs(seen, timeout=1)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_what_fails_first_is_told_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    stages: list[str] = []

    def kill(network: str, what: str) -> None:
        if not stages:  # the group that was started last: not the denoiser, which takes longest
            os.kill(max(worker.pid for worker in workers()), signal.SIGKILL)
        stages.append(what)

    with pytest.raises(EngineBuildError, match="the compiler was killed"):
        build_inductor(checkpoint, Numerics("fp32"), RANGES, tmp_path, CPU, kill)
    assert "comparing with eager" not in stages and not workers()


def test_what_a_compiler_process_raises_is_raised(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = checkpoint.paths.base_model / "unet" / "config.json"
    hidden = config.with_name("hidden.json")
    config.rename(hidden)  # after the checkpoint was opened: the other process can't open it
    try:
        with pytest.raises(CheckpointError, match="unet"):
            build_inductor(checkpoint, Numerics("fp32"), RANGES, tmp_path, CPU, only=("denoiser",))
    finally:
        hidden.rename(config)


def test_a_compiler_that_would_crash_packages_is_refused_before_anything_is_loaded(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++-that-answers"
    compiler.write_text("#!/bin/sh\necho libstdc++.so\n")
    compiler.chmod(0o755)
    stages: list[str] = []
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}),
        pytest.raises(UnavailableError, match="finds no shared libstdc"),
    ):
        build_inductor(checkpoint, Numerics("fp32"), RANGES, tmp_path, CPU, lambda network, what: stages.append(what))
    assert not stages


def test_a_range_that_begins_too_low_is_refused() -> None:
    ranges = ShapeRanges(2, 8, Range(32, 64), SIZES)
    with raises_typed(InputError, match=r"^--height is 32\.\.64; backend inductor expects a range from 64 on: "):
        BACKEND.check(Numerics("fp32"), ranges)
