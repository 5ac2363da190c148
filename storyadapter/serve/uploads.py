"""Pictures that clients bring: checked when they come, known by an id, never by a path."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from storyadapter.method.picture_files import read_picture_file
from storyadapter.method.story import Story
from storyadapter.output.files import write_atomically
from storyadapter.serve.problems import Problem

ID: Final = r"^[0-9a-f]{32}$"


def ids_in(story: Mapping[str, Any]) -> dict[str, str]:
    """Of all uploads that a story has, each with what it is there: "references" or "control"."""
    found: dict[str, str] = {}

    def note(name: str, key: str) -> str:
        found[name] = key
        return name

    _placed(story, note)
    return found


def _placed(story: Mapping[str, Any], place: Callable[[str, str], str]) -> dict[str, Any]:
    """A story as JSON values, with other words for its pictures."""

    def of(named: Any, key: str) -> Any:
        if isinstance(named, list):
            return [of(one, key) for one in named]
        return named and place(named, key)

    def within(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {**value, **{key: of(value[key], key) for key in ("references", "control") if key in value}}

    characters = {name: within(who) for name, who in story["characters"].items()}
    return {**story, "prompts": [within(frame) for frame in story["prompts"]], "characters": characters}


@dataclass(frozen=True)
class Upload:
    """A picture that was accepted: its id, and its size in pixels."""

    id: str
    width: int
    height: int


class Uploads:
    """The pictures of all keys, a folder for each key.

    Args:
        folder: holds the keys' folders.
        limit: pictures of one key.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def folder(self, owner: str) -> Path:
        """Where a key's pictures lie, each under its id."""
        return self._folder / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def story(self, owner: str, story: Mapping[str, Any]) -> Story:
        """A story that has a key's pictures by their ids, with their files. Raises InputError: see `Story`."""
        folder = self.folder(owner)
        return TypeAdapter(Story).validate_python(_placed(story, lambda name, _: str(folder / name)))

    def holds(self, owner: str, name: str) -> bool:
        """Whether the key has such a picture."""
        return re.fullmatch(ID, name) is not None and (self.folder(owner) / name).is_file()

    def add(self, owner: str, data: bytes) -> Upload:
        """Keep a picture; the same one again is the same upload, and lasts as long as if it were new.

        Raises:
            InputError: it is no picture that can be read, or has too many pixels.
            Problem: the key has as many as it may.
            RunError: no space is left.
        """
        name = hashlib.sha256(data).hexdigest()[:32]
        path = self.folder(owner) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and sum(1 for _ in path.parent.iterdir()) >= self._limit:
            raise Problem(429, f"{self._limit} pictures of this key are kept; remove some", retry_after=3600)
        picture = read_picture_file(data, "the picture", background="white")
        write_atomically(path, data)
        return Upload(name, *picture.size)

    def remove(self, owner: str, name: str) -> None:
        """One that the key has."""
        (self.folder(owner) / name).unlink(missing_ok=True)

    def older(self, before: float) -> Iterator[Path]:
        """Pictures that came before a time, in seconds since 1970."""
        for path in self._folder.glob("*/*"):
            if re.fullmatch(ID, path.name) and path.stat().st_mtime < before:
                yield path
