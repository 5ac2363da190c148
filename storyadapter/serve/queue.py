"""The queue of stories and what happened to them, in SQLite: it outlives the process that writes it."""

import json
import secrets
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from storyadapter.method.errors import InputError
from storyadapter.method.plan import RunPlan

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Priority = Literal["interactive", "batch"]
OPEN: Final = ("queued", "in_progress")
_STATES: Final = (*OPEN, "completed", "failed", "cancelled")

_SCHEMA: Final = """
create table if not exists stories (
    id text primary key, owner text not null, state text not null, priority text not null, accepted real not null,
    started real, finished real, seconds real not null default 0, story text not null, style text, plan text not null,
    error text, idempotency text, digest text, edit_of text, unique (owner, idempotency)
);
create index if not exists by_state on stories (state);
create table if not exists events (
    story text not null references stories (id) on delete cascade, number integer not null, kind text not null,
    data text not null, primary key (story, number)
) without rowid;
"""


@dataclass(frozen=True)
class QueuedStory:
    """A row: times are seconds since 1970; `story`, `plan` and `error` are JSON values; `seconds`: of the devices;
    `edit_of`: the story of which this one has some frames drawn again."""

    id: str
    owner: str
    state: State
    priority: Priority
    accepted: float
    started: float | None
    finished: float | None
    seconds: float
    story: Mapping[str, Any]
    style: str | None
    plan: Mapping[str, Any]
    error: Mapping[str, Any] | None
    idempotency: str | None
    digest: str | None
    edit_of: str | None

    @property
    def settings(self) -> RunPlan:
        """That were accepted."""
        return RunPlan.from_dict(self.plan)

    @property
    def is_open(self) -> bool:
        """Whether it is still to be drawn."""
        return self.state in OPEN


@dataclass(frozen=True)
class StoryEvent:
    """`number` counts a story's events from 1."""

    number: int
    kind: str
    data: Mapping[str, Any]


class StoryQueue:
    """Stories in the order in which they came. Used from one thread; every change is on the disk when a method returns.

    Methods raise `sqlite3.OperationalError` where the disk is full.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError: the file is damaged, or can't be read."""
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        pragmas = "pragma journal_mode=wal; pragma synchronous=full; pragma foreign_keys=on;"
        try:
            self._db.executescript(pragmas + _SCHEMA)
            if not any(row["name"] == "edit_of" for row in self._db.execute("pragma table_info(stories)")):
                self._db.execute("alter table stories add column edit_of text")  # of a server before there were edits
            self._check()
            # what was being drawn when the last process ended waits again
            self._db.execute("update stories set state='queued' where state='in_progress'")
        except (sqlite3.Error, ValueError, TypeError) as error:
            self._db.close()
            raise InputError(
                f"{path} can't be read: {' '.join(str(error).split())}",
                advice="move it away, with what lies beside it under its name, to begin with an empty queue",
            ) from error

    def _check(self) -> None:
        """Raises sqlite3.Error, ValueError, TypeError: a page or a value isn't what was written."""
        if (found := self._db.execute("pragma integrity_check(1)").fetchone()[0]) != "ok":
            raise ValueError(found)
        for row in self._db.execute("select * from stories"):
            story = _story(row)
            if story.state not in _STATES or not isinstance(story.story, dict) or not isinstance(story.plan, dict):
                raise ValueError(f"story {story.id} isn't what was written")
        for row in self._db.execute("select data from events"):
            json.loads(row["data"])

    def add(
        self,
        owner: str,
        priority: Priority,
        story: Mapping[str, Any],
        style: str | None,
        plan: Mapping[str, Any],
        idempotency: str | None = None,
        digest: str | None = None,
        *,
        name: str | None = None,
        edit_of: str | None = None,
    ) -> QueuedStory:
        """A story waits, under a new name or that of `new_name`."""
        name, texts = name or self.new_name(), (json.dumps(story), style, json.dumps(plan))
        self._db.execute(
            "insert into stories (id, owner, state, priority, accepted, story, style, plan, idempotency, digest, "
            "edit_of) values (?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?)",
            (name, owner, priority, time.time(), *texts, idempotency, digest, edit_of),
        )
        return self.story(name)

    @staticmethod
    def new_name() -> str:
        """That of no story."""
        return secrets.token_hex(8)

    def story(self, name: str) -> QueuedStory:
        """Raises KeyError: there is none."""
        row = self._db.execute("select * from stories where id=?", (name,)).fetchone()
        if row is None:
            raise KeyError(name)
        return _story(row)

    def repeated(self, owner: str, idempotency: str) -> QueuedStory | None:
        """The story that was accepted with this key before."""
        row = self._db.execute("select * from stories where owner=? and idempotency=?", (owner, idempotency)).fetchone()
        return _story(row) if row else None

    def stories(self, owner: str, limit: int = 100) -> list[QueuedStory]:
        """Of an owner, the newest first."""
        found = self._db.execute(
            "select * from stories where owner=? order by accepted desc, rowid desc limit ?", (owner, limit)
        )
        return [_story(row) for row in found]

    def next(self, *, interactive_only: bool = False) -> QueuedStory | None:
        """The one that is drawn next: those that somebody waits for come first."""
        row = self._db.execute(
            "select * from stories where state='queued' and (priority='interactive' or not ?) "
            "order by priority='batch', accepted, rowid limit 1",
            (interactive_only,),
        ).fetchone()
        return _story(row) if row else None

    def place(self, story: QueuedStory) -> int:
        """How many wait before it."""
        return self._number(
            "select count(*) from stories where state='queued' and (priority='batch', accepted) < (?, ?)",
            story.priority == "batch",
            story.accepted,
        )

    def count(self, *states: State, owner: str | None = None) -> int:
        """Stories in any of these states."""
        query = f"select count(*) from stories where state in ({','.join('?' * len(states))})"
        return self._number(query, *states) if owner is None else self._number(query + " and owner=?", *states, owner)

    def begin(self, name: str) -> None:
        """It is being drawn."""
        self._db.execute(
            "update stories set state='in_progress', started=coalesce(started, ?) where id=?", (time.time(), name)
        )

    def wait_again(self, name: str) -> None:
        """It couldn't go on for a reason that isn't its own."""
        self._db.execute("update stories set state='queued' where id=?", (name,))

    def end(self, name: str, state: State, error: Mapping[str, Any] | None = None) -> StoryEvent | None:
        """It is over, and says so as its last event; None where it was over before."""
        changed = self._db.execute(
            "update stories set state=?, finished=?, error=? where id=? and state in ('queued', 'in_progress')",
            (state, time.time(), json.dumps(error) if error else None, name),
        )
        return self.tell(name, state, {"error": error} if error else {}) if changed.rowcount else None

    def spend(self, name: str, seconds: float) -> None:
        """Devices worked on it for so long."""
        self._db.execute("update stories set seconds=seconds+? where id=?", (seconds, name))

    def tell(self, name: str, kind: str, data: Mapping[str, Any]) -> StoryEvent:
        """An event of a story."""
        number = 1 + self._number("select coalesce(max(number), 0) from events where story=?", name)
        self._db.execute("insert into events values (?, ?, ?, ?)", (name, number, kind, json.dumps(data)))
        return StoryEvent(number, kind, data)

    def events(self, name: str, after: int = 0, limit: int = 100) -> list[StoryEvent]:
        """Those that came after one."""
        found = self._db.execute(
            "select number, kind, data from events where story=? and number>? order by number limit ?",
            (name, after, limit),
        )
        return [StoryEvent(row["number"], row["kind"], json.loads(row["data"])) for row in found]

    def told(self, name: str) -> set[tuple[str, int | None, int | None]]:
        """Kind, iteration and frame of all events of a story; None for what an event doesn't have."""
        rows = self._db.execute("select kind, data from events where story=?", (name,))
        found = ((row["kind"], json.loads(row["data"])) for row in rows)
        return {(kind, data.get("iteration"), data.get("frame")) for kind, data in found}

    def uses(self, upload: str, *, open_only: bool = False) -> bool:
        """Whether a story has a picture; with `open_only`, one that isn't over."""
        query = "select count(*) from stories where instr(story, ?)"
        return self._number(query + (" and state in ('queued', 'in_progress')" if open_only else ""), upload) > 0

    def names(self) -> set[str]:
        """Of all stories."""
        return {row["id"] for row in self._db.execute("select id from stories")}

    def expired(self, before: float) -> list[str]:
        """Stories that ended before this time."""
        return [row["id"] for row in self._db.execute("select id from stories where finished<?", (before,))]

    def remove(self, name: str) -> None:
        """With its events."""
        self._db.execute("delete from stories where id=?", (name,))

    def close(self) -> None:
        """Safe to call twice."""
        self._db.close()

    def _number(self, query: str, *values: Any) -> int:
        return self._db.execute(query, values).fetchone()[0]


def _story(row: sqlite3.Row) -> QueuedStory:
    values = {name: row[name] for name in row.keys()}  # noqa: SIM118  # a row iterates over its values
    return QueuedStory(
        **values
        | {"story": json.loads(row["story"]), "plan": json.loads(row["plan"])}
        | {"error": json.loads(row["error"]) if row["error"] else None}
    )
