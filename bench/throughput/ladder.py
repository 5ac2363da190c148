"""Runs the ladder: each rung is compared with the one below, and only then timed."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from storyadapter.bench.environment import watch
from storyadapter.bench.report import Progress
from storyadapter.bench.throughput.cases import Case
from storyadapter.bench.throughput.inputs import CaseInputs
from storyadapter.bench.throughput.rungs import Rung, Steps
from storyadapter.bench.throughput.workbench import Workbench
from storyadapter.bench.timing import Timing, measure
from storyadapter.cli.options import typed
from storyadapter.method.errors import InputError
from storyadapter.method.plan import split_evenly
from storyadapter.method.sampler import SamplerTable
from storyadapter.model.networks import Network
from storyadapter.model.numerics import NumberFormat
from storyadapter.runtime.psnr import MIN_PSNR, decibels

BUDGET_SECONDS: float | None = 4.0  # of timed steps, per rung and case
WARMUP_SECONDS: Final = 0.5

MEASURED, WRONG, FAILED, NOT_RUN = "measured", "wrong", "failed", "not run"


@dataclass(frozen=True)
class Comparison:
    """How a rung's drawings differ from those of another."""

    other: str  # the rung it was compared with
    psnr: float  # dB, of the frame that differs most, from pictures decoded in fp32
    latents: float  # ‖difference‖ / ‖other‖ of all frames' latents


@dataclass(frozen=True)
class RungResult:
    """What was found of one rung on one case."""

    case: str
    rung: str
    adds: str  # what the rung adds to the one below
    baseline: bool
    status: str  # "measured", "wrong" (its pictures differ: not timed), "failed" or "not run"
    reason: str = ""  # why it isn't measured
    comparison: Comparison | None = None  # with the rung below; None for the lowest
    rows: int = 0  # of one UNet call
    timing: Timing | None = None  # of one step: UNet call, guidance and sampler
    peak_bytes: int | None = None  # most memory of the device in use by tensors, the model's included; None on a CPU
    load: dict[str, float] = field(default_factory=dict)  # clock and power while it was timed
    number_format: NumberFormat | None = None  # of a quantized denoiser

    @property
    def rows_per_second(self) -> float | None:
        return None if self.timing is None else self.rows / self.timing.median * 1e3


@dataclass(frozen=True, eq=False)
class Drawing:
    """What a rung drew: latents [F, 4, h, w] and pictures [F, 3, 8h, 8w] fp32, on the CPU."""

    latents: Tensor
    pictures: Tensor


class WrongPictures(Exception):
    """A rung draws something else than the one below."""


def draw(rung: Rung, steps: Steps, inputs: CaseInputs, table: SamplerTable) -> Tensor:
    """The latents of all frames of a case, [F, 4, h, w] fp32 on the CPU."""
    parts = []
    for frames in split_evenly(inputs.case.frames, rung.at_once(inputs.case.frames)):
        # cloned, as a loop may give the same tensor after every step
        (last,) = deque((state.clone() for state in steps(inputs, table, frames)), maxlen=1)
        parts.append(last.cpu())
    return torch.cat(parts)


def endless(rung: Rung, steps: Steps, inputs: CaseInputs) -> Callable[[], Tensor]:
    """One step per call, on the first frames that the rung draws at once; begins anew when a loop has ended."""

    def forever() -> Iterator[Tensor]:
        while True:
            yield from steps(inputs, inputs.timed_table, range(rung.at_once(inputs.case.frames)))

    return functools.partial(next, forever())


@dataclass(frozen=True)
class Pictures:
    """Latents to pictures in fp32, the same for all: by the eager network `vae_decoder`, which lies on `device`."""

    decoder: Network
    device: torch.device

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [F, 4, h, w] fp32 → pictures [F, 3, 8h, 8w] in -1 to 1, both on the CPU, one by one."""
        with torch.inference_mode():
            frames = [self.decoder({"latents": frame})["image"].cpu() for frame in latents.to(self.device).split(1)]
        return torch.cat(frames).clamp(-1, 1)


def compare(other: str, found: Drawing, expected: Drawing) -> Comparison:
    """Two drawings of the same frames; `other` names the rung of the expected one."""
    errors = (found.pictures - expected.pictures).square().flatten(1).mean(1)
    worst = decibels(float(errors.max()), 2)
    difference = (found.latents - expected.latents).norm() / expected.latents.norm()
    return Comparison(other, worst, float(difference))


@dataclass
class Ladder:
    """One run over rungs and cases."""

    workbench: Workbench  # gives each rung its model
    inputs: dict[str, CaseInputs]  # of each case, by name
    pictures: Pictures  # decodes what is compared
    progress: Progress  # tells how far it is

    def run(self, rungs: Sequence[Rung], baselines: Sequence[Rung]) -> list[RungResult]:
        """All rungs over their cases, then the baselines, which are compared with the highest rung that draws alike."""
        results: list[RungResult] = []
        drawn: dict[str, tuple[str, Drawing]] = {}  # by case: the highest right rung so far, and what it drew
        for rung in (*rungs, *baselines):
            for inputs in self.inputs.values():
                if not runs(rung, inputs.case):
                    continue
                self.progress.begin(f"{inputs.case.name}: {rung.name}")
                result, drawing = self._measure(rung, inputs, drawn.get(inputs.case.name))
                if drawing is not None and not rung.baseline:
                    drawn[inputs.case.name] = rung.name, drawing
                results.append(result)
                self.progress.done(describe(result))
        return results

    def _measure(
        self, rung: Rung, inputs: CaseInputs, below: tuple[str, Drawing] | None
    ) -> tuple[RungResult, Drawing | None]:
        blank = functools.partial(
            RungResult, inputs.case.name, rung.name, rung.adds, rung.baseline, number_format=rung.number_format
        )
        device = self.workbench.model.device
        found: dict[str, Any] = {}
        try:
            steps = rung.prepare(self.workbench)
            with ExitStack() as stack:

                def check() -> None:
                    latents = draw(rung, steps, inputs, inputs.table)
                    found["drawing"] = Drawing(latents, self.pictures.decode(latents))
                    if below is not None:
                        found["comparison"] = compare(below[0], found["drawing"], below[1])
                    check_drawing(found["drawing"], None if rung.number_format else found.get("comparison"))
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)  # the decoder's is no part of it
                    found["load"] = stack.enter_context(watch(device))

                timed = functools.partial(measure, graph=False, warmup_seconds=WARMUP_SECONDS)
                timing = timed([endless(rung, steps, inputs)], check, device, budget_seconds=BUDGET_SECONDS)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        except WrongPictures as error:
            return blank(WRONG, str(error), found.get("comparison")), None
        except InputError as error:  # it can't be had here; an engine that can't be built has failed
            return blank(NOT_RUN, typed(error)), None
        except torch.OutOfMemoryError as error:
            return blank(NOT_RUN, f"doesn't fit: {str(error).split('. GPU')[0]}"), None
        except Exception as error:  # whatever a compiler or a library raises: the other rungs are still worth measuring
            return blank(FAILED, failure(error)), None
        measured = (2 * rung.at_once(inputs.case.frames), timing, peak, found["load"].as_data())
        return blank(MEASURED, "", found.get("comparison"), *measured), found["drawing"]


def check_drawing(drawing: Drawing, comparison: Comparison | None) -> None:
    """Whether a rung may be timed.

    Raises:
        WrongPictures: what it drew isn't finite, or differs too much from what the rung below drew.
    """
    for name, values in (("latents", drawing.latents), ("pictures", drawing.pictures)):
        if not values.isfinite().all():
            raise WrongPictures(f"its {name} have values that are not finite")
    if comparison is not None and not comparison.psnr >= MIN_PSNR:
        raise WrongPictures(
            f"a picture is {comparison.psnr:.1f} dB from that of {comparison.other}; expected {MIN_PSNR:g} or more"
        )


def runs(rung: Rung, case: Case) -> bool:
    """Whether a case is for this rung: baselines run those that have all rungs."""
    return case.rungs is None or (not rung.baseline and rung.name in case.rungs)


def describe(result: RungResult) -> str:
    """One line for the progress."""
    if result.rows_per_second is None:
        return f"{result.status}: {result.reason}"
    compared = "" if result.comparison is None else f", {result.comparison.psnr:.1f} dB to {result.comparison.other}"
    return f"{result.rows_per_second:.2f} rows/s{compared}"


def failure(error: Exception) -> str:
    """An exception that nobody expected, in one line."""
    first = next((line for line in typed(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}"
