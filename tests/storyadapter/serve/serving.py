"""Stories as a small server has them."""

from pathlib import Path

from storyadapter import StoryPipeline
from storyadapter.serve.limits import Limits
from storyadapter.serve.metrics import Metrics
from storyadapter.serve.stories import Stories

LIMITS = Limits(limit_frames=4, limit_iterations=2, limit_steps=3, limit_pixels=96, limit_upload=1 << 20)
DEFAULTS = {"height": 64, "width": 64, "max_frames": None}


def stories_of(pipeline: StoryPipeline, folder: Path, limits: Limits = LIMITS) -> Stories:
    return Stories(pipeline, folder, limits, Metrics(3.0))
