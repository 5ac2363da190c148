"""What a backend is tried with, and checks of any backend's networks against eager, for `engine.acceptance`.

Each function takes a `Trial`, gives what it saw, in words, and raises `TrialError` where that isn't right.
"""

import dataclasses
import gc
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from storyadapter.demo.held_out import held_out_stories
from storyadapter.engine.backends import find_backend
from storyadapter.engine.calibration import find_or_make_scales, quantized
from storyadapter.engine.identity import model_weights
from storyadapter.engine.opening import build_engine, open_networks
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.method.constants import PIXEL_MULTIPLE
from storyadapter.method.errors import StoryAdapterError
from storyadapter.method.events import frames_by_iteration
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.contract import ShapeRanges
from storyadapter.model.examples import Example, compare_with_eager, example_inputs, run_examples
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import NumberFormat, Numerics, Precision, Quantization
from storyadapter.runtime.pipeline import StoryPipeline
from storyadapter.runtime.psnr import in_words, passes, psnr_of_each
from storyadapter.runtime.story_source import FinishedIteration

_FP32: Final = Numerics("fp32")
_SCALE: Final = 0.5  # λ of the iteration with references
# dB that a quantized engine's pictures may be further from fp32's than those of eager's emulation: both round, and
# what is rounded to another neighbour grows from step to step
_QUANTIZED_MARGIN: Final = 3.0
_SHAPES: Final = 12  # of the denoiser, tried in turn: more than any session keeps ready
_CALLS: Final = 4  # with one shape and addresses: the first, that which is captured, and replays
_BURN: Final = 100_000_000  # cycles of a GPU, for work that isn't done yet when a network is called


class TrialError(StoryAdapterError):
    """A check saw what isn't right."""


@dataclass(frozen=True)
class Trial:
    """A backend with a model and an engine store, as plain data.

    Attributes:
        backend: its name.
        folder: the engine store.
        paths: the model's files.
        ranges: what its engines are built for.
        options: how, as the backend's `options` gives them.
        precision, number_format: of its engine.
        frames, steps: of the story whose pictures are compared, drawn once without references and once with them.
    """

    backend: str
    folder: Path
    paths: CheckpointPaths
    ranges: ShapeRanges
    options: Any = None
    precision: Precision = "fp16"
    number_format: NumberFormat | None = None
    frames: int = 16
    steps: int = 20

    def model(self) -> tuple[Checkpoint, Numerics]:
        """The model and its numerics: quantized where the trial is of a number format, by scales that are found first.

        Raises:
            UnavailableError: what calibrates isn't installed.
        """
        checkpoint = Checkpoint.open(self.paths)
        if self.number_format is None:
            return checkpoint, checkpoint.geometry.numerics(self.precision)
        numerics = checkpoint.geometry.numerics(self.precision, None, Quantization(self.number_format))
        key, asked = model_weights(checkpoint).key, numerics.quantizations
        return quantized(checkpoint, numerics, find_or_make_scales(checkpoint, key, asked, self.folder))

    def engine(self) -> StoredEngine:
        """The engine that was built. Raises TrialError: there is none."""
        checkpoint, numerics = self.model()
        identity = find_backend(self.backend).identity(checkpoint, numerics, self.options)
        if (engine := EngineStore(self.folder).get(identity, self.ranges)) is None:
            raise TrialError("there is no engine: what builds it failed")
        return engine

    def open(self) -> tuple[Checkpoint, Networks]:
        """The model, and its networks on the backend. Raises TrialError: the engine wasn't built."""
        if find_backend(self.backend).builds:
            self.engine()
        checkpoint, numerics = self.model()
        return checkpoint, open_networks(
            checkpoint, backend=self.backend, numerics=numerics, ranges=self.ranges, engine_dir=self.folder
        )

    def shapes(self) -> Iterator[dict[str, int]]:
        """Values of all letters: the largest first, then others between least and most."""
        scale, random = Checkpoint.open(self.paths).geometry.pixels_per_latent, Random(0)
        for index in range(_SHAPES):
            values = {}
            for letter, allowed in self.ranges.letters(scale).items():
                unit = PIXEL_MULTIPLE // scale if letter in ("h", "w") else 1
                below = random.randint(0, (allowed.maximum - allowed.minimum) // unit) if index else 0
                values[letter] = allowed.maximum - unit * below
            yield values


def build(trial: Trial) -> str:
    """Build the engine."""
    checkpoint, numerics = trial.model()
    identity = find_backend(trial.backend).identity(checkpoint, numerics, trial.options)
    engine = build_engine(checkpoint, identity, trial.ranges, options=trial.options, engine_dir=trial.folder)
    return f"{identity.backend_version} for {identity.architecture}, {engine.bytes / 2**20:,.0f} MiB"


def load(trial: Trial) -> str:
    """Open the engine."""
    _, networks = trial.open()
    return f"{len(networks.by_name)} networks on {networks.device}"


def compare_networks(trial: Trial) -> str:
    """Every network gives what eager gives, at two points of its ranges."""
    checkpoint, networks = trial.open()
    errors = {}
    for name, module in iterate_modules(checkpoint, networks.numerics, grca, device=networks.device):
        precision, letters = networks.numerics[name], trial.ranges.letters(checkpoint.geometry.pixels_per_latent)
        examples = run_examples(networks[name].spec, module, letters, precision)
        errors[name] = compare_with_eager(name, networks[name], examples, precision, networks.numerics.tolerance(name))
    worst = max(errors, key=errors.__getitem__)
    return f"relative error {errors[worst]:.1e} at the most ({worst}), {errors['denoiser']:.1e} of the denoiser"


def compare_shapes(trial: Trial) -> str:
    """The denoiser gives what eager gives at sizes that change from call to call, and come again."""
    checkpoint, networks = trial.open()
    shapes, worst = list(trial.shapes()), 0.0
    denoiser, precision = networks["denoiser"], networks.numerics["denoiser"]
    ((_, module),) = iterate_modules(checkpoint, networks.numerics, grca, {"denoiser"}, networks.device)
    for index, letters in enumerate(shapes * 2):
        inputs = _on(networks, example_inputs(denoiser.spec, letters, precision, index))
        with torch.inference_mode():
            example = Example(inputs, {"noise": module(*inputs.values())})
        limit = networks.numerics.tolerance("denoiser")
        worst = max(worst, compare_with_eager(f"denoiser at {letters}", denoiser, [example], precision, limit))
    return f"{len(shapes)} shapes twice, relative error {worst:.1e} at the most"


def compare_repeated(trial: Trial) -> str:
    """The same call gives the same bytes, and reads its inputs anew each time."""
    _, networks = trial.open()
    repeat(networks, trial)
    return f"equal bytes in {_CALLS} calls, and in {_CALLS} with other values at the same addresses"


def repeat(networks: Networks, trial: Trial) -> None:
    """See `compare_repeated`; of networks that are open."""
    letters = next(trial.shapes())
    place, *both = (_inputs(networks, "denoiser", letters, seed) for seed in (0, 0, 1))
    expected = [_called(networks, "denoiser", values)["noise"] for values in both]
    if torch.equal(*expected):
        raise TrialError("other inputs gave the same result")
    for values, right in zip(both, expected, strict=True):
        for name, value in values.items():
            place[name].copy_(value)
        if not all(torch.equal(_called(networks, "denoiser", place)["noise"], right) for _ in range(_CALLS)):
            raise TrialError("a call gave other bytes than one with equal values at other addresses")


def compare_interleaved(trial: Trial) -> str:
    """Networks that are called in turn, without waiting for one before the next, give what each gives alone."""
    _, networks = trial.open()
    letters = next(trial.shapes())
    inputs = {name: _inputs(networks, name, letters) for name in networks.by_name}
    alone = {name: _called(networks, name, values) for name, values in inputs.items()}
    together = [{name: _copied(networks[name](values)) for name, values in inputs.items()} for _ in range(_CALLS)]
    _wait(networks)
    for name, expected in alone.items():
        for found in together:
            if other := [output for output, value in expected.items() if not torch.equal(found[name][output], value)]:
                raise TrialError(f"{name}: {other[0]} is another when networks are called in turn")
    return f"{len(inputs)} networks, {_CALLS} rounds, equal bytes"


def compare_streams(trial: Trial) -> str:
    """A network called on any CUDA stream waits for what was put there before it, and what comes after waits for it."""
    _, networks = trial.open()
    letters = next(trial.shapes())
    first, second = (_inputs(networks, "denoiser", letters, seed) for seed in (0, 1))
    expected = [_called(networks, "denoiser", values)["noise"] for values in (first, second)]
    # what a call that doesn't wait reads is wrong, but numbers of rows that there are
    place = {name: value.clone() for name, value in second.items()}
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for round_ in range(_CALLS):
        for stream in streams:
            with torch.cuda.stream(stream):
                found = []
                torch.cuda._sleep(_BURN)
                for values in (first, second):
                    for name, value in values.items():
                        place[name].copy_(value)
                    found.append(networks["denoiser"](place)["noise"].clone())
            torch.cuda.synchronize()
            for value, right in zip(found, expected, strict=True):
                if not torch.equal(value, right):
                    raise TrialError(f"in round {round_ + 1}, a call didn't keep the order of its stream")
    return f"{len(streams)} streams, {_CALLS} rounds, equal bytes"


def compare_pictures(trial: Trial) -> str:
    """Pictures of two iterations, both from eager's references, are as near to eager's in fp32 as they must be."""
    checkpoint, networks = trial.open()
    story, plan = _story(trial, checkpoint)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # or a GPU's convolutions have fp16's ten bits
        expected = _drawn(_eager(trial, Checkpoint.open(trial.paths), _FP32), checkpoint, story, plan)
    found, half = _from_same(networks, checkpoint, story, plan, expected)
    if trial.number_format is None:
        told = f"{len(found)} frames, {in_words(found)}"
        if not passes(found):
            raise TrialError(f"{told}: too far from eager's")
        if passes(half):
            raise TrialError(f"{told}, but half the λ passes too ({in_words(half)}): the comparison sees nothing")
        return f"{told}; half the λ: {in_words(half)}"
    emulated, _ = _from_same(_eager(trial, checkpoint, networks.numerics), checkpoint, story, plan, expected)
    told = f"{len(found)} frames, {in_words(found)} from fp32; eager's emulation: {in_words(emulated)}"
    if statistics.median(found) < statistics.median(emulated) - _QUANTIZED_MARGIN:
        raise TrialError(f"{told}: too far", expected=f"no more than {_QUANTIZED_MARGIN:g} dB below the emulation")
    return told


def _story(trial: Trial, checkpoint: Checkpoint) -> tuple[Story, RunPlan]:
    pixels, most = checkpoint.geometry.default_pixels, trial.ranges.max_frames
    settings: dict[str, Any] = {"steps": trial.steps, "max_frames": most, "prompt_chunks": "1"}
    plan = RunPlan(height=pixels, width=pixels, scales=(_SCALE,), seed=0, **settings)
    story = Story(tuple(held_out_stories(1, trial.frames)[0].prompts), style="none")
    return story, plan.for_model(checkpoint.sampling)


def _eager(trial: Trial, checkpoint: Checkpoint, numerics: Numerics) -> Networks:
    device = find_backend(trial.backend).device()
    return open_networks(checkpoint, backend="eager", numerics=numerics, device=device)


def _drawn(
    networks: Networks, checkpoint: Checkpoint, story: Story, plan: RunPlan, resume: FinishedIteration | None = None
) -> list[list[Image.Image]]:
    events = StoryPipeline(networks, checkpoint.load_tokenizers()).run(story, plan, resume=resume)
    drawn = list(frames_by_iteration(events))
    gc.collect()
    return drawn


def _from_same(
    networks: Networks, checkpoint: Checkpoint, story: Story, plan: RunPlan, expected: list[list[Image.Image]]
) -> tuple[list[float], list[float]]:
    """dB to `expected` of both iterations, the second drawn from its first one; and of the second with half its λ."""
    resume = FinishedIteration(0, expected[0])
    halved = dataclasses.replace(plan, scales=(_SCALE / 2,))
    (text_only,) = _drawn(networks, checkpoint, story, dataclasses.replace(plan, scales=()))
    (second,), (half,) = (_drawn(networks, checkpoint, story, way, resume) for way in (plan, halved))
    return psnr_of_each([*text_only, *second], [*expected[0], *expected[1]]), psnr_of_each(half, expected[1])


def _inputs(networks: Networks, name: str, letters: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    return _on(networks, example_inputs(networks[name].spec, dict(letters), networks.numerics[name], seed))


def _on(networks: Networks, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(networks.device) for name, value in inputs.items()}


def _called(networks: Networks, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's outputs, when they are there; copied, as its next call writes their memory again."""
    outputs = _copied(networks[name](inputs))
    _wait(networks)
    return outputs


def _copied(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in outputs.items()}


def _wait(networks: Networks) -> None:
    if networks.device.type == "cuda":
        torch.cuda.synchronize(networks.device)
