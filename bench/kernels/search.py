"""Compiles, checks and times candidates for tiles; the fastest go into the table.

The winner of a table's entry has the least geometric mean of its times relative to the best time of each case.
"""

import functools
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from storyadapter.bench.environment import describe
from storyadapter.bench.kernels import cases
from storyadapter.bench.kernels.cases import GrcaCase, KernelCase
from storyadapter.bench.kernels.run import TOLERANCE, Measured, WrongResult, measure_contender
from storyadapter.bench.report import opening, table
from storyadapter.bench.timing import buffer_sets
from storyadapter.kernels import tiles as tables
from storyadapter.kernels.grca.aot import compile_kernel
from storyadapter.kernels.launching import capability
from storyadapter.kernels.tiles import GrcaTiles, Tiles, TileTable
from storyadapter.method.constants import TEXT_TOKENS
from storyadapter.method.errors import InputError, RunError


@dataclass(frozen=True)
class Search:
    """One table, the candidates for its entries, and the cases that decide on them."""

    table: TileTable[Any]
    cases: tuple[KernelCase, ...]
    candidates: tuple[Tiles, ...]


def _grca_tiles(caps: tuple[int | None, ...]) -> tuple[GrcaTiles, ...]:
    """One tile per program over all shapes; several tiles, with queries read ahead and without; caps on registers."""
    shapes = itertools.product(((64, 4), (128, 4), (128, 8), (256, 16)), (32, 64), (1, 2, 3))
    several = itertools.product(((64, 4), (128, 8)), (2, 4, 8), (1, 2), (False, True), caps)
    return (
        *(GrcaTiles(m, n, 1, warps, stages, prefetch=False, heads_first=True) for (m, warps), n, stages in shapes),
        *(
            GrcaTiles(m, 32, tiles, warps, stages, prefetch, heads_first=False, max_registers=cap)
            for (m, warps), tiles, stages, prefetch, cap in several
        ),
    )


_GRCA_CASES: Final = (
    *(GrcaCase(cases.LAYERS_1024[0], 16, frames) for frames in (1, 16, 50, 100)),
    *(GrcaCase(cases.LAYERS_1024[1], rows, frames) for rows, frames in ((16, 16), (16, 100), (2, 16))),
    GrcaCase(cases.LAYERS_OTHER[0], 16, 16),
)
# block_m, block_n, block_k, group_m, num_warps, num_stages, persistent, descriptors
_GEGLU_TILES: Final = tuple(
    tables.GegluTiles(*row)
    for row in (
        (128, 256, 64, 8, 8, 4, True, True),
        (128, 256, 64, 16, 8, 4, True, True),
        (128, 256, 64, 8, 8, 3, True, True),
        (128, 256, 64, 8, 8, 4, False, True),
        (256, 128, 64, 8, 8, 4, True, True),
        (128, 128, 64, 8, 4, 3, False, True),
        (128, 256, 64, 8, 8, 4, True, False),
        (128, 256, 64, 16, 8, 4, True, False),
        (128, 256, 64, 8, 8, 3, True, False),
        (128, 256, 64, 8, 8, 4, False, False),
        (128, 256, 64, 8, 8, 3, False, False),
        (256, 128, 64, 8, 8, 4, False, False),
        (128, 128, 64, 8, 4, 3, False, False),
        (128, 128, 64, 8, 8, 3, False, False),
    )
)
# rows, num_warps
_LAYER_NORM_TILES: Final = tuple(
    tables.LayerNormTiles(*row) for row in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 4), (8, 4), (8, 8))
)
# pixels or rows, block_n, block_k, group_m, num_warps, num_stages
_PRODUCTS: Final = (
    (128, 256, 128, 8, 8, 3),
    (128, 256, 128, 16, 8, 3),
    (128, 256, 64, 8, 8, 4),
    (128, 128, 128, 8, 8, 4),
    (128, 128, 128, 8, 4, 3),
    (256, 128, 64, 8, 8, 4),
    (256, 128, 128, 8, 8, 3),
)
_CONVOLUTION_TILES: Final = tuple(
    tables.ProductTiles(
        8, pixels // 8, block_n, block_k, group_m, warps, stages, persistent=True, descriptors=descriptors
    )
    for pixels, block_n, block_k, group_m, warps, stages in _PRODUCTS
    for descriptors in (True, False)
)
_MATRIX_TILES: Final = tuple(replace(tiles, block_h=1, block_w=8 * tiles.block_w) for tiles in _CONVOLUTION_TILES)
# rows, steps, block_c, num_warps
_GROUP_NORM_TILES: Final = tuple(
    tables.GroupNormTiles(*row)
    for row in itertools.product((8, 16, 32), (8, 16, 32), (64, 128, 256), (4, 8))
    if row[0] * row[2] <= 4096
)
# torch.compile drops a cap on the registers, so tiles that need one are for the embedded kernel alone
SEARCHES: Final = (
    Search(tables.GRCA, _GRCA_CASES, _grca_tiles(caps=(None,))),
    Search(tables.GRCA_EMBEDDED, _GRCA_CASES, _grca_tiles(caps=(None, 128, 168))),
    Search(tables.GEGLU, cases.GEGLU_CASES, _GEGLU_TILES),
    Search(tables.LAYER_NORM, cases.LAYER_NORM_CASES, _LAYER_NORM_TILES),
    Search(
        tables.CONVOLUTION_FP8, (*cases.CONVOLUTION_FP8_CASES, *cases.VAE_CONVOLUTION_FP8_CASES), _CONVOLUTION_TILES
    ),
    Search(tables.LINEAR_FP8, cases.LINEAR_FP8_CASES, _MATRIX_TILES),
    Search(tables.GEGLU_FP8, cases.GEGLU_FP8_CASES, _MATRIX_TILES),
    Search(tables.GROUP_NORM, (*cases.GROUP_NORM_CASES, *cases.VAE_NORM_CASES), _GROUP_NORM_TILES),
)

Job = TypeVar("Job")
Result = TypeVar("Result")

DTYPE: Final = torch.float16
REPEATS: Final = 60
TILES_FILE: Final = Path(str(resources.files("storyadapter.kernels").joinpath("tiles.json")))
# Each compiling process holds a CUDA context of its own, about half a gigabyte of the GPU's memory.
MAX_PROCESSES: Final = 14


@dataclass(frozen=True)
class Found:
    """The candidates for one entry of a table: one measurement per case, or a single one that says what is wrong."""

    table: TileTable[Any]
    key: str
    cases: tuple[KernelCase, ...]
    measured: dict[Tiles, list[Measured]]

    @functools.cached_property
    def scores(self) -> dict[Tiles, float]:
        """Geometric mean of the times relative to the best of each case, from the best candidate on."""
        times = {tiles: [item.timing.median for item in row if item.timing] for tiles, row in self.measured.items()}
        whole = {tiles: row for tiles, row in times.items() if len(row) == len(self.cases)}
        best = [min(column) for column in zip(*whole.values(), strict=True)]
        found = {
            tiles: statistics.geometric_mean(ms / least for ms, least in zip(row, best, strict=True))
            for tiles, row in whole.items()
        }
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @property
    def winner(self) -> Tiles | None:
        """The best candidate; None where all were refused."""
        return next(iter(self.scores), None)


def compile_all(compile_one: Callable[[Job], Result], jobs: Sequence[Job]) -> dict[Job, Result]:
    """What `compile_one`, a function of a module, gives for each job; each process takes some of them.

    The kernels lie in Triton's cache on disk afterwards, where the process that measures finds them.
    """
    workers = min(MAX_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


def compile_one(job: tuple[TileTable[Any], KernelCase, Tiles]) -> str | None:
    """Compiles a candidate for a case in this process, and says why if it can't be built: a finding, not a failure."""
    tile_table, case, tiles = job
    device = torch.device("cuda", 0)
    try:
        # refused if a plain launch can't run it
        if tile_table == tables.GRCA_EMBEDDED and isinstance(case, GrcaCase) and isinstance(tiles, GrcaTiles):
            layer = case.layer
            compile_kernel(capability(device), layer.heads, layer.head_size, "fp16", TEXT_TOKENS, tiles=tiles)
        case.launch(tiles, *case.kernel_inputs(*case.inputs(DTYPE, device, 0)))
        torch.cuda.synchronize()
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return None


def tune(kernels: Sequence[str], device: torch.device, *, write: bool, widths: Collection[int] = ()) -> None:
    """Finds the fastest tiles for tables by name, prints the report, and stores them if asked.

    Args:
        widths: whose entries are searched alone; all if there are none.

    Raises:
        InputError: no case has one of these widths.
        RunError: nothing can be stored; the report was printed.
    """
    searches = [narrowed(wanted, widths) for wanted in SEARCHES if wanted.table.kernel in kernels]
    known = {case.as_data()[wanted.table.letter] for wanted in searches for case in wanted.cases}
    if unknown := set(widths) - known:
        raise InputError(f"no case of {', '.join(kernels)} has the width {min(unknown)}")
    found = [item for wanted in searches for item in search(wanted, device)]
    print(markdown(describe(device), found))
    if write:
        store(TILES_FILE, capability(device), found)


def narrowed(wanted: Search, widths: Collection[int]) -> Search:
    """The same for entries of these widths alone; for all if there are none."""
    own = tuple(case for case in wanted.cases if not widths or case.as_data()[wanted.table.letter] in widths)
    return replace(wanted, cases=own)


def search(wanted: Search, device: torch.device) -> list[Found]:
    """Compiles and measures the candidates of a table, an entry after the other."""
    tell = functools.partial(print, file=sys.stderr, flush=True)
    smallest = dict.fromkeys(case.smallest() for case in wanted.cases)
    jobs = [(wanted.table, case, tiles) for case in smallest for tiles in wanted.candidates]
    tell(f"{wanted.table.kernel}: compiling {len(jobs)} candidates")
    refusals = compile_all(compile_one, jobs)
    by_key: dict[str, list[KernelCase]] = {}
    for case in wanted.cases:
        by_key.setdefault(wanted.table.key(case.element_bytes, case.as_data()[wanted.table.letter]), []).append(case)
    found = []
    for key, own in by_key.items():
        measured: dict[Tiles, list[Measured]] = {tiles: [] for tiles in wanted.candidates}
        for case in own:
            tell(f"{wanted.table.kernel}, {key}: {', '.join(case.cells)}")
            refused = {tiles: refusals[wanted.table, case.smallest(), tiles] for tiles in wanted.candidates}
            _measure(case, refused, measured, device)
        found.append(Found(wanted.table, key, tuple(own), measured))
    return found


@torch.no_grad()
def _measure(
    case: KernelCase, refused: dict[Tiles, str | None], measured: dict[Tiles, list[Measured]], device: torch.device
) -> None:
    """Adds a case's measurement to each candidate that wasn't refused before; each is checked against fp32 first."""
    sets = buffer_sets(case.bytes_moved(DTYPE.itemsize), device)
    inputs = [case.inputs(DTYPE, device, seed) for seed in range(sets)]
    expected = case.expected(*inputs[0])
    kernel_inputs = [case.kernel_inputs(*tensors) for tensors in inputs]
    for tiles, items in measured.items():
        if items and items[-1].timing is None:
            continue
        calls = [functools.partial(case.launch, tiles, *tensors) for tensors in kernel_inputs]
        try:
            if refused[tiles] is not None:
                raise WrongResult(refused[tiles])
            tolerance = case.tolerance or TOLERANCE[DTYPE]
            items.append(measure_contender(calls, expected, tolerance, device, REPEATS, case.warmup_seconds))
        except WrongResult as error:
            items.append(Measured(None, None, str(error)))


def markdown(environment: dict[str, str], found: Iterable[Found]) -> str:
    """The report: a table of candidates per entry, the best first."""
    lines = opening("Tiles in float16", environment)
    lines += [
        "Median milliseconds of one layer's call over cold buffers. Everything was checked against fp32 before it was",
        "timed. The score is the geometric mean of the times relative to the best of each case.",
        "",
    ]
    for item in found:
        rows = [
            [_words(tiles), f"{score:.3f}", *(f"{one.timing.median:.4f}" for one in item.measured[tiles] if one.timing)]
            for tiles, score in item.scores.items()
        ]
        header = ("tiles", "score", *(" ".join(case.cells) for case in item.cases))
        refusals = {tiles: one.refusal for tiles, items in item.measured.items() for one in items if one.refusal}
        best = f"`{json.dumps(asdict(item.winner))}`" if item.winner else "none: no candidate could be measured"
        lines += [f"## {item.table.kernel}, {item.key}", "", *table(header, rows), ""]
        lines += [f"- could not run: {_words(tiles)}: {refusal}" for tiles, refusal in refusals.items()]
        lines += ["", f"Fastest: {best}", ""]
    return "\n".join(lines)


def _words(tiles: Tiles) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(tiles).items())


def store(path: Path, capability: int, found: Iterable[Found]) -> None:
    """Puts winners into the table of tiles, among those of one architecture; everything else stays as it is.

    Args:
        path: of `tiles.json`.
        capability: compute capability, 10·major + minor.
        found: from `search`.

    Raises:
        RunError: there are no winners, or the file can't be written.
    """
    winners = [(item, item.winner) for item in found if item.winner is not None]
    if not winners:
        raise RunError("no candidate could be measured here, so nothing is stored; the report says why")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for item, tiles in winners:
            data[item.table.kernel].setdefault(f"sm_{capability}", {})[item.key] = asdict(tiles)
        text = re.sub(r"\{[^{}]*\}", lambda entry: " ".join(entry.group().split()), json.dumps(data, indent=2))
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}; the fastest tiles stand in the report") from error
