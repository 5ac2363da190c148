"""Story-Adapter on SDXL as an inference engine.

>>> import storyadapter
>>> pipeline = storyadapter.open()  # the demo model; or open(base_model, image_encoder, ip_adapter)
>>> story = storyadapter.Story.from_prompts(["a red fox is reading a book", "a red fox is running at night"])
>>> for event in pipeline.run(story, storyadapter.RunPlan(seed=7)):
...     if isinstance(event, storyadapter.FrameFinished):
...         event.picture.save(f"{event.iteration}-{event.frame}.png")

The names in `__all__` are stable: what they take and give changes with a note in the CHANGELOG. They are loaded on
first use, so that the command line's help doesn't import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storyadapter.api import edit, open
    from storyadapter.checkpoint import Checkpoint, CheckpointPaths, LoraSpec
    from storyadapter.method.errors import InputError, RunError, StoryAdapterError
    from storyadapter.method.events import (
        Event,
        FrameFinished,
        IterationFinished,
        RunFinished,
        RunStarted,
        StepFinished,
    )
    from storyadapter.method.plan import RunPlan
    from storyadapter.method.story import Story
    from storyadapter.runtime.executor import LocalExecutor, SubmittedStory
    from storyadapter.runtime.pipeline import StoryPipeline

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "CheckpointPaths",
    "Event",
    "FrameFinished",
    "InputError",
    "IterationFinished",
    "LocalExecutor",
    "LoraSpec",
    "RunError",
    "RunFinished",
    "RunPlan",
    "RunStarted",
    "StepFinished",
    "Story",
    "StoryAdapterError",
    "StoryPipeline",
    "SubmittedStory",
    "__version__",
    "edit",
    "open",
]

_HOMES = {
    "storyadapter.api": ("edit", "open"),
    "storyadapter.checkpoint": ("Checkpoint", "CheckpointPaths", "LoraSpec"),
    "storyadapter.method.errors": ("InputError", "RunError", "StoryAdapterError"),
    "storyadapter.method.events": (
        *("Event", "FrameFinished", "IterationFinished", "RunFinished", "RunStarted", "StepFinished"),
    ),
    "storyadapter.method.plan": ("RunPlan",),
    "storyadapter.method.story": ("Story",),
    "storyadapter.runtime.executor": ("LocalExecutor", "SubmittedStory"),
    "storyadapter.runtime.pipeline": ("StoryPipeline",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'storyadapter' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
