"""The run folder of an accepted story."""

from pathlib import Path
from typing import Any

from storyadapter.method.story import Story
from storyadapter.output.frame_files import frame_text
from storyadapter.output.run_folder import RunFolder
from storyadapter.runtime.pipeline import Pipeline
from storyadapter.serve.queue import QueuedStory


def identity_of(pipeline: Pipeline, queued: QueuedStory) -> dict[str, Any]:
    """What decides the pictures: uploads by their ids, which are hashes."""
    return {
        "story": queued.story,
        "style": queued.style,
        "plan": queued.settings.as_dict(),
        "model": pipeline.model,
        "backend": pipeline.networks.backend,
        "numerics": pipeline.networks.numerics.as_values(),
    }


def open_folder(path: Path, pipeline: Pipeline, queued: QueuedStory, story: Story) -> RunFolder:
    """New, or to go on with; `story`: the queued one with its uploads' files. Raises as `RunFolder.open`."""
    plan = queued.settings
    final = story.final_frames(plan, queued.style)
    return RunFolder.open(
        path,
        identity_of(pipeline, queued),
        frames=len(story.frames),
        scales=[plan.scale_of(iteration) for iteration in range(plan.iterations)],
        resume=True,
        details={"final_prompts": [frame.prompt for frame in final]},
        text=frame_text(final),
        edited=queued.edit_of is not None,
    )
