"""How far a story is that this process draws."""

import asyncio
from dataclasses import dataclass, field

from storyadapter.runtime.executor import SubmittedStory
from storyadapter.serve.queue import Priority


@dataclass
class Progress:
    """How far a story is since it was begun by this process; `rows` are those of UNet calls."""

    rows: int = 0
    of_rows: int = 0
    frames: int = 0
    priority: Priority = "interactive"
    submitted: SubmittedStory | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
