"""ControlNets in ONNX Runtime: networks exported with every letter free, and the pictures that they draw."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from storyadapter import api
from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.onnxruntime.networks import OnnxRuntimeNetwork
from storyadapter.export.onnx_export import export_compared
from storyadapter.method.events import FrameFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.pipeline import StoryPipeline
from tests.control_models import poses, write_controlnet
from tests.oracle.comparison import errors_of_frames
from tests.storyadapter.checkpoint.spoil import tiny_paths

NAMES = ("control_embedding_0", "control_projection_0", "controlnet_0", "denoiser")


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = write_controlnet(tiny_model_dir, tmp_path_factory.mktemp("control") / "openpose")
    return Checkpoint.open(tiny_paths(tiny_model_dir, controlnets=(folder,)))


def test_the_pictures_are_eagers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    letters = ShapeRanges(2, 6, Range(64, 96), Range(64, 64)).letters()
    specs, networks = network_specs(checkpoint.geometry), {}
    open_network = partial(OnnxRuntimeNetwork, precision="fp32", letters=letters)
    for name, module in iterate_modules(checkpoint, Numerics("fp32"), grca, only=NAMES):
        path, error = export_compared(specs[name], module, letters, "fp32", tmp_path)
        assert 0 < error < 1e-5
        networks[name] = open_network(specs[name], path)
    assert networks.keys() == set(NAMES)
    eager = api.open_checkpoint(checkpoint, backend="eager", device="cpu")
    exported = replace(eager.networks, by_name={**eager.networks.by_name, **networks})
    for number, picture in enumerate(poses(2, 64, 96)):
        picture.save(tmp_path / f"{number}.png")
    controls = [{"prompt": "a fox", "control": str(tmp_path / f"{number}.png")} for number in range(2)]
    story = Story([*controls, "an owl"])
    plan = RunPlan(height=96, width=64, seed=3, steps=2, scales=(0.4,), max_frames=2)

    def drawn(pipeline: StoryPipeline) -> list[Image.Image]:
        return [event.picture for event in pipeline.run(story, plan) if isinstance(event, FrameFinished)]

    ours = drawn(StoryPipeline(exported, checkpoint.load_tokenizers(), sampling=checkpoint.sampling))
    assert max(errors_of_frames(ours, drawn(eager))) < 0.1
