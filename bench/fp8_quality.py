"""A quantized model beside the exact one, on held-out stories: by the rule for modes that draw other pictures.

Its denoiser is quantized, its VAE's decoder, or both. Consistency and fidelity of the last iteration are compared story
by story, by `is_as_good`. Beside it stand models with scales that are deliberately wrong, of which those named in
`MUST_FAIL` must be found out: else the measure sees nothing.
"""

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from storyadapter.bench.quality_run import (
    LOSS_AT_MOST,
    Drawer,
    Drawings,
    Estimate,
    as_tensor,
    bootstrap,
    consistency_and_fidelity,
    demo_model,
    is_as_good,
    read_labels,
)
from storyadapter.bench.report import table
from storyadapter.demo.held_out import held_out_stories
from storyadapter.model.numerics import NUMBER_FORMATS, VAE_NUMBER_FORMATS, NumberFormat
from storyadapter.quantization.scales import Scales
from storyadapter.runtime.pipeline import FinishedIteration
from storyadapter.runtime.psnr import psnr_of_each


def multiplied(factor: float) -> Callable[[Scales], Scales]:
    """Scales that are so many times what they should be."""
    return lambda scales: replace(scales, inputs={name: factor * value for name, value in scales.inputs.items()})


def shuffled(scales: Scales) -> Scales:
    """Each input has the scale of another; layers that read the same input still have one."""
    own = sorted(set(scales.inputs.values()))
    others = random.Random(0).sample(own, len(own))
    of = dict(zip(own, others, strict=True))
    return replace(scales, inputs={name: of[value] for name, value in scales.inputs.items()})


CONTROLS: Final[Mapping[str, Callable[[Scales], Scales]]] = {
    "scales / 4": multiplied(1 / 4),
    "scales shuffled": shuffled,
    "scales x 4": multiplied(4.0),
}
MUST_FAIL: Final = ("scales / 4", "scales shuffled")
# Of a VAE alone. A judge of traits isn't misled by what shuffled scales do to a decoder, whose layers' are much alike.
VAE_CONTROLS: Final[Mapping[str, Callable[[Scales], Scales]]] = {"scales / 16": multiplied(1 / 16), **CONTROLS}
VAE_MUST_FAIL: Final = ("scales / 16",)


@dataclass(frozen=True)
class Ratios:
    """PSNR to the exact pictures of the last iteration, dB."""

    median: float
    worst: float

    def __str__(self) -> str:
        return f"{self.median:.1f} / {self.worst:.1f}"


@dataclass(frozen=True)
class Compared:
    """A model beside the exact one, at the last iteration."""

    name: str
    consistency: Estimate
    fidelity: Estimate
    consistency_less_exact: Estimate
    fidelity_less_exact: Estimate
    given_references: Ratios  # both drawn with the exact one's iteration before as references
    free_running: Ratios  # each with its own

    def __str__(self) -> str:
        less = f"consistency {self.consistency_less_exact}, fidelity {self.fidelity_less_exact}, less the exact one's"
        return f"{self.name}: {less}; PSNR {self.given_references}, free-running {self.free_running}"

    @property
    def holds(self) -> bool:
        """Whether it is as good as the exact one, by the rule."""
        return is_as_good(self.consistency_less_exact, self.fidelity_less_exact)


@dataclass(frozen=True)
class Fp8Quality:
    """What was found."""

    exact: tuple[Estimate, Estimate]  # consistency and fidelity of the last iteration
    modes: tuple[Compared, ...]  # fp8, then the controls
    scales: str  # how they were had
    must_fail: tuple[str, ...] = MUST_FAIL  # those controls

    def holds(self) -> bool:
        """Whether fp8 is as good as the exact model, and the controls that must fail do."""
        fp8, *controls = self.modes
        return fp8.holds and not any(mode.holds for mode in controls if mode.name in self.must_fail)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "holds": {mode.name: mode.holds for mode in self.modes}}

    def table(self) -> str:
        """Markdown: a row for each model."""
        rows: list[list[Any]] = [["exact", *self.exact, *["-"] * 5]]
        for mode in self.modes:
            less = (mode.consistency_less_exact, mode.fidelity_less_exact)
            verdict = "holds" if mode.holds else "fails"
            rows.append(
                [mode.name, mode.consistency, mode.fidelity, *less, verdict, mode.given_references, mode.free_running]
            )
        header = ["model", "consistency", "fidelity", "less exact", "less exact", f"rule ({-LOSS_AT_MOST:g})"]
        header += ["PSNR given references, median / worst dB", "PSNR free-running"]
        return "\n".join(table(header, rows))


def asked_formats(args: argparse.Namespace) -> dict[str, NumberFormat]:
    """The number formats that were typed, by network."""
    typed = {"denoiser": (args.precision, NUMBER_FORMATS), "vae_decoder": (args.vae_precision, VAE_NUMBER_FORMATS)}
    return {network: value for network, (value, formats) in typed.items() if value in formats}


def judge(args: argparse.Namespace) -> Fp8Quality:
    """Draw the stories exactly, in fp8 and with wrong scales, and compare."""
    stories, exact = held_out_stories(args.stories, args.frames), demo_model(args)
    truth = np.stack([story.truth for story in stories])

    def told(line: str) -> None:
        print(line, flush=True)

    def measured(drawn: Drawings) -> Measured:
        return consistency_and_fidelity(read_labels(as_tensor(drawn)[-1]), truth)

    told("exact")
    expected = Drawer.of(exact, stories, args).draw()
    own = measured(expected)
    before = args.iterations - 1
    references = {place: FinishedIteration(before, drawn[before]) for place, drawn in expected.items()}
    formats = asked_formats(args)
    fp8, how = exact.calibrated(formats, told)
    controls, must_fail = (CONTROLS, MUST_FAIL) if "denoiser" in formats else (VAE_CONTROLS, VAE_MUST_FAIL)
    own_name = ", ".join(form if network == "denoiser" else f"VAE {form}" for network, form in formats.items())
    modes = []
    for name, changed in {own_name: lambda scales: scales, **controls}.items():
        told(name)
        wrong = {network: changed(scales) for network, scales in fp8.scales.items()}
        drawer = Drawer.of(exact.quantized(wrong), stories, args)
        free, given = drawer.draw(), drawer.draw(references)
        ratios = (_ratios(given, expected), _ratios(free, expected))
        modes.append(compare(name, measured(free), own, *ratios))
        told(str(modes[-1]))
    return Fp8Quality((bootstrap(own[0]), bootstrap(own[1])), tuple(modes), how, must_fail)


Measured = tuple[np.ndarray, np.ndarray]  # consistency and fidelity, float [stories]


def compare(name: str, found: Measured, exact: Measured, given_references: Ratios, free_running: Ratios) -> Compared:
    """What was measured of a model beside the exact one, story by story."""
    (consistent, faithful), (own_consistent, own_faithful) = found, exact
    return Compared(
        name,
        bootstrap(consistent),
        bootstrap(faithful),
        bootstrap(consistent - own_consistent),
        bootstrap(faithful - own_faithful),
        given_references,
        free_running,
    )


def _ratios(found: Drawings, expected: Drawings) -> Ratios:
    each = [db for place, drawn in found.items() for db in psnr_of_each(drawn[-1], expected[place][-1])]
    return Ratios(float(np.median(each)), min(each))
