"""What is benchmarked: a model, its precision, its device, and networks of it on any backend."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, cast

import torch

from storyadapter.bench.options import EngineChoice
from storyadapter.bench.synthetic import MODELS, PREDICTION_TYPE, SyntheticCheckpoint
from storyadapter.bench.timing import measure_run
from storyadapter.checkpoint import Checkpoint
from storyadapter.cli.options import MAX_REFERENCES, ModelChoice, model_choice
from storyadapter.engine.backend import default_device
from storyadapter.engine.backends import find_backend
from storyadapter.engine.calibration import find_or_make_scales
from storyadapter.engine.identity import model_weights
from storyadapter.engine.opening import build_engine, open_networks
from storyadapter.engine.store import EngineStore
from storyadapter.method import constants
from storyadapter.method.errors import UnavailableError
from storyadapter.method.plan import RunPlan
from storyadapter.model.contract import Geometry, Range, ShapeRanges
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import NumberFormat, Numerics, Quantization
from storyadapter.quantization.scales import Scales
from storyadapter.runtime.conditioning import Tokenizers
from storyadapter.runtime.pipeline import StoryPipeline

Tell = Callable[[str], None]


def usual_ranges(geometry: Geometry, max_frames: int, frames: int, chunks: int = 1) -> ShapeRanges:
    """Those of `build --max-frames F`, so that its engine serves, unless the story has more frames than it expects, or
    longer prompts: of so many chunks."""
    own = Range(geometry.default_pixels, geometry.default_pixels)
    return ShapeRanges(max_frames, max(MAX_REFERENCES, frames), own, own, chunks)


@dataclass(frozen=True)
class Opened:
    """Networks on a backend; `build_seconds`: what building their engine took, 0 where the store had it."""

    networks: Networks
    build_seconds: float


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to be measured."""

    label: str  # for people
    checkpoint: Checkpoint  # its files, or a `SyntheticCheckpoint`, which has the same methods
    prediction_type: str  # what its UNet predicts
    engine: EngineChoice  # what runs it
    device: torch.device  # where everything runs
    scales: Mapping[str, Scales] = field(default_factory=dict)  # by which its networks are quantized

    @classmethod
    def typed(
        cls, args: argparse.Namespace, engine: EngineChoice, synthetic: str | None = None, controlnets: int = 0
    ) -> Self:
        """The model of random weights by its name, or else that of the options; on the device that is there."""
        if synthetic:
            return cls.synthetic(synthetic, engine, default_device(), controlnets)
        return cls.from_files(model_choice(args), engine, default_device())

    @classmethod
    def synthetic(cls, name: str, engine: EngineChoice, device: torch.device, controlnets: int = 0) -> Self:
        """A model of random weights, by the name of its sizes, with so many ControlNets."""
        checkpoint = SyntheticCheckpoint(MODELS[name], device, controlnets=controlnets)
        return cls(checkpoint.label, cast(Checkpoint, checkpoint), PREDICTION_TYPE, engine, device)

    @classmethod
    def from_files(cls, model: ModelChoice, engine: EngineChoice, device: torch.device) -> Self:
        """A model's files. Raises CheckpointError: see `Checkpoint.open`."""
        checkpoint = Checkpoint.open(model.paths)
        return cls(model.label, checkpoint, checkpoint.sampling.prediction_type or "epsilon", engine, device)

    @property
    def numerics(self) -> Numerics:
        own = {name: Quantization(scales.recipe.number_format, scales.key) for name, scales in self.scales.items()}
        of_vae = own.get("vae_decoder", self.engine.vae)
        return self.checkpoint.geometry.numerics(self.engine.precision, of_vae, own.get("denoiser"))

    def quantized(self, scales: Mapping[str, Scales]) -> Self:
        """The same, these networks quantized by these scales."""
        rewritten = self.checkpoint.rewritten({network: own.apply for network, own in scales.items()})
        return replace(self, checkpoint=rewritten, scales=scales)

    def calibrated(self, formats: Mapping[str, NumberFormat], tell: Tell) -> tuple[Self, str]:
        """The same, networks quantized by their own scales: of the store, or else found now; and how they were had.

        Raises:
            UnavailableError: nvidia-modelopt isn't installed.
        """
        fraction = 0.0

        def on_fraction(done: float) -> None:
            nonlocal fraction
            if not fraction or done - fraction >= 0.25:
                tell(f"    calibrating: {done:.0%}")
                fraction = done

        key, engine_dir = model_weights(self.checkpoint).key, self.engine.engine_dir
        asked = {network: Quantization(number_format) for network, number_format in formats.items()}
        find = partial(find_or_make_scales, self.checkpoint, key, asked, engine_dir, on_fraction=on_fraction)
        scales, seconds = measure_run(find, self.device)
        how = f"calibrated in {seconds:.0f} s" if fraction else "from the engine store"
        return self.quantized(scales), f"of {sum(len(own.inputs) for own in scales.values())} layers, {how}"

    def plan(self, *, iterations: int, height: int = 0, width: int = 0, **settings: Any) -> RunPlan:
        """A story's settings: the published λ, the model's own size where none is given, and prompts of one chunk, as
        the published program reads them, for which `usual_ranges` are."""
        own, scales = self.checkpoint.geometry.default_pixels, constants.reference_scales(iterations)
        settings = {"prompt_chunks": "1", **settings}
        settings |= {"height": height or own, "width": width or own, "prediction_type": self.prediction_type}
        return RunPlan(scales=scales, **settings)

    def tokenizers(self) -> Tokenizers:
        return Tokenizers(*self.checkpoint.load_tokenizers())

    def pipeline(self, networks: Networks) -> StoryPipeline:
        return StoryPipeline(networks, self.checkpoint.load_tokenizers())

    def open(
        self, ranges: ShapeRanges, tell: Tell, backend: str | None = None, numerics: Numerics | None = None
    ) -> Opened:
        """Networks on a backend; its engine is built first where the store has none for exactly these ranges: what is
        measured shall not depend on what else the store holds.

        Args:
            backend, numerics: others than those of the model's own engine.

        Raises:
            UnavailableError: the backend can't serve here.
            EngineBuildError: the engine can't be built.
        """
        numerics, engine_dir = numerics or self.numerics, self.engine.engine_dir
        name = backend or self.engine.backend
        chosen = find_backend(name)
        chosen.check(numerics, ranges if chosen.builds else None)
        if reason := chosen.why_it_cant_run():
            raise UnavailableError(f"backend {name}: {reason}")
        built, seconds = False, 0.0
        if chosen.builds:

            def on_stage(network: str, what: str) -> None:
                nonlocal built
                built = True
                if network:
                    tell(f"    building {name}: {network}: {what}")

            identity = chosen.identity(self.checkpoint, numerics)
            if EngineStore(engine_dir).get(identity, ranges) is None:
                tell(f"    the store has no engine of {name} for exactly this: it is built first, for minutes")
            build = partial(build_engine, self.checkpoint, identity, ranges, engine_dir=engine_dir, on_stage=on_stage)
            _, seconds = measure_run(partial(build, on_wait=lambda message: tell(f"    {message}")), self.device)
        networks = open_networks(
            self.checkpoint,
            backend=name,
            numerics=numerics,
            device=self.device if chosen.any_device else None,
            ranges=ranges,
            engine_dir=engine_dir,
        )
        return Opened(networks, seconds if built else 0.0)
