"""`--frame N` and the changes that are typed after it."""

import argparse
from typing import Any


class FrameChange(argparse.Action):
    """Collects in `changes` what is typed after each --frame: frame → {"prompt": …}."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        changes: dict[int, dict[str, Any]] = {frame: dict(values) for frame, values in namespace.changes.items()}
        if self.dest == "frame":
            if value in changes:
                parser.error(f"--frame {value} is given twice; expected once, with all its changes after it")
            changes[value] = {}
        elif not changes:
            parser.error(f"{option} without a frame; expected --frame N before it")
        else:
            last = changes[next(reversed(changes))]
            if self.dest in last:
                parser.error(f"{option} is given twice for one frame; expected --frame N before each")
            last[self.dest] = value
        namespace.changes = changes
