"""Pictures that users bring: whose they are, which frames attend to them, and what is drawn from them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storyadapter import InputError, RunPlan, Story, StoryPipeline
from storyadapter.method.events import FrameFinished
from storyadapter.runtime.given_pictures import GivenPicture, pictures_of_frames
from storyadapter.runtime.pipeline import FinishedIteration
from tests.oracle.comparison import errors_of_frames
from tests.oracle.published_method import load_published_model, published_frame
from tests.storyadapter.runtime.replaced import counting
from tests.storyadapter.runtime.test_pipeline import open_tiny

TIGHT = 0.05
PLAN = RunPlan(height=64, width=64, seed=3, steps=2, scales=(0.4, 0.5), negative_prompt="", reference_scale=0.35)
PROMPTS = ("Ada runs", "a night", "Ben and Ada sleep")


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir: Path) -> StoryPipeline:
    return open_tiny(tiny_model_dir)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three pictures, none of a frame's size."""
    folder, made = tmp_path_factory.mktemp("photos"), {}
    for number, name in enumerate(("ada-1", "ada-2", "ben")):
        values = np.random.default_rng(number).integers(0, 255, (5, 7, 3), dtype=np.uint8)
        made[name] = folder / f"{name}.png"
        Image.fromarray(values).resize((300, 200)).save(made[name])
    return made


@pytest.fixture(scope="module")
def story(photos: dict[str, Path]) -> Story:
    ada = {"definition": "a girl", "references": [str(photos["ada-1"]), str(photos["ada-2"])]}
    return Story(PROMPTS, characters={"Ada": ada, "Ben": {"references": [str(photos["ben"])]}})


def draw(pipeline: StoryPipeline, story: Story, plan: RunPlan, **options) -> list[list[Image.Image]]:
    drawn: dict[int, list[Image.Image]] = {}
    for event in pipeline.run(story, plan, **options):
        if isinstance(event, FrameFinished):
            drawn.setdefault(event.iteration, []).append(event.picture)
    return list(drawn.values())


def test_frames_attend_to_the_pictures_of_whom_they_name(story: Story, photos: dict[str, Path]) -> None:
    assert story.final_prompts() == ("a girl runs", "a night", "Ben and a girl sleep")
    ada, ben = [str(photos["ada-1"]), str(photos["ada-2"])], [str(photos["ben"])]
    assert [list(paths) for paths in story.references()] == [ada, [], ben + ada]
    keys = [[picture.key for picture in pictures] for pictures in pictures_of_frames(story)]
    assert list(map(len, keys)) == [2, 0, 3] and keys[2][1:] == keys[0]
    own = Story(({"prompt": "a fox", "references": [ben[0], ben[0]]}, "an owl"))
    given = pictures_of_frames(own, {"owl": [photos["ben"]], "fox": [Image.open(photos["ben"])]})
    assert [len(pictures) for pictures in given] == [2, 1]
    with pytest.raises(InputError, match="no prompt names 'cat'"):
        pictures_of_frames(own, {"cat": []})


@pytest.mark.parametrize("keep", [False, True])
def test_pictures_are_the_published_methods(
    pipeline: StoryPipeline, story: Story, photos: dict[str, Path], tiny_model_dir: Path, keep: bool
) -> None:
    drawn = draw(pipeline, story, replace(PLAN, keep_references=keep))
    model = load_published_model(
        tiny_model_dir, tiny_model_dir / "image_encoder", tiny_model_dir / "ip-adapter.safetensors"
    )
    drawing = dict(steps=2, seed=3, height=64, width=64, guidance=5.0, negative_prompt="")
    ada, ben = [Image.open(photos["ada-1"]), Image.open(photos["ada-2"])], [Image.open(photos["ben"])]
    before: list[Image.Image] = []
    for iteration, scale in enumerate((0.35, 0.4, 0.5)):
        for number, (prompt, own) in enumerate(zip(story.final_prompts(), (ada, [], ben + ada), strict=True)):
            attended = before + (own if keep or not iteration else [])
            expected = published_frame(model, prompt, attended, scale if attended else 0.0, **drawing)
            assert max(errors_of_frames([drawn[iteration][number]], [expected])) < TIGHT
        before = drawn[iteration]


def test_a_resumed_story_embeds_what_it_needs_again(pipeline: StoryPipeline, story: Story) -> None:
    plan = replace(PLAN, keep_references=True)
    drawn = draw(pipeline, story, plan)
    resumed = draw(pipeline, story, plan, resume=FinishedIteration(1, drawn[1]))
    assert np.array_equal(np.asarray(resumed[0][2]), np.asarray(drawn[2][2]))
    networks, counts = counting(pipeline.networks, "image_encoder")
    counted = open_tiny_with(pipeline, networks)
    draw(counted, story, replace(PLAN, keep_references=False), resume=FinishedIteration(1, drawn[1]))
    assert counts["image_encoder rows"] == 3  # the frames alone


def open_tiny_with(pipeline: StoryPipeline, networks) -> StoryPipeline:
    return StoryPipeline(networks, (pipeline.tokenizers.first, pipeline.tokenizers.second))


def test_another_picture_is_another_job(pipeline: StoryPipeline, story: Story, photos: dict[str, Path]) -> None:
    def keys(story: Story, plan: RunPlan) -> list[str]:
        events = pipeline.run(story, replace(plan, scales=()))
        return [event.key for event in events if isinstance(event, FrameFinished)]

    plain = keys(story, PLAN)
    assert keys(story, replace(PLAN, reference_scale=0.5))[1] == plain[1]
    assert keys(story, replace(PLAN, reference_scale=0.5))[0] != plain[0]
    assert keys(story, replace(PLAN, keep_references=True)) == plain  # an iteration that has no others
    without = Story(PROMPTS, characters={"Ada": "a girl"})
    assert keys(without, PLAN)[1] == plain[1] and keys(without, PLAN)[0] != plain[0]


def test_keys_of_pictures(photos: dict[str, Path], tmp_path: Path) -> None:
    copied = tmp_path / "other-name.png"
    copied.write_bytes(photos["ben"].read_bytes())
    first, second = GivenPicture.read(photos["ben"]), GivenPicture.read(copied)
    opened = GivenPicture.of(Image.open(photos["ben"]))
    assert first.key == second.key != opened.key == GivenPicture.of(first.picture).key
    clear = GivenPicture.of(Image.new("RGBA", (4, 4), (200, 30, 30, 0))).picture
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)


def test_how_many_pictures_an_engine_takes(pipeline: StoryPipeline, story: Story) -> None:
    assert [PLAN.references(3, 2), replace(PLAN, keep_references=True).references(3, 2)] == [3, 5]
    assert [replace(PLAN, scales=()).references(3, 2), replace(PLAN, scales=()).references(3)] == [2, 1]
    with pytest.raises(InputError, match="reference_scale is -1; expected 0 to 2"):
        replace(PLAN, reference_scale=-1)
