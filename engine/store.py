"""The engine store: one folder per engine, found by what it was built from, never half finished.

A folder's name is the key of its identity and shape ranges; `manifest.json` in it says the same in words. An engine is
written into a hidden folder beside it, which is renamed when everything is on the disk. A lock file per key keeps two
builders apart and tells a running build from a killed one; readers need no lock and no right to write.
"""

import json
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from blake3 import blake3
from filelock import FileLock, Timeout

import storyadapter
from storyadapter.checkpoint.remembered import user_cache
from storyadapter.engine.hashes import OnBytes, hash_files
from storyadapter.engine.identity import STORE_VERSION, EngineIdentity, engine_key
from storyadapter.engine.uses import MANIFEST_NAME, Use, held_alone, read_uses
from storyadapter.method.errors import EngineMismatchError, Field, InputError, RunError
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.output.files import is_full, why_no_room

_ANOTHER_FOLDER: Final = ("choose another folder with ", Field("engine_dir"))
_UNFINISHED: Final = ".building"  # ".<key>.building" is an engine in the making

# Fills the empty folder it is given, and returns what the manifest shall say of the build, as plain data.
WriteEngine = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class StoredEngine:
    """A finished engine."""

    folder: Path  # holds the engine's files
    identity: EngineIdentity  # what it was built from
    ranges: ShapeRanges  # and for
    created: str  # when it was finished, ISO 8601 in UTC
    build_seconds: float  # how long that took
    files: Mapping[str, int]  # size in bytes by path below `folder`, without the manifest
    hashes: Mapping[str, str]  # of the same files
    details: Mapping[str, Any]  # what its builder had to say
    is_new: bool = field(default=False, compare=False)  # whether it was built by the call that gave it

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def uses(self) -> dict[str, Use]:
        """What it was used with, by the key of the weights."""
        return read_uses(self.folder)

    @property
    def last_used(self) -> float:
        """When it was opened last, or else finished, in seconds since the epoch."""
        finished = datetime.fromisoformat(self.created).timestamp()
        return max([finished, *(use.last for use in self.uses.values())])

    def damage(self, on_bytes: OnBytes | None = None) -> str | None:
        """Which of its files isn't what was built, in words; None if all are. Reads them all, in parallel."""
        try:
            for path, digest in hash_files([self.folder / name for name in self.files], on_bytes):
                if digest != self.hashes[name := path.relative_to(self.folder).as_posix()]:
                    return f"{name} isn't what was built"
        except OSError as error:
            return f"{error.filename} can't be read ({error.strerror})"
        return None

    def __str__(self) -> str:
        ranges = self.ranges
        return (
            f"{self.identity.backend} {self.identity.numerics.name} for {_count(ranges.max_frames, 'frame')} of "
            f"{ranges.width}x{ranges.height} and {_count(ranges.max_references, 'reference')} ({self.key[:8]})"
        )


class BrokenEngineError(ValueError):
    """A folder of the store that is no finished engine; the text says why."""


class OutdatedEngineError(BrokenEngineError):
    """An engine of an older store version, which this version of the program doesn't read."""


class EngineStore:
    """The engines in one folder, `engines` in the user's cache folder unless said otherwise.

    It is created by the first build. Any number of processes may use it at once.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or user_cache() / "engines"

    def scan(self) -> tuple[list[StoredEngine], list[str]]:
        """All finished engines, the newest first, and a line on each folder that isn't one and was passed over, but one
        on all that are of older store versions.

        Raises:
            InputError: the store can't be read.
        """
        engines, broken = self._read()
        outdated = _outdated(broken)
        warnings = [f"{path} is no usable engine: {why}" for path, why in broken.items() if path not in outdated]
        if outdated:
            found = f"{_count(len(outdated), 'outdated engine')} (store version below {STORE_VERSION})"
            removal = shlex.join(["rm", "-r", *map(str, outdated)])
            warnings.append(f"{found}: build again what is still wanted; to remove what is outdated: {removal}")
        engines.sort(key=lambda engine: (engine.created, engine.key), reverse=True)
        return engines, warnings

    def outdated(self) -> list[Path]:
        """The folders of engines of older store versions."""
        return _outdated(self._read()[1])

    def remove(self, folder: Path) -> bool:
        """Delete an engine, finished or outdated, unless it is open somewhere or being built; tells whether it did.

        Raises:
            InputError: the store can't be written.
        """
        unfinished = self.root / f".{folder.name}{_UNFINISHED}"
        with self._writing(), suppress(Timeout, FileNotFoundError), self._lock_of(folder.name).acquire(timeout=0):
            with held_alone(folder) as alone:
                if alone:
                    folder.rename(unfinished)  # nobody sees a part of it, and a killed removal is finished by a build
            if alone:
                shutil.rmtree(unfinished)
            return alone
        return False

    def find(self, identity: EngineIdentity, ranges: ShapeRanges, build_command: str) -> StoredEngine:
        """The engine that serves this identity and whose ranges cover `ranges`; of several the one built for the least,
        and of those the newest.

        Raises:
            EngineMismatchError: there is none; the text says in which fields the closest one differs, and ends with
                `build_command`. It is about the field "max_prompt_chunks" where one would serve shorter prompts.
            InputError: the store can't be read.
        """
        engines, warnings = self.scan()
        fitting = [e for e in engines if e.identity.serves(identity) and e.ranges.uncovered(ranges) is None]
        if fitting:
            return min(fitting, key=lambda engine: _extent(engine.ranges))  # `scan` gives the newest first
        found = f"no engine in {self.root}"
        if engines:
            uncovered = {engine.key: engine.ranges.uncovered(ranges) for engine in engines}
            misfits = {e.key: e.identity.differences(identity) + [*filter(None, [uncovered[e.key]])] for e in engines}
            closest = min(engines, key=lambda e: (e.identity.backend != identity.backend, len(misfits[e.key])))
            found += f" fits; the closest, {closest}, differs: {'; '.join(misfits[closest.key])}"
        shorter = replace(ranges, max_prompt_chunks=1)
        serves_shorter = any(e.identity.serves(identity) and e.ranges.uncovered(shorter) is None for e in engines)
        field = "max_prompt_chunks" if serves_shorter else None
        raise EngineMismatchError("; ".join([found, *warnings]), advice=f"build it: {build_command}", field=field)

    def get(self, identity: EngineIdentity, ranges: ShapeRanges) -> StoredEngine | None:
        """The engine of exactly this identity and these ranges, if it is finished and whole."""
        try:
            engine = _read_engine(self.root / engine_key(identity, ranges))
        except BrokenEngineError:
            return None
        return None if engine.damage() else engine

    def build(
        self, identity: EngineIdentity, ranges: ShapeRanges, write: WriteEngine, on_wait: Callable[[str], None]
    ) -> StoredEngine:
        """The engine of exactly this identity and these ranges; `write` is called only if there is none yet.

        Whatever ends `write` early, an exception or the process's death, leaves nothing that looks finished; what a
        dead process left is removed before. While another process builds the same engine, this one waits for it and
        then takes what it built. A finished engine is given back from a store that can't be written, too; a damaged one
        is built again.

        Args:
            write: puts the engine's files into the folder it is given and returns what the manifest shall say of them.
            on_wait: called with one line before waiting for another process.

        Raises:
            InputError: the store can't be written.
            RunError: no space is left on the disk.
        """
        key = engine_key(identity, ranges)
        folder, unfinished = self.root / key, self.root / f".{key}{_UNFINISHED}"
        if (engine := self.get(identity, ranges)) is not None:
            return engine
        with self._lock(key, on_wait):
            with self._writing():
                self._remove_unfinished(key)
            if (engine := self.get(identity, ranges)) is not None:
                return engine
            with self._writing():
                unfinished.mkdir()
            try:
                started = time.perf_counter()
                details = write(unfinished)
                _finish(unfinished, identity, ranges, details, time.perf_counter() - started)
                if folder.exists():
                    shutil.rmtree(folder)  # a broken engine: `get` didn't take it
                unfinished.rename(folder)
            except BaseException as error:
                told = isinstance(error, InputError)
                reason = why_no_room(error, self.root) if isinstance(error, Exception) and not told else None
                shutil.rmtree(unfinished, ignore_errors=True)
                if reason:
                    where = getattr(error, "filename", None) or self.root
                    advice = ("make room, or ", _ANOTHER_FOLDER)
                    raise RunError(f"{where} can't be written: {reason}", advice=advice) from error
                raise
            return replace(_read_engine(folder), is_new=True)

    def _read(self) -> tuple[list[StoredEngine], dict[Path, BrokenEngineError]]:
        engines, broken, folders = [], {}, list[Path]()
        try:
            folders = sorted(p for p in self.root.iterdir() if not p.name.startswith(".") and p.is_dir())
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(f"{self.root} can't be read: {error.strerror}", advice=_ANOTHER_FOLDER) from error
        for folder in folders:
            try:
                engines.append(_read_engine(folder))
            except BrokenEngineError as error:
                broken[folder] = error
        return engines, broken

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells a store that can't be written in one line."""
        try:
            yield
        except OSError as error:
            kind = RunError if is_full(error) else InputError
            raise kind(f"{self.root} can't be written: {error.strerror}", advice=_ANOTHER_FOLDER) from error

    @contextmanager
    def _lock(self, key: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        lock = self._lock_of(key)
        with self._writing():
            self.root.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                lock.acquire(timeout=0)
        if not lock.is_locked:
            on_wait(f"another process is building this engine in {self.root}; waiting until it is done")
            with self._writing():
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _lock_of(self, key: str) -> FileLock:
        # Never removed: a lock file that is unlinked while another process opens it would let both in.
        return FileLock(self.root / f".{key}.lock", thread_local=False)

    def _remove_unfinished(self, own_key: str) -> None:
        """Remove what killed builds left: every folder in the making whose key nobody holds but us."""
        for unfinished in self.root.glob(f".*{_UNFINISHED}"):
            key = unfinished.name.removeprefix(".").removesuffix(_UNFINISHED)
            if key == own_key:
                shutil.rmtree(unfinished)
                continue
            # Held: being built. Not permitted: another user's, who will remove it. Not found: removed by another build.
            with suppress(Timeout, PermissionError, FileNotFoundError), self._lock_of(key).acquire(timeout=0):
                shutil.rmtree(unfinished)


def _outdated(broken: Mapping[Path, BrokenEngineError]) -> list[Path]:
    return [folder for folder, why in broken.items() if isinstance(why, OutdatedEngineError)]


def _finish(
    folder: Path, identity: EngineIdentity, ranges: ShapeRanges, details: Mapping[str, Any], seconds: float
) -> None:
    """Write the manifest and bring every file to the disk, so that a rename can't outlive what it names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "store_version": STORE_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "build_seconds": round(seconds, 3),
        "versions": {"storyadapter-trt": storyadapter.__version__, "python": platform.python_version()},
        "identity": identity.as_dict(),
        "ranges": ranges.as_dict(),
        "details": dict(details),
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths},
        "hashes": {path.relative_to(folder).as_posix(): digest for path, digest in sorted(hash_files(paths))},
    }
    path = folder / MANIFEST_NAME
    manifest["manifest_hash"] = manifest_hash(manifest)
    path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in (*paths, path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Of what else it says."""
    others = {name: value for name, value in manifest.items() if name != "manifest_hash"}
    return blake3(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _read_engine(folder: Path) -> StoredEngine:
    path = folder / MANIFEST_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokenEngineError(f"{MANIFEST_NAME} can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BrokenEngineError(f"{MANIFEST_NAME} is not valid JSON ({error})") from error
    version = data.get("store_version") if isinstance(data, dict) else None
    if version != STORE_VERSION:
        kind = OutdatedEngineError if isinstance(version, int) and version < STORE_VERSION else BrokenEngineError
        raise kind(f"its store version is {version}, expected {STORE_VERSION}")
    try:
        engine = StoredEngine(
            folder=folder,
            identity=EngineIdentity.from_dict(data["identity"]),
            ranges=ShapeRanges.from_dict(data["ranges"]),
            created=str(data["created"]),
            build_seconds=float(data["build_seconds"]),
            files={str(name): int(size) for name, size in data["files"].items()},
            hashes={name: str(data["hashes"][name]) for name in data["files"]},
            details=dict(data["details"]),
        )
        key = engine_key(engine.identity, engine.ranges)
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise BrokenEngineError(f"{MANIFEST_NAME} is no manifest of an engine ({error!r})") from error
    if key != folder.name:
        raise BrokenEngineError(f"{MANIFEST_NAME} is that of another engine, {key}")
    if data.get("manifest_hash") != manifest_hash(data):
        raise BrokenEngineError(f"{MANIFEST_NAME} isn't what was written")
    for name, size in engine.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise BrokenEngineError(f"{name} can't be read ({error.strerror})") from error
        if found != size:
            raise BrokenEngineError(f"{name} has {found} bytes, expected {size}")
    return engine


def _extent(ranges: ShapeRanges) -> tuple[int, int, int]:
    """How much an engine is built for: pixels of a call first, then references, then how far its sizes vary."""

    def span(pixels: Range) -> int:
        return pixels.maximum - pixels.minimum

    pixels = ranges.max_frames * ranges.height.maximum * ranges.width.maximum
    return pixels, ranges.max_references, span(ranges.height) + span(ranges.width)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
