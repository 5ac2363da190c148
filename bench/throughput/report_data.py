"""Everything that a throughput report says, as plain data: the JSON file. The page and the chart are made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from storyadapter.bench.compare import KIND
from storyadapter.bench.throughput.cases import PUBLISHED, Case, StoryCase
from storyadapter.bench.throughput.kernel_classes import KernelTimes
from storyadapter.bench.throughput.ladder import MEASURED, RungResult
from storyadapter.bench.throughput.story import StoryResult

VERSION: Final = 2  # 1 called a baseline a rival


@dataclass(frozen=True)
class Undrawn:
    """A whole story that wasn't drawn in some way: `status` is "failed" or "not run"."""

    name: str
    status: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.status}: {self.reason}"


@dataclass(frozen=True)
class ThroughputReport:
    """What a run of the benchmark found.

    Attributes:
        environment: see `storyadapter.bench.environment.describe`.
        model: its label; precision: of all networks but the VAE.
        cases, stories: that were run.
        operations: of one UNet call with all rows of a case, by its name.
        matrix_flops: measured rate of the device's matrix products; None on a CPU.
        rungs, drawn: results of the ladder and of the whole stories.
        undrawn: whole stories that weren't drawn.
        build_seconds: by backend, of the engines that were built in this run.
        profiled: case and rung of the call whose kernels were timed, and those; None on a CPU.
        gpu_price: money per hour of the device, or None.
    """

    environment: dict[str, str]
    model: str
    precision: str
    cases: Sequence[Case]
    stories: Sequence[StoryCase]
    matrix_flops: float | None
    gpu_price: float | None
    build_seconds: Mapping[str, float]
    operations: Mapping[str, int] = field(default_factory=dict)
    rungs: Sequence[RungResult] = ()
    drawn: list[StoryResult] = field(default_factory=list)
    undrawn: list[Undrawn] = field(default_factory=list)
    profiled: tuple[str, str, KernelTimes] | None = None

    def highest(self, case: str) -> RungResult | None:
        """The highest rung of the ladder that was measured on a case: what whole stories are drawn by."""
        measured = [r for r in self.rungs if r.case == case and r.status == MEASURED and not r.baseline]
        return measured[-1] if measured else None

    def money(self, seconds: float) -> float | None:
        """What so many seconds of the device cost."""
        return None if self.gpu_price is None else self.gpu_price * seconds / 3600


def as_data(found: ThroughputReport) -> dict[str, Any]:
    """The report as JSON data."""
    profiled = None
    if found.profiled is not None:
        case, rung, times = found.profiled
        profiled = {
            "case": case,
            "rung": rung,
            "kernels": times.kernels,
            "milliseconds": times.milliseconds,
            "slowest": [{"name": n, "class": c, "milliseconds": ms} for n, c, ms in times.slowest],
        }
    return {
        "kind": KIND,
        "version": VERSION,
        "environment": found.environment,
        "model": found.model,
        "precision": found.precision,
        "gpu_price": found.gpu_price,
        "matrix_flops": found.matrix_flops,
        "cases": [{**asdict(case), "operations": found.operations.get(case.name)} for case in found.cases],
        "story_cases": [asdict(case) for case in found.stories],
        "rungs": [_rung(found, result) for result in found.rungs],
        "stories": [_story(found, result) for result in found.drawn],
        "undrawn": [str(story) for story in found.undrawn],
        "build_seconds": dict(found.build_seconds),
        "kernels": profiled,
        "cost_over_references": cost_over_references(found),
        "published_workload": projection(found),
    }


def _rung(found: ThroughputReport, result: RungResult) -> dict[str, Any]:
    data: dict[str, Any] = {
        "case": result.case,
        "rung": result.rung,
        "adds": result.adds,
        "baseline": result.baseline,
        "status": result.status,
    }
    if result.reason:
        data["reason"] = result.reason
    if result.comparison is not None:
        data["compared_with"] = asdict(result.comparison)
    rate = result.rows_per_second
    if rate is None or result.timing is None:
        return data
    case = next(case for case in found.cases if case.name == result.case)
    flops = found.operations[case.name] / case.rows * rate
    per_frame = 2 * PUBLISHED.steps * (1 + PUBLISHED.iterations) / rate
    return data | {
        "rows": result.rows,
        "rows_per_second": rate,
        "ms_per_call": result.timing.median,
        "tflops": flops / 1e12,
        "matrix_share": None if found.matrix_flops is None else flops / found.matrix_flops,
        "peak_bytes": result.peak_bytes,
        "seconds_per_frame": per_frame,
        "money_per_frame": found.money(per_frame),
        "load": result.load,
        "timing": result.timing.as_data(),
    }


def _story(found: ThroughputReport, result: StoryResult) -> dict[str, Any]:
    highest = found.highest(unet_case(found, result))
    rate = highest.rows_per_second if highest is not None else None
    return {
        **asdict(result),
        "seconds_per_frame": result.seconds_per_frame,
        "rows_per_second": result.rows_per_second,
        "share_of_unet_rate": None if rate is None else result.rows_per_second / rate,
        "stage_shares": {name: seconds / result.seconds for name, seconds in result.stages.items()},
        "money_per_frame": found.money(result.seconds_per_frame),
    }


def unet_case(found: ThroughputReport, result: StoryResult) -> str:
    """The case of the ladder whose UNet calls a story made: as many references and frames at once, and that size."""
    wanted = next(case for case in found.stories if case.name == result.case)
    for case in found.cases:
        same = (case.references, case.frames, case.height, case.width)
        if same == (wanted.frames, result.at_once, wanted.height, wanted.width):
            return case.name
    return ""


def cost_over_references(found: ThroughputReport) -> dict[str, Any] | None:
    """Rows per second of the highest rung that was measured on several cases, by number of references."""
    order = [result.rung for result in found.rungs if not result.baseline]
    references = {case.name: case.references for case in found.cases}
    for rung in reversed(list(dict.fromkeys(order))):
        measured = [r for r in found.rungs if r.rung == rung and r.status == MEASURED]
        if len(measured) > 1:
            rates = {references[result.case]: result.rows_per_second or 0.0 for result in measured}
            few, many = rates[min(rates)], rates[max(rates)]
            by_references = {str(count): rates[count] for count in sorted(rates)}
            return {"rung": rung, "rows_per_second": by_references, "most_over_fewest": many / few}
    return None


def projection(found: ThroughputReport) -> list[dict[str, Any]]:
    """The published workload's time, for each whole story: its UNet rows at the rate measured with the most
    references, and every frame's other work as long as in the story."""
    most = max(found.cases, key=lambda case: case.references, default=None)
    if most is None or (most.height, most.width) != (PUBLISHED.height, PUBLISHED.width):
        return []
    highest = found.highest(most.name)
    if highest is None or highest.rows_per_second is None:
        return []
    projected = []
    for result in found.drawn:
        of_story = found.highest(unet_case(found, result))
        if of_story is None or of_story.rows_per_second is None:
            continue
        unet = result.unet_rows / of_story.rows_per_second
        rest = max(0.0, result.seconds - unet) / result.drawn
        seconds = PUBLISHED.unet_rows / highest.rows_per_second + PUBLISHED.drawn * rest
        projected.append(
            {
                "way": result.way,
                "vae_precision": result.vae_precision,
                "rows": PUBLISHED.unet_rows,
                "rows_per_second": highest.rows_per_second,
                "references": most.references,
                "drawn": PUBLISHED.drawn,
                "rest_seconds_per_drawn_frame": rest,
                "seconds": seconds,
                "seconds_per_frame": seconds / PUBLISHED.frames,
                "money": found.money(seconds),
            }
        )
    return projected
