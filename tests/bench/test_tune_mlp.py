"""The choice of the MLP kernels' tiles without a GPU: its data, winners, the table, and a toy run interpreted."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from storyadapter.bench import tune, tune_mlp  # noqa: E402
from storyadapter.bench.kernel_cases import LAYERS_1024  # noqa: E402
from storyadapter.bench.kernel_run import Measured, WrongResult  # noqa: E402
from storyadapter.bench.mlp_cases import CASES, GegluCase, LayerNormCase, Rival, add_layer_norm  # noqa: E402
from storyadapter.bench.mlp_report import markdown, store  # noqa: E402
from storyadapter.bench.mlp_run import CaseResult, largest_error, measure_case, winners  # noqa: E402
from storyadapter.bench.roofline import Rates  # noqa: E402
from storyadapter.bench.timing import Timing  # noqa: E402
from storyadapter.kernels import tiles as tile_tables  # noqa: E402
from storyadapter.kernels.tiles import GEGLU, LAYER_NORM, GegluTiles, LayerNormTiles  # noqa: E402
from storyadapter.method.errors import RunError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "tiles.json"
CPU = torch.device("cpu")
KINDS = {"geglu": GegluTiles, "layer_norm": LayerNormTiles}
HELP = """
import sys
from storyadapter.bench.tune_mlp import main
try:
    main(["--help"])
finally:
    assert not {"torch", "triton"} & set(sys.modules), "help must not import what the command runs"
"""
# The whole command on toys, where the interpreter stands for the GPU: all but compiling and the device's limits.
INTERPRETED = """
import sys
import torch
from storyadapter.bench import mlp_cases, roofline, tune_mlp
from storyadapter.kernels import launching, tiles
from storyadapter.kernels.tiles import GegluTiles, LayerNormTiles

class Geglu(mlp_cases.GegluCase):
    candidates = tuple(GegluTiles(16, 32, 16, 1, 4, 2, persistent, persistent) for persistent in (False, True))

    def rivals(self):
        return super().rivals()[:1]  # the other one is compiled, which takes long on a CPU

class LayerNorm(mlp_cases.LayerNormCase):
    candidates = (LayerNormTiles(1, 1), LayerNormTiles(4, 4))

tune_mlp.find_gpu = lambda: torch.device("cpu")
tune_mlp.compile_all = lambda compile_one, jobs: ["no" if job[1] == LayerNormTiles(4, 4) else None for job in jobs]
roofline.measure_rates = lambda device, dtype: roofline.Rates(1e12, 1e12, 1e12)
launching.capability = lambda device: 75
mlp_cases.CASES = (Geglu(16, 16, 16), LayerNorm(2, 16))
tiles.__file__ = sys.argv[1]
sys.exit(tune_mlp.main(["--write"]))
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


def test_help_is_told_without_pytorch() -> None:
    told = _run(HELP)
    assert "python -m storyadapter.bench.tune_mlp" in told and "--write" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize(("command", "words"), [(tune_mlp, ["--write"]), (tune, ["--out", "no-such-folder/file"])])
def test_no_gpu_is_told_in_one_line(command: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    told = capsys.readouterr()
    assert told.err == "error: no CUDA device here; expected the GPU that the tiles are for\n" and not told.out


def test_stored_tiles_are_winners_that_the_command_can_find_again() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    stored = {f"{name}/{key}": entry for name in KINDS for key, entry in table[name]["sm_90"].items()}
    candidates = {case.key: [asdict(tiles) for tiles in case.candidates] for case in CASES}
    assert candidates.keys() == stored.keys()
    assert all(entry in candidates[key] for key, entry in stored.items())
    assert all(len(set(case.candidates)) == len(case.candidates) for case in CASES)


def test_cases_are_the_layers_of_sdxl_with_16_rows() -> None:
    layers = {(16 * layer.query_tokens, layer.heads * layer.head_size) for layer in LAYERS_1024}
    assert {(case.rows, case.depth) for case in CASES if isinstance(case, GegluCase)} == layers
    assert {(case.rows, case.channels) for case in CASES if isinstance(case, LayerNormCase)} == layers
    assert all(case.width == 4 * case.depth for case in CASES if isinstance(case, GegluCase))


def test_costs_of_a_case_by_hand() -> None:
    geglu = GegluCase(rows=3, depth=5, width=7)
    assert geglu.operations == 2 * 3 * 5 * 14
    assert geglu.bytes_moved == 2 * (3 * 5 + 14 * 5 + 14 + 3 * 7)
    assert LayerNormCase(rows=3, channels=5).bytes_moved == 2 * 4 * 15


def test_toys_are_measured_reported_and_stored(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_bytes(TABLE.read_bytes())
    report = _run(INTERPRETED, str(tmp_path / "tiles.py"), TRITON_INTERPRET="1").splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in report if "|" in line}
    assert {"device", "torch", "triton", "commit", "command"} <= rows.keys()
    assert "## geglu, M=16 K=16 N=16" in report and "## layer_norm, M=2 C=16" in report
    geglu = [f"16x32x16, groups of 1, 4 warps, 2 stages, {way}" for way in ("once, cp.async", "persistent, TMA")]
    for name in (*geglu, "F.linear alone", "eager add + layer_norm", "rows 1, warps 1"):
        assert float(rows[name][1]) > 0 and 0 < float(rows[name][-1]) < 6e-4
    assert rows["rows 4, warps 4"][1:] == ["could not run: no", "-", "-", "-", "-", "-"]
    stored = json.loads(table.read_text(encoding="utf-8"))
    assert stored["geglu"]["sm_75"].keys() == {"16-bit/K=16"}
    assert stored["layer_norm"]["sm_75"] == {"16-bit/C=16": {"rows": 1, "num_warps": 1}}


@dataclass(frozen=True)
class _Halved(LayerNormCase):
    """Stands for a kernel that is wrong with some tiles."""

    def launch(self, tiles: LayerNormTiles, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed = add_layer_norm(*inputs)
        return total, normed / 2 if tiles.rows == 2 else normed


def test_a_wrong_candidate_is_refused_and_a_wrong_rival_stops_everything() -> None:
    case, right, wrong = _Halved(16, 32), LayerNormTiles(1, 1), LayerNormTiles(2, 1)
    result = measure_case(case, {wrong: None, right: None}, case.rivals(), CPU, repeats=30)
    assert result.candidates[wrong].timing is None
    assert result.candidates[wrong].refusal == "error 5.00e-01 against fp32; expected at most 6e-04"
    assert winners([result]) == {"layer_norm/16-bit/C=32": right}
    forgetful = Rival("forgets the sum", lambda x, *rest: (x, add_layer_norm(x, *rest)[1]), case.expected)
    with pytest.raises(WrongResult):
        measure_case(case, {}, [forgetful], CPU, repeats=30)


def test_errors_of_several_tensors() -> None:
    one, two = torch.ones(4), torch.full((4,), 2.0)
    assert largest_error((one, two), (one, one)) == 1.0
    nan = torch.full((4,), float("nan"))
    assert not largest_error((one, nan), (one, one)) <= 1 and not largest_error((nan, one), (one, one)) <= 1
    with pytest.raises(ValueError):
        largest_error((one, two), one)


def test_the_least_median_wins() -> None:
    slow, fast, refused = LayerNormTiles(1, 1), LayerNormTiles(2, 2), LayerNormTiles(8, 8)
    times = {slow: _measured(1.0, 2.0, 2.0), refused: Measured(None, None, "no"), fast: _measured(1.5, 1.5, 9.0)}
    case = LayerNormCase(32, 64)
    assert winners([CaseResult(case, {}, times)]) == {case.key: fast}
    assert winners([CaseResult(case, {}, {refused: Measured(None, None, "no")})]) == {}


def test_the_report_sets_candidates_beside_the_rival() -> None:
    case, tiles = GegluCase(65536, 640, 2560), GegluTiles(128, 256, 64, 8, 8, 3, persistent=True, descriptors=True)
    rivals = {"alone": _measured(0.7, 0.7), "to beat": _measured(1.0, 1.0)}
    result = CaseResult(case, rivals, {tiles: _measured(0.75, 0.75)})
    report = markdown({"device": "a GPU"}, Rates(770e12, 4e12, 3e12), [result]).splitlines()
    assert "| alone | 0.7000 | 0.0000 | 614 | 80% | +0.3000 | 1.0e-04 |" in report
    assert "| to beat | 1.0000 | 0.0000 | 429 | 56% | - | 1.0e-04 |" in report
    name = "128x256x64, groups of 8, 8 warps, 3 stages, persistent, TMA"
    assert f"| {name} | 0.7500 | 0.0000 | 573 | 74% | +0.2500 | 1.0e-04 |" in report
    assert any(line.startswith(f"Fastest, for `{case.key}`: {name}: `{{") for line in report)


def test_winners_are_stored_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(TABLE.read_bytes())
    before = json.loads(path.read_text(encoding="utf-8"))
    tiles, norm = GegluTiles(64, 64, 32, 4, 4, 2, persistent=True, descriptors=False), LayerNormTiles(2, 8)
    store(path, 89, {"geglu/16-bit/K=640": tiles, "layer_norm/16-bit/C=640": norm})
    store(path, 90, {"layer_norm/16-bit/C=640": norm})
    after = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(tile_tables, "stored", lambda: after)
    assert tile_tables._choose.__wrapped__(GEGLU, 89, 2, 640) == (tiles, True)
    assert tile_tables._choose.__wrapped__(LAYER_NORM, 90, 2, 640) == (norm, True)
    before["layer_norm"]["sm_90"]["16-bit/C=640"] = asdict(norm)
    before["geglu"]["sm_89"] = {"16-bit/K=640": asdict(tiles)}
    before["layer_norm"]["sm_89"] = {"16-bit/C=640": asdict(norm)}
    assert after == before


def test_storing_what_is_stored_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(TABLE.read_bytes())
    table = json.loads(path.read_text(encoding="utf-8"))
    stored = {f"{name}/{key}": kind(**e) for name, kind in KINDS.items() for key, e in table[name]["sm_90"].items()}
    store(path, 90, stored)
    assert path.read_text(encoding="utf-8").strip() == TABLE.read_text(encoding="utf-8").strip()


def test_what_cannot_be_stored_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="tiles.json can't be written: No such file or directory"):
        tune_mlp.write(tmp_path / "tiles.json", 90, {"layer_norm/16-bit/C=640": LayerNormTiles(1, 1)})
    with pytest.raises(RunError, match="no candidate could be measured"):
        tune_mlp.write(tmp_path / "tiles.json", 90, {})
