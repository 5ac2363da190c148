"""ControlNets: the pictures are those of diffusers' own pipeline, and what could go wrong is seen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storyadapter import api
from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.store import StoredEngine
from storyadapter.method.control import ControlSettings
from storyadapter.method.events import FrameFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story
from storyadapter.runtime.pipeline import StoryPipeline
from tests.control_models import poses, tiny_controlnet, write_controlnet
from tests.oracle.comparison import errors_of_frames
from tests.oracle.diffusers_controlnet import controlnet_story

ALLOWED = 0.5  # of 255, mean over a frame
PROMPTS = ("a red fox", "a blue owl", "snow at night")
PLAN = RunPlan(height=64, width=64, seed=3, steps=3, scales=(0.3, 0.5))


@pytest.fixture(scope="module")
def files(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`poses/` and `edges/` with a picture per frame, and two ControlNets."""
    folder = tmp_path_factory.mktemp("control")
    for number, picture in enumerate(poses(3)):
        for name, drawn in (("poses", picture), ("edges", picture.transpose(Image.Transpose.ROTATE_90))):
            (folder / name).mkdir(exist_ok=True)
            drawn.save(folder / name / f"{number}.png")
    for seed, name in enumerate(("openpose", "canny")):
        write_controlnet(tiny_model_dir, folder / name, seed)
    return folder


def opened(model: Path, *controlnets: Path) -> StoryPipeline:
    adapter = model / "ip-adapter.safetensors"
    checkpoint = Checkpoint.open(
        base_model=model, image_encoder=model / "image_encoder", ip_adapter=adapter, controlnets=controlnets
    )
    return api.open_checkpoint(checkpoint, backend="eager", device="cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir: Path, files: Path) -> StoryPipeline:
    return opened(tiny_model_dir, files / "openpose")


def drawn(pipeline: StoryPipeline, controls: Sequence[object], plan: RunPlan = PLAN) -> list[list[Image.Image]]:
    """The frames of each iteration; `controls`: of each frame as in a story file, None for none."""
    prompts = [
        {"prompt": prompt} | ({} if control is None else {"control": control})
        for prompt, control in zip(PROMPTS, controls, strict=True)
    ]
    frames: list[list[Image.Image]] = [[] for _ in range(plan.iterations)]
    for event in pipeline.run(Story(prompts), plan):
        if isinstance(event, FrameFinished):
            frames[event.iteration].append(event.picture)
    return frames


def of(files: Path, *frames: int, folder: str = "poses") -> list[str]:
    return [str(files / folder / f"{frame}.png") for frame in frames]


def worst(first: list[list[Image.Image]], second: list[list[Image.Image]]) -> float:
    return max(max(errors_of_frames(one, other)) for one, other in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def story(pipeline: StoryPipeline, files: Path) -> list[list[Image.Image]]:
    return drawn(pipeline, of(files, 0, 1, 2))


def test_as_by_diffusers_own_pipeline(tiny_model_dir: Path, files: Path, story: list[list[Image.Image]]) -> None:
    own = [tiny_controlnet(tiny_model_dir, 0)]
    theirs = controlnet_story(
        tiny_model_dir, own, PROMPTS, [[picture] for picture in poses(3)], scales=(0.3, 0.5), steps=3, seed=3
    )
    assert worst(story, theirs) < ALLOWED


def test_swapped_pictures_are_seen(pipeline: StoryPipeline, files: Path, story: list[list[Image.Image]]) -> None:
    swapped = drawn(pipeline, of(files, 1, 2, 0))
    for one, other in zip(story, swapped, strict=True):
        assert np.mean(errors_of_frames(one, other)) > 10 * ALLOWED


def test_several_with_scales_and_shares_of_the_steps(tiny_model_dir: Path, files: Path) -> None:
    plan = RunPlan(
        **{"height": 64, "width": 64, "seed": 3, "steps": 4, "scales": (0.4,)},
        controls=(ControlSettings(0.6, 0.0, 0.5), ControlSettings(0.8, 0.3, 1.0)),
    )
    both = [list(pair) for pair in zip(of(files, 0, 1, 2), of(files, 0, 1, 2, folder="edges"), strict=True)]
    ours = drawn(opened(tiny_model_dir, files / "openpose", files / "canny"), both, plan)
    theirs = controlnet_story(
        tiny_model_dir,
        [tiny_controlnet(tiny_model_dir, seed) for seed in (0, 1)],
        PROMPTS,
        [[Image.open(path) for path in pair] for pair in both],
        scales=(0.4,),
        steps=4,
        seed=3,
        conditioning=(0.6, 0.8),
        shares=((0.0, 0.5), (0.3, 1.0)),
    )
    assert worst(ours, theirs) < ALLOWED


def test_scale_0_and_a_frame_without_a_picture_are_drawn_as_without_a_controlnet(
    tiny_model_dir: Path, pipeline: StoryPipeline, files: Path, story: list[list[Image.Image]]
) -> None:
    plain = drawn(opened(tiny_model_dir), (None, None, None))
    off = RunPlan(height=64, width=64, seed=3, steps=3, scales=(0.3, 0.5), controls=(ControlSettings(0.0),))
    assert worst(drawn(pipeline, of(files, 0, 1, 2), off), plain) == 0
    mixed = drawn(pipeline, (None, *of(files, 1), None))
    assert errors_of_frames(mixed[0], plain[0])[::2] == [0, 0]
    assert errors_of_frames(mixed[0], story[0])[1] == 0


def test_an_engine_draws_what_eager_draws(
    controlled_checkpoint: Checkpoint, free_engine: StoredEngine, tmp_path: Path
) -> None:
    """At another size than the model's, and a frame without a picture beside those with one."""
    for number, picture in enumerate(poses(2, 64, 96)):
        picture.save(tmp_path / f"{number}.png")
    controls = [{"prompt": "a fox", "control": str(tmp_path / f"{number}.png")} for number in range(2)]
    story = Story([*controls, "an owl"])
    plan = RunPlan(height=96, width=64, seed=3, steps=2, scales=(0.4,), max_frames=2)
    engine = {"backend": "onnxruntime", "engine_dir": free_engine.folder.parent}
    by_backend = []
    for opening in (engine, {"backend": "eager"}):
        events = api.open_checkpoint(controlled_checkpoint, device="cpu", **opening).run(story, plan)
        by_backend.append([event.picture for event in events if isinstance(event, FrameFinished)])
    assert max(errors_of_frames(*by_backend)) < 0.1
