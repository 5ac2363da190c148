"""What an author adds to the method, on held-out stories of the demo model, read off the pictures by the judge.

Every study draws the same stories with the same seeds in several ways, its arms, and gives one number per story and
arm, so that stories, the independent unit, are what is resampled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from random import Random
from typing import Final

import numpy as np
import torch
from PIL import Image

from storyadapter.bench.frame_memory import FrameMemory
from storyadapter.bench.model import BenchmarkModel
from storyadapter.bench.quality_run import (
    IDENTITY_COLUMNS,
    PROMPT_COLUMNS,
    Estimate,
    bootstrap,
    demo_model,
    open_model,
    read_labels,
    seed_of,
)
from storyadapter.bench.report import table
from storyadapter.demo.held_out import PROMPTED, HeldOutStory, held_out_stories
from storyadapter.demo.vocabulary import IDENTITY_TRAITS, VISIBLE_TRAITS
from storyadapter.method import constants
from storyadapter.method.events import RunStarted, frames_by_iteration
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.runtime.pipeline import StoryPipeline

PICTURES: Final = 2  # of each character
_DRAWING: Final = 90_000  # before the seeds of pictures that are given


@dataclass(frozen=True)
class Study:
    """What was found: measure → arm → estimate; `differences` are paired over stories; `claims`: which hold."""

    measures: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Estimate]
    claims: Mapping[str, bool]
    facts: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Markdown: a row per arm; then the differences and the claims."""
        arms = dict.fromkeys(arm for found in self.measures.values() for arm in found)
        rows = [[arm, *(found.get(arm, "") for found in self.measures.values())] for arm in arms]
        lines = [*table(["arm", *self.measures], rows)]
        lines += [f"{name}: {difference}" for name, difference in self.differences.items()]
        lines += [f"{name}: {value:g}" for name, value in self.facts.items()]
        lines += [f"{claim}: {'yes' if holds else 'no'}" for claim, holds in self.claims.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Studio:
    """Held-out stories and what draws them."""

    stories: list[HeldOutStory]
    model: BenchmarkModel
    pipeline: StoryPipeline
    args: argparse.Namespace
    before: str = ""  # stands before every prompt of the study of long ones

    @classmethod
    def open(cls, args: argparse.Namespace) -> Studio:
        """Its engine is built for the prompts that its study draws."""
        model, stories, before, chunks = demo_model(args), held_out_stories(args.stories, args.frames), "", 1
        if args.study == "long-prompts":
            tokenizers = model.tokenizers()
            while tokenizers.chunks(before) < 2:
                before += constants.STYLES["realistic"][0]
            chunks = max(tokenizers.chunks(before + prompt) for story in stories for prompt in story.prompts)
        return cls(stories, model, open_model(model, args, chunks), args, before)

    def each(self, arm: str) -> Iterable[tuple[int, int]]:
        """Story and repeat of each drawing of an arm."""
        for number, repeat in product(range(len(self.stories)), range(self.args.seeds)):
            yield number, repeat
            print(f"{arm}: story {number + 1} of {len(self.stories)}, seed {repeat + 1} drawn", flush=True)

    def plan(self, number: int, repeat: int, **settings: object) -> RunPlan:
        args = self.args
        own = {"steps": args.steps, "guidance": args.guidance, "max_frames": args.max_frames, **settings}
        return self.model.plan(iterations=args.iterations, seed=seed_of(number, repeat), **own)

    def labels(self, drawings: Iterable[list[list[Image.Image]]]) -> np.ndarray:
        """[stories, repeats, iterations, frames, traits] of drawings in the order of `each`."""
        pixels = np.stack([np.stack([np.stack([np.asarray(p) for p in row]) for row in drawn]) for drawn in drawings])
        read = read_labels(torch.from_numpy(pixels).movedim(-1, -3))
        return read.reshape(len(self.stories), self.args.seeds, *read.shape[1:])


def study_references(studio: Studio) -> Study:
    """With two pictures of a character, do its frames show who is in them, rather than any other of its kind?"""
    from storyadapter.demo.training.scenes import Character, Scene, draw, labels, random_identity

    given, truth = [], []
    for number, story in enumerate(studio.stories):
        random = Random(_DRAWING + number)
        who = Character(story.character, random_identity(random))
        places = random.sample([*product(VISIBLE_TRAITS["action"], VISIBLE_TRAITS["place"])], PICTURES)
        scenes = [Scene(who, action, place, _DRAWING + number) for action, place in places]
        given.append([draw(scene) for scene in scenes])
        truth.append([labels(scenes[0])[name] for name in IDENTITY_TRAITS])
    identity = np.array(truth)[:, None, None, None]

    def drawn(arm: str, shown: Callable[[int], int] | None, keep: bool) -> np.ndarray:
        found = []
        for number, repeat in studio.each(arm):
            story = studio.stories[number]
            references = {story.character.species: given[shown(number)]} if shown else None
            plan = studio.plan(number, repeat, keep_references=keep)
            events = studio.pipeline.run(Story(tuple(story.prompts), style="none"), plan, references=references)
            found.append(list(frames_by_iteration(events)))
        return studio.labels(found)

    count = len(studio.stories)
    arms = {
        "without": drawn("without", None, False),
        "pictures": drawn("pictures", lambda number: number, False),
        "pictures, kept": drawn("pictures, kept", lambda number: number, True),
        "another's, kept": drawn("another's, kept", lambda number: (number + 1) % count, True),
    }
    own = {arm: (read[..., IDENTITY_COLUMNS] == identity).mean((1, 3, 4)) for arm, read in arms.items()}
    prompted = np.stack([story.truth for story in studio.stories])[:, None, None]
    fidelity = {arm: (r[..., PROMPT_COLUMNS] == prompted).all(-1).mean((1, 3)) for arm, r in arms.items()}
    first = {arm: bootstrap(values[:, 0]) for arm, values in own.items()}
    last = {arm: bootstrap(values[:, -1]) for arm, values in own.items()}

    def more(arm: str, iteration: int) -> Estimate:
        return bootstrap(own[arm][:, iteration] - own["without"][:, iteration])

    other = [more("another's, kept", iteration) for iteration in (0, -1)]
    return Study(
        {
            "given identity, first iteration": first,
            "given identity, last iteration": last,
            "fidelity, last iteration": {arm: bootstrap(values[:, -1]) for arm, values in fidelity.items()},
        },
        {
            "more of the given identity in the first iteration": more("pictures, kept", 0),
            "more of it in the last iteration": more("pictures, kept", -1),
            "more of it with another's pictures, first": other[0],
            "more of it with another's pictures, last": other[1],
        },
        {
            "found more often in the first iteration": first["pictures, kept"].low > first["without"].high,
            "found more often in the last iteration, kept": last["pictures, kept"].low > last["without"].high,
            "not found more often with another's": all(difference.low <= 0 for difference in other),
        },
    )


def study_edit(studio: Studio) -> Study:
    """Is a frame that was edited as good, and as much like the others, as in a story that was drawn anew?"""
    frames = studio.args.frames
    edited, rows = [], list[float]()
    found: dict[str, list[list[list[Image.Image]]]] = {"edited": [], "drawn anew": []}
    truth = [story.truth.copy() for story in studio.stories]
    for number, story in enumerate(studio.stories):
        scenes = [s for s in product(VISIBLE_TRAITS["action"], VISIBLE_TRAITS["place"]) if s not in story.scenes]
        action, place = Random(_DRAWING + number).choice(scenes)
        frame = number % frames
        changed = HeldOutStory(
            story.character, tuple(s if n != frame else (action, place) for n, s in enumerate(story.scenes))
        )
        edited.append((frame, changed))
        truth[number] = changed.truth
    for number, repeat in studio.each("edit"):
        frame, changed = edited[number]
        plan, store = studio.plan(number, repeat), FrameMemory()
        counted = []
        for prompts in (studio.stories[number].prompts, changed.prompts):
            story = Story(tuple(prompts), style="none")
            events = [*studio.pipeline.run(story, plan, store=store)]
            counted += [event.rows for event in events if isinstance(event, RunStarted)]
            store.stays = [n for n in range(frames) if n != frame]
        rows.append(counted[1] / counted[0])
        found["edited"].append([store.pictures(plan.iterations - 1)])
        anew = frames_by_iteration(studio.pipeline.run(Story(tuple(changed.prompts), style="none"), plan))
        found["drawn anew"].append([list(anew)[-1]])
    fidelity, alike = {}, {}
    places = np.array([frame for frame, _ in edited])
    for arm, drawings in found.items():
        read = studio.labels(drawings)[:, :, 0]  # [stories, repeats, frames, traits]
        new = read[np.arange(len(places)), :, places]  # [stories, repeats, traits]
        prompted = np.stack(truth)[np.arange(len(places)), places][:, None]
        fidelity[arm] = (new[..., PROMPT_COLUMNS] == prompted).all(-1).mean(1)
        same = (read[..., IDENTITY_COLUMNS] == new[:, :, None, IDENTITY_COLUMNS]).mean(-1).sum(2) - 1  # itself
        alike[arm] = (same / (frames - 1)).mean(1)
    measures = {"fidelity of the frame": fidelity, "agreement with the others": alike}
    estimates = {name: {arm: bootstrap(v) for arm, v in of_arm.items()} for name, of_arm in measures.items()}
    share = float(np.mean(rows))
    return Study(
        estimates,
        {f"{name}, edited less anew": bootstrap(v["edited"] - v["drawn anew"]) for name, v in measures.items()},
        {
            **{
                f"{name} within the interval, or better": arms["edited"].mean >= arms["drawn anew"].low
                for name, arms in estimates.items()
            },
            "costs its share of the rows": share == 1 / frames,
        },
        {"rows of the edit, of those of the story": share},
    )


def study_long_prompts(studio: Studio) -> Study:
    """Is what stands behind the 75th token of a prompt drawn, if prompts are read in chunks?"""

    def drawn(arm: str, before: str, chunks: str) -> np.ndarray:
        found = []
        for number, repeat in studio.each(arm):
            prompts = tuple(before + prompt for prompt in studio.stories[number].prompts)
            plan = replace(studio.plan(number, repeat, prompt_chunks=chunks), scales=())
            found.append(list(frames_by_iteration(studio.pipeline.run(Story(prompts, style="none"), plan))))
        return studio.labels(found)[:, :, 0]

    arms = {
        "cut at token 75": drawn("cut", studio.before, "1"),
        "in chunks": drawn("in chunks", studio.before, "auto"),
        "the short prompt": drawn("short", "", "1"),
    }
    truth = np.stack([story.truth for story in studio.stories])[:, None]
    right = {arm: read[..., PROMPT_COLUMNS] == truth for arm, read in arms.items()}
    species = {arm: bootstrap(values[..., PROMPTED.index("species")].mean((1, 2))) for arm, values in right.items()}
    return Study(
        {
            "species as prompted": species,
            "species, place and action as prompted": {
                arm: bootstrap(values.all(-1).mean((1, 2))) for arm, values in right.items()
            },
        },
        {},
        {"drawn right in chunks, and not where it is cut": species["in chunks"].low > species["cut at token 75"].high},
        {"species by chance": 1 / len(VISIBLE_TRAITS["species"])},
    )


STUDIES: Final[Mapping[str, Callable[[Studio], Study]]] = {
    "references": study_references,
    "edit": study_edit,
    "long-prompts": study_long_prompts,
}
