"""What a server allows."""

from dataclasses import dataclass, field
from typing import Any, Final

DAY: Final = 86400.0


def limit(default: float, help: str) -> Any:
    """A field: its default, and the help of its option."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """Each is an option of `serve`."""

    limit_frames: int = limit(100, "frames of a story")
    limit_iterations: int = limit(20, "iterations of a story, after the text-only one")
    limit_steps: int = limit(100, "denoising steps")
    limit_pixels: int = limit(2048, "height, and width, of a frame")
    limit_queue: int = limit(1000, "stories that wait; more are told to come again later (429)")
    limit_stories: int = limit(100, "stories of one key that aren't finished")
    limit_active: int = limit(32, "stories that are drawn at the same time; those of a batch take half of them at most")
    limit_body: int = limit(1 << 20, "bytes of a request")
    limit_upload: int = limit(16 << 20, "bytes of a picture that is sent")
    limit_uploads: int = limit(1000, "pictures of one key that are kept")
    retain: int = limit(7, "days until a finished story is removed, or a picture that no story needs")
