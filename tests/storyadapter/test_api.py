"""The Python API: what a program types first."""

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

import storyadapter
from storyadapter import FrameFinished, RunPlan, StepFinished, Story, StoryPipeline
from storyadapter.checkpoint import CheckpointPaths
from storyadapter.demo.shipped import MODEL
from storyadapter.engine.backends import AUTO, find_backend
from storyadapter.method.errors import InputError, UnavailableError

STORY = Story.from_prompts(["a fox", "an owl"])


@pytest.fixture(scope="module")
def pipeline(tiny_model_dir: Path) -> StoryPipeline:
    parts = (tiny_model_dir, tiny_model_dir / "image_encoder", tiny_model_dir / "ip-adapter.safetensors")
    return storyadapter.open(*parts, backend="eager", precision="fp32", device="cpu")


def test_a_plan_needs_nothing(pipeline: StoryPipeline) -> None:
    assert RunPlan().iterations == 11 and RunPlan().seed != RunPlan().seed
    with pytest.raises(InputError, match="height and width are not set"):
        _ = RunPlan().size
    events = list(pipeline.run(STORY, RunPlan(steps=1, scales=())))
    pictures = [event.picture for event in events if isinstance(event, FrameFinished)]
    assert [picture.size for picture in pictures] == [(64, 64)] * 2  # the model's own
    with pytest.raises(InputError, match="steps is 0"):
        RunPlan(steps=0)


def test_a_run_is_cancelled_from_another_thread(pipeline: StoryPipeline) -> None:
    stop, seen = threading.Event(), []
    with pytest.raises(CancelledError):
        for event in pipeline.run(STORY, RunPlan(steps=4, scales=(0.3,)), cancel=stop):
            seen.append(event)
            if isinstance(event, StepFinished):
                other = threading.Thread(target=stop.set)
                other.start()
                other.join()
    assert sum(isinstance(event, StepFinished) for event in seen) == 1
    assert [e.picture.size for e in pipeline.run(STORY, RunPlan(steps=1, scales=())) if isinstance(e, FrameFinished)]


def test_no_model_is_the_demo_model() -> None:
    assert CheckpointPaths.given(None, None, None).base_model == MODEL
    assert CheckpointPaths.given(None, None, None).is_demo
    missing = "ip_adapter missing; expected all of base_model, image_encoder and ip_adapter, or none for the demo model"
    with pytest.raises(InputError) as error:
        storyadapter.open("models/sdxl", "models/clip", backend="eager")
    assert (str(error.value), error.value.field) == (missing, "ip_adapter")
    with pytest.raises(InputError, match="vae was given without base_model; expected all of base_model"):
        storyadapter.open(vae="a.safetensors", backend="eager")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"backend": "quantum"}, "unknown backend 'quantum'; expected one of eager"),
        ({"precision": "fp4"}, "precision is fp4; expected one of auto, fp32, fp16, bf16, fp8, int8"),
        ({"vae_precision": "int8"}, "vae_precision is int8; expected one of auto, fp32, fp16, bf16, fp8"),
        ({"vae_precision": "int4"}, "vae_precision is int4; expected one of auto"),
        ({"device": "gpu"}, 'device is \'gpu\'; expected "cpu", "cuda" or "cuda:1"'),
        ({"loras": ("a:1e999",)}, "lora 'a:1e999': the scale 1e999 is too large"),
        ({"base_model": "gone", "image_encoder": "gone", "ip_adapter": "gone"}, "base_model gone: there is no such"),
    ],
)
def test_what_cannot_be_opened(given: dict, told: str) -> None:
    with pytest.raises(InputError) as error:
        storyadapter.open(**{"backend": "eager", **given})
    assert str(error.value).startswith(told)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="^device is cuda:1, and PyTorch finds no CUDA GPU here"):
        storyadapter.open(device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnavailableError, match="^device is cuda:2; expected cuda:0 to cuda:1$"):
        storyadapter.open(device="cuda:2")


def test_the_default_backend_of_a_device() -> None:
    assert find_backend(AUTO, torch.device("cpu")).name in ("onnxruntime", "eager")
    assert find_backend(AUTO, torch.device("cpu"), precision="bf16").name == "eager"
    assert find_backend(AUTO, torch.device("cpu"), vae_precision="bf16").name == "eager"
    assert find_backend("eager").default_precision(torch.device("cpu")) == "fp32"


def test_public_names_are_found_by_readers_and_tools() -> None:
    assert set(storyadapter.__all__) <= set(dir(storyadapter))
    for name in storyadapter.__all__:
        assert getattr(storyadapter, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = storyadapter.nothing
