"""Stories drawn in many modes, measured beside the exact one; see `frontier`."""

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from storyadapter.bench import quality_run
from storyadapter.bench.environment import describe
from storyadapter.bench.frontier_modes import EXACT, MODES
from storyadapter.bench.model import BenchmarkModel, usual_ranges
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.report import Progress
from storyadapter.bench.timing import measure_run
from storyadapter.checkpoint.paths import LoraSpec
from storyadapter.demo.held_out import HeldOutStory, held_out_stories
from storyadapter.demo.shipped import MODEL
from storyadapter.engine.backend import default_device
from storyadapter.method.plan import RunPlan
from storyadapter.output.files import write_atomically
from storyadapter.runtime.pipeline import StoryPipeline
from storyadapter.runtime.psnr import decibels

BALANCED_COST: Final = 0.5  # of the exact mode's, at the most
KEPT: Final = 0.95  # share of the exact mode's consistency and fidelity: `fast`
_TRIES: Final = 3  # modes that are tried on the other stories, from the cheapest on


@dataclass(frozen=True, eq=False)
class Drawn:
    """The last iteration of some stories in one mode."""

    labels: np.ndarray  # as the judge reads the pictures: [stories, seeds, frames, traits]
    seconds: float  # of everything
    pictures: torch.Tensor | None  # uint8 [stories, seeds, frames, 3, H, W]; None: they are gone


@dataclass(frozen=True)
class Measured:
    """One mode on one set of stories; `lost` are differences to the exact mode, story by story."""

    mode: str
    rows: int  # UNet rows of a frame, over all iterations
    cost: float  # of the exact mode's rows
    seconds_per_frame: float  # of a whole story, drawn together with the others
    consistency: quality_run.Estimate
    fidelity: quality_run.Estimate
    consistency_gained: quality_run.Estimate
    fidelity_gained: quality_run.Estimate
    psnr: float | None  # to the exact mode's pictures, dB, median
    lora: bool

    @property
    def keeps_all(self) -> bool:
        """DESIGN's rule for lossy modes."""
        return quality_run.is_as_good(self.consistency_gained, self.fidelity_gained)

    def keeps_most(self, exact: "Measured") -> bool:
        """Whether it keeps enough of the exact mode's means."""
        pairs = ((self.consistency, exact.consistency), (self.fidelity, exact.fidelity))
        return all(own.mean >= KEPT * its.mean for own, its in pairs)


@dataclass(frozen=True)
class Choice:
    """A mode chosen for a preset, and whether the other stories confirm it; None: no mode passes."""

    preset: str
    mode: str | None
    confirmed: bool


@dataclass(frozen=True)
class Frontier:
    """All that was found."""

    environment: dict[str, str]
    settings: dict[str, Any]
    measured: Sequence[Measured]  # on the stories that are chosen by, exact first
    confirmed: Sequence[Measured]  # on the others, exact first
    choices: Sequence[Choice]


def draw_only(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Draw one set of stories in some modes into the work folder, where another process finds them."""
    drawing = _Drawing(args)
    progress = Progress(len(names))
    for name in names:
        progress.begin(name)
        drawing.drawn(name, chosen_by=args.only_draw == "choose")
        progress.done("drawn")


def measure_frontier(args: argparse.Namespace, names: Sequence[str]) -> Frontier:
    """Draw, choose, confirm. `names`: of the modes, exact first."""
    drawing = _Drawing(args)
    progress = Progress(len(names))
    found = []
    for name in names:
        progress.begin(name)
        found.append(drawing.measured(name, chosen_by=True))
        progress.done(f"consistency {found[-1].consistency}, fidelity {found[-1].fidelity}")
    exact = drawing.measured(EXACT, chosen_by=False)
    confirmed = [exact]
    choices = []
    # presets need no extra files
    plain = sorted((one for one in found[1:] if not one.lora), key=lambda one: one.rows)
    rules: dict[str, Callable[[Measured, Measured], bool]] = {
        "balanced": lambda one, exact: one.keeps_all and one.cost <= BALANCED_COST,
        "fast": lambda one, exact: one.keeps_most(exact),
    }
    for preset, passes in rules.items():
        choice = Choice(preset, None, False)
        for candidate in [one for one in plain if passes(one, found[0])][:_TRIES]:
            again = next((one for one in confirmed if one.mode == candidate.mode), None)
            if again is None:
                confirmed.append(again := drawing.measured(candidate.mode, chosen_by=False))
            choice = Choice(preset, candidate.mode, passes(again, exact))
            if choice.confirmed:
                break
        choices.append(choice)
    loras = [one for one in found if one.lora and one.keeps_most(found[0])]
    confirmed += [drawing.measured(one.mode, chosen_by=False) for one in loras]
    return Frontier(describe(default_device(), args.commit), drawing.settings, found, confirmed, choices)


class _Drawing:
    """Draws sets of stories, each in each mode once, and keeps what is found in a folder where one is given."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._device = args, default_device()
        self._engine = EngineChoice.typed(args)
        self._stories = held_out_stories(args.stories + args.others, args.frames)
        self._drawn: dict[tuple[str, bool], Drawn] = {}
        self.settings = {
            "model": "the demo model" if args.model == MODEL else str(args.model),
            "backend": self._engine.backend,
            "precision": self._engine.precision,
        }
        names = ("stories", "others", "frames", "seeds", "iterations", "max_frames")
        self.settings |= {name: getattr(args, name) for name in names}

    def measured(self, name: str, chosen_by: bool) -> Measured:
        """A mode on the stories that are chosen by, or on the others."""
        truth = np.stack([story.truth for story in self._set(chosen_by)[1]])
        drawn, exact = (self.drawn(mode, chosen_by) for mode in (name, EXACT))
        kept, right = quality_run.consistency_and_fidelity(drawn.labels, truth)
        kept_by_exact, right_of_exact = quality_run.consistency_and_fidelity(exact.labels, truth)
        psnr = None
        if drawn.pictures is not None and exact.pictures is not None:
            errors = (drawn.pictures.float() - exact.pictures.float()).square().mean((-3, -2, -1))
            psnr = float(np.median([decibels(error, 255) for error in errors.flatten().tolist()]))
        rows, most = (self._plan(mode, 0).unet_rows(1) for mode in (name, EXACT))
        return Measured(
            name,
            rows,
            rows / most,
            drawn.seconds / drawn.labels[..., 0].size,
            quality_run.bootstrap(kept),
            quality_run.bootstrap(right),
            quality_run.bootstrap(kept - kept_by_exact),
            quality_run.bootstrap(right - right_of_exact),
            psnr,
            MODES[name].lora,
        )

    def drawn(self, name: str, chosen_by: bool) -> Drawn:
        """A set of stories in a mode."""
        if (name, chosen_by) not in self._drawn:
            self._drawn[name, chosen_by] = self._found(name, chosen_by) or self._draw(name, chosen_by)
        return self._drawn[name, chosen_by]

    def _draw(self, name: str, chosen_by: bool) -> Drawn:
        first, stories = self._set(chosen_by)
        places = product(range(len(stories)), range(self._args.seeds))
        plans = {(n, k): self._plan(name, quality_run.seed_of(first + n, k)) for n, k in places}
        pipeline = self._open(MODES[name].lora)
        pipeline.batching(plans[0, 0], self._args.frames, 1)  # measures memory, once
        drawings, seconds = measure_run(quality_run.Drawer(pipeline, stories, plans).draw, self._device)
        pictures = quality_run.as_tensor(drawings)[-1]
        drawn = Drawn(quality_run.read_labels(pictures), seconds, pictures)
        if path := self._path(name, chosen_by):
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {"labels": drawn.labels, "seconds": seconds, "how": self._how(name)}
            for to, arrays in ((_pictures(path), {"pictures": pictures.numpy()}), (path, found)):
                file = io.BytesIO()
                np.savez_compressed(file, **arrays)
                write_atomically(to, file.getvalue())
        return drawn

    def _found(self, name: str, chosen_by: bool) -> Drawn | None:
        path = self._path(name, chosen_by)
        if path is None or not path.is_file():
            return None
        with np.load(path) as file:
            if str(file["how"]) != self._how(name):
                return None
            labels, seconds = file["labels"], float(file["seconds"])
        if not _pictures(path).is_file():
            return Drawn(labels, seconds, None)
        with np.load(_pictures(path)) as file:
            return Drawn(labels, seconds, torch.from_numpy(file["pictures"]))

    def _set(self, chosen_by: bool) -> tuple[int, list[HeldOutStory]]:
        """The number of its first story, and its stories."""
        chosen = self._args.stories
        return (0, self._stories[:chosen]) if chosen_by else (chosen, self._stories[chosen:])

    def _plan(self, name: str, seed: int) -> RunPlan:
        model = self._model(lora=False)
        own, settings = model.checkpoint.geometry.default_pixels, MODES[name].plan_settings(self._args.iterations)
        settings |= {"height": own, "width": own, "max_frames": self._args.max_frames, "seed": seed}
        return RunPlan(prediction_type=model.prediction_type, prompt_chunks="1", **settings)

    def _path(self, name: str, chosen_by: bool) -> Path | None:
        words = name.replace(",", "").split()
        return self._args.work and self._args.work / f"{'-'.join(words)}{'' if chosen_by else '-others'}.npz"

    def _how(self, name: str) -> str:
        """What decides the pictures, beside the stories."""
        lora = sha256(self._args.lora.read_bytes()).hexdigest() if MODES[name].lora else None
        return json.dumps([self.settings, self._plan(name, 0).as_dict(), lora])

    @cache  # noqa: B019  # one for the whole run
    def _open(self, lora: bool) -> StoryPipeline:
        args, model = self._args, self._model(lora)
        ranges = usual_ranges(model.checkpoint.geometry, args.max_frames, args.frames)
        return model.pipeline(model.open(ranges, lambda line: print(line, flush=True)).networks)

    @cache  # noqa: B019
    def _model(self, lora: bool) -> BenchmarkModel:
        return quality_run.demo_model(self._args, *([LoraSpec(self._args.lora)] if lora else []))


def _pictures(path: Path) -> Path:
    """Where the pictures lie beside what was read off them; only the PSNR needs them."""
    return path.with_suffix(".pictures.npz")
