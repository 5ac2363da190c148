"""Networks of what is benchmarked: a build that comes is told before it begins."""

from pathlib import Path
from threading import Thread
from typing import NoReturn

import pytest
import torch
from filelock import FileLock

from storyadapter.bench.model import BenchmarkModel
from storyadapter.bench.options import EngineChoice
from storyadapter.engine.identity import engine_key
from storyadapter.engine.onnxruntime import networks
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.numerics import Numerics
from tests.engine.engine_requests import identify

PIXELS = Range(64, 64)
RANGES = ShapeRanges(2, 3, PIXELS, PIXELS)
FIRST = "    the store has no engine of onnxruntime for exactly this: it is built first, for minutes"


def test_a_build_is_told_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def refuse(*args: object) -> NoReturn:
        told.append("it begins")
        raise EngineBuildError("refused")

    monkeypatch.setattr(networks, "build_onnx", refuse)
    model = BenchmarkModel.synthetic(
        "toy", EngineChoice("onnxruntime", "fp32", engine_dir=tmp_path), torch.device("cpu")
    )

    def open_it() -> None:
        with pytest.raises(EngineBuildError, match="refused"):
            model.open(RANGES, told.append)

    open_it()
    assert told == [FIRST, "it begins"]
    told.clear()
    key = engine_key(identify(model.checkpoint, "onnxruntime", Numerics("fp32")), RANGES)
    opening = Thread(target=open_it, daemon=True)
    with FileLock(tmp_path / f".{key}.lock"):  # as another process that builds the same
        opening.start()
        while opening.is_alive() and len(told) < 2:
            opening.join(0.01)
    opening.join()
    waiting = f"    another process is building this engine in {tmp_path}; waiting until it is done"
    assert told == [FIRST, waiting, "it begins"]
