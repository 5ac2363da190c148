"""The choice of tiles without a GPU: its data, winners, the table, and a toy run of the whole command, interpreted."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from storyadapter.bench import tune  # noqa: E402
from storyadapter.bench.kernels import search  # noqa: E402
from storyadapter.bench.kernels.cases import VAE_CONVOLUTION_FP8_CASES, LayerNormCase  # noqa: E402
from storyadapter.bench.kernels.run import Measured  # noqa: E402
from storyadapter.bench.kernels.search import SEARCHES, TILES_FILE, Found, Search, compile_all, markdown, store  # noqa: E402  # noqa: E402
from storyadapter.bench.timing import Timing  # noqa: E402
from storyadapter.cli.main import run_program  # noqa: E402
from storyadapter.kernels import tiles as tile_tables  # noqa: E402
from storyadapter.kernels.tiles import (  # noqa: E402
    CONVOLUTION_FP8,
    GEGLU,
    GROUP_NORM,
    LAYER_NORM,
    TABLES,
    GegluTiles,
    LayerNormTiles,
    Tiles,
)
from storyadapter.method.errors import InputError, RunError, UnavailableError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
HELP = """
import sys
from storyadapter.bench.tune import build_parser
from storyadapter.cli.main import run_program
try:
    run_program(build_parser(), ["--help"])
finally:
    assert not {"torch", "triton"} & set(sys.modules), "help must not import what the command runs"
"""
# The whole command on toys, where the interpreter stands for the GPU: all but compiling.
INTERPRETED = """
import sys
from pathlib import Path
import torch
from storyadapter.bench import tune
from storyadapter.bench.kernels import search
from storyadapter.bench.kernels.search import Search
from storyadapter.bench.kernels.cases import GegluCase, GrcaCase, LayerNormCase, LayerShape
from storyadapter.kernels.tiles import GEGLU, GRCA, LAYER_NORM, GegluTiles, GrcaTiles, LayerNormTiles

layer = LayerShape("toy", 16, 1, 32)
search.SEARCHES = (
    Search(GRCA, (GrcaCase(layer, 1, 1), GrcaCase(layer, 1, 3)), (GrcaTiles(16, 16, 1, 4, 1, False, False),)),
    Search(
        GEGLU,
        (GegluCase(16, 16, 16),),
        tuple(GegluTiles(16, 32, 16, 1, 4, 2, persistent, persistent) for persistent in (False, True)),
    ),
    Search(LAYER_NORM, (LayerNormCase(2, 16),), (LayerNormTiles(1, 1), LayerNormTiles(4, 4))),
)
search.compile_all = lambda compile_one, jobs: {
    job: "no" if job[2] == LayerNormTiles(4, 4) else None for job in jobs
}
search.capability = lambda device: 75
search.REPEATS = 30
search.TILES_FILE = Path(sys.argv[1])
search.tune(["grca", "geglu", "layer_norm"], torch.device("cpu"), write=True)
"""


def _run(program: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _measured(*milliseconds: float) -> Measured:
    return Measured(1e-4, Timing(milliseconds, 1, True))


def _found(tiles: Tiles, table: Any, width: int, element_bytes: int = 2) -> Found:
    return Found(table, table.key(element_bytes, width), (LayerNormCase(32, 64),), {tiles: [_measured(1.0)]})


def test_help_is_told_without_pytorch() -> None:
    told = _run(HELP)
    assert "python -m storyadapter.bench.tune" in told and "--write" in told
    assert "grca, grca_embedded, geglu, layer_norm" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_gpu_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(tune.build_parser(), ["geglu", "--write"]) == 2
    told = capsys.readouterr()
    assert (
        told.err == "storyadapter-trt: error: no CUDA device here; expected the GPU that the tiles are for\n"
        and not told.out
    )


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install triton"):
        tune.run(tune.build_parser().parse_args(["grca"]))


def test_candidates_keep_their_order() -> None:
    assert compile_all(abs, [-3, 1, -2]) == {-3: 3, 1: 1, -2: 2}


def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LayerNormCase(2, 16)
    for error, text in (
        (RuntimeError("out of resource: shared memory\nand much more"), "out of resource: shared memory"),
        (RuntimeError("x" * 1000), "x" * 200),
        (AssertionError(), "AssertionError"),
    ):

        def refuse(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(LayerNormCase, "inputs", refuse)
        assert search.compile_one((LAYER_NORM, case, LayerNormTiles(1, 1))) == text


NOT_MEASURED = (GROUP_NORM,)  # on sm_90 yet: it runs with tiles that serve everywhere


def test_stored_tiles_are_winners_that_the_command_can_find_again() -> None:
    stored = json.loads(TILES_FILE.read_text(encoding="utf-8"))
    assert tuple(wanted.table for wanted in SEARCHES) == TABLES
    for wanted in SEARCHES:
        entries = stored[wanted.table.kernel]["sm_90"]
        candidates = [asdict(tiles) for tiles in wanted.candidates]
        keys = {wanted.table.key(case.element_bytes, case.as_data()[wanted.table.letter]) for case in wanted.cases}
        assert entries.keys() == (set() if wanted.table in NOT_MEASURED else keys)
        assert all(entry in candidates for entry in entries.values())
        assert len(set(wanted.candidates)) == len(wanted.candidates)


def test_tiles_that_are_launched_by_pytorch_need_no_cap_on_registers() -> None:
    launched, embedded = SEARCHES[0].candidates, SEARCHES[1].candidates
    assert all("maxnreg" not in tiles.options() for tiles in launched)
    assert {tiles.options().get("maxnreg") for tiles in embedded} == {None, 128, 168} and set(launched) < set(embedded)


def test_toys_are_measured_reported_and_stored(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_bytes(TILES_FILE.read_bytes())
    report = _run(INTERPRETED, str(table), TRITON_INTERPRET="1").splitlines()
    rows = [line.strip("| ").split(" | ") for line in report if "|" in line]
    assert {"device", "torch", "triton", "commit", "command"} <= {row[0] for row in rows}
    assert "## geglu, 16-bit/K=16" in report and "## layer_norm, 16-bit/C=16" in report
    assert [row[2:] for row in rows if row[0] == "tiles"] == [["toy 1 1", "toy 1 3"], ["16 16 16"], ["2 16"]]
    candidates = [row for row in rows if " " in row[0] and row[0].split(", ")[0].split()[0] in ("block_m", "rows")]
    assert len(candidates) == 4 and all(float(cell) > 0 for row in candidates for cell in row[1:])
    assert "- could not run: rows 4, num_warps 4: no" in report
    stored = json.loads(table.read_text(encoding="utf-8"))
    assert stored["grca"]["sm_75"].keys() == {"16-bit/D=32"}
    assert stored["geglu"]["sm_75"].keys() == {"16-bit/K=16"}
    assert stored["layer_norm"]["sm_75"] == {"16-bit/C=16": {"rows": 1, "num_warps": 1}}


@dataclass(frozen=True)
class _Halved(LayerNormCase):
    """Stands for a kernel that is wrong with some tiles."""

    def launch(self, tiles: LayerNormTiles, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed = self.baselines()[0].run(*inputs)
        return total, normed / 2 if tiles.rows == 2 else normed


def test_a_wrong_candidate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = LayerNormTiles(1, 1), LayerNormTiles(2, 1)
    monkeypatch.setattr(search, "compile_all", lambda _, jobs: dict.fromkeys(jobs))
    (found,) = search.search(Search(LAYER_NORM, (_Halved(16, 32), _Halved(32, 32)), (wrong, right)), CPU)
    assert [item.refusal for item in found.measured[wrong]] == ["error 5.00e-01 against fp32; expected at most 6e-04"]
    assert found.key == "16-bit/C=32" and found.winner == right and len(found.measured[right]) == 2


def test_some_widths_alone_are_searched() -> None:
    (wanted,) = (each for each in SEARCHES if each.table == CONVOLUTION_FP8)
    of_vae = search.narrowed(wanted, (128, 256, 512))
    assert of_vae.cases == VAE_CONVOLUTION_FP8_CASES and of_vae.candidates == wanted.candidates
    assert search.narrowed(wanted, ()) == wanted
    with pytest.raises(InputError, match="^no case of convolution_fp8 has the width 7$"):
        search.tune(["convolution_fp8"], CPU, write=False, widths=(128, 7))


def test_the_least_geometric_mean_of_medians_wins() -> None:
    slow, fast, refused = LayerNormTiles(1, 1), LayerNormTiles(2, 2), LayerNormTiles(8, 8)
    no = Measured(None, None, "no")
    cases = (LayerNormCase(32, 64), LayerNormCase(64, 64))
    times = {
        slow: [_measured(1.0, 2.0, 2.0), _measured(8.0)],
        refused: [_measured(0.1), no],
        fast: [_measured(1.5, 3.0, 9.0), _measured(4.0)],
    }
    found = Found(LAYER_NORM, "16-bit/C=64", cases, times)
    assert found.scores == pytest.approx({fast: math.sqrt(1.5), slow: math.sqrt(2.0)}) and found.winner == fast
    report = markdown({"device": "a GPU"}, [found]).splitlines()
    assert report.index("| rows 2, num_warps 2 | 1.225 | 3.0000 | 4.0000 |") + 1 == report.index(
        "| rows 1, num_warps 1 | 1.414 | 2.0000 | 8.0000 |"
    )
    assert 'Fastest: `{"rows": 2, "num_warps": 2}`' in report
    assert Found(LAYER_NORM, "16-bit/C=64", cases, {refused: [no]}).winner is None


def test_winners_are_stored_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(TILES_FILE.read_bytes())
    expected = json.loads(path.read_text(encoding="utf-8"))
    tiles, norm = GegluTiles(64, 64, 32, 4, 4, 2, persistent=True, descriptors=False), LayerNormTiles(2, 8)
    store(path, 89, [_found(tiles, GEGLU, 640), _found(norm, LAYER_NORM, 640)])
    store(path, 90, [_found(norm, LAYER_NORM, 640)])
    after = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(tile_tables, "stored", lambda: after)
    assert tile_tables._choose.__wrapped__(GEGLU, 89, 2, 640) == (tiles, True)
    assert tile_tables._choose.__wrapped__(LAYER_NORM, 90, 2, 640) == (norm, True)
    expected["layer_norm"]["sm_90"]["16-bit/C=640"] = asdict(norm)
    expected["geglu"]["sm_89"] = {"16-bit/K=640": asdict(tiles)}
    expected["layer_norm"]["sm_89"] = {"16-bit/C=640": asdict(norm)}
    assert after == expected


def test_storing_what_is_stored_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(TILES_FILE.read_bytes())
    for table in TABLES:
        for key, entry in json.loads(path.read_text(encoding="utf-8"))[table.kernel]["sm_90"].items():
            element_bytes, width = int(key.partition("-")[0]) // 8, int(key.partition("=")[2])
            store(path, 90, [_found(table.kind(**entry), table, width, element_bytes)])
    assert path.read_bytes() == TILES_FILE.read_bytes()


def test_what_cannot_be_stored_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="tiles.json can't be written: No such file or directory"):
        store(tmp_path / "tiles.json", 90, [_found(LayerNormTiles(1, 1), LAYER_NORM, 640)])
    with pytest.raises(RunError, match="no candidate could be measured"):
        store(tmp_path / "tiles.json", 90, [])
