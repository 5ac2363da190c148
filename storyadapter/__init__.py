"""Story-Adapter on SDXL as an inference engine: `from storyadapter import Checkpoint, Story, StoryPipeline`.

The names below are loaded on first use, so that the command line's help doesn't import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storyadapter.api import open
    from storyadapter.checkpoint import Checkpoint
    from storyadapter.method.plan import RunPlan
    from storyadapter.method.story import Story
    from storyadapter.runtime.executor import LocalExecutor
    from storyadapter.runtime.pipeline import StoryPipeline

__version__ = "0.1.0"
__all__ = ["Checkpoint", "LocalExecutor", "RunPlan", "Story", "StoryPipeline", "__version__", "open"]

_HOMES = {
    "Checkpoint": "storyadapter.checkpoint",
    "RunPlan": "storyadapter.method.plan",
    "Story": "storyadapter.method.story",
    "StoryPipeline": "storyadapter.runtime.pipeline",
    "LocalExecutor": "storyadapter.runtime.executor",
    "open": "storyadapter.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'storyadapter' has no attribute {name!r}")
