"""`--json-log`: one JSON object per event on standard output, as `events.schema.json` describes them."""

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Final

import storyadapter
from storyadapter.cli.printing import json_line, print_result
from storyadapter.cli.reporting import Reporter
from storyadapter.method.errors import StoryAdapterError
from storyadapter.method.events import Event

SCHEMA_VERSION: Final = 1  # of the events; raised where one goes or changes its meaning, not where one comes
_NOT_TOLD: Final = ("picture", "embedding", "latents")


def schema() -> dict[str, Any]:
    """The JSON Schema of one line."""
    return json.loads(resources.files("storyadapter.cli").joinpath("events.schema.json").read_text(encoding="utf-8"))


class JsonReporter(Reporter):
    """Every event with its time, the schema's version and the id of this run of the program.

    Pictures are told by their paths.
    """

    def __init__(self, command: str) -> None:
        super().__init__()
        self._run = uuid.uuid4().hex
        self._print({"event": "started", "command": command, "version": storyadapter.__version__})

    def note(self, kind: str, text: str, *, detail: str = "", **fields: Any) -> None:
        self._print({"event": kind, "text": text, **fields})

    def result(self, kind: str, text: str, **fields: Any) -> None:
        self.note(kind, text, **fields)

    def stage(self, network: str, what: str) -> None:
        self._print({"event": "stage", "network": network, "text": what})

    def fraction(self, network: str, done: float) -> None:
        self._print({"event": "building", "network": network, "done": round(done, 3)})

    def bytes_read(self, done: int, total: int) -> None:
        if done == total:
            self._print({"event": "weights_read", "bytes": total})

    def event(self, event: Event, **fields: Any) -> None:
        told = {name: value for name, value in vars(event).items() if name not in _NOT_TOLD}
        kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(event).__name__).lstrip("_")
        self._print({"event": kind, **told, **fields})

    def failed(self, error: StoryAdapterError) -> None:
        self._print({"event": "error", "exit_code": error.exit_code, "text": str(error), **error.as_dict()})

    def stopped(self, exit_code: int, text: str) -> None:
        self._print({"event": "stopped", "exit_code": exit_code, "text": text})

    def _print(self, value: Mapping[str, Any]) -> None:
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {**value, "time": when, "schema": SCHEMA_VERSION, "run": self._run}
        print_result(json_line(line))
