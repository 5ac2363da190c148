"""Which pictures of a user's each frame of a story attends to."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageOps

from storyadapter.method.errors import InputError
from storyadapter.method.picture_files import as_seen, read_picture_file
from storyadapter.method.story import Story
from storyadapter.method.text import NameFinder, normalized

Pictures: TypeAlias = Sequence[Path | str | Image.Image]


@dataclass(frozen=True, eq=False)
class GivenPicture:
    """A picture of a user's: `key` is the SHA-256 of its file, or of its pixels where it has none; RGB."""

    key: str
    picture: Image.Image

    @classmethod
    def read(cls, path: Path) -> "GivenPicture":
        """Raises InputError: it is missing, no picture, damaged or too large."""
        picture = read_picture_file(path, "the reference picture", background="white")
        return cls(hashlib.sha256(path.read_bytes()).hexdigest(), picture)

    @classmethod
    def of(cls, picture: Image.Image) -> "GivenPicture":
        """A picture that is open already."""
        rgb = as_seen(ImageOps.exif_transpose(picture), "white")
        return cls(hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest(), rgb)


FramePictures: TypeAlias = tuple[tuple[GivenPicture, ...], ...]


def pictures_of_frames(story: Story, references: Mapping[str, Pictures] | None = None) -> FramePictures:
    """For each frame its pictures, each once: those that the story names for it, then those given beside it.

    Args:
        references: a name -> pictures, or files, of whom it names; for frames whose prompt has the name as a word.

    Raises:
        InputError: a file is missing, no picture, damaged or too large; or no prompt has the name.
    """
    read: dict[str, GivenPicture] = {}

    def picture(given: Path | str | Image.Image) -> GivenPicture:
        if isinstance(given, Image.Image):
            return GivenPicture.of(given)
        if (path := str(given)) not in read:
            read[path] = GivenPicture.read(Path(path))
        return read[path]

    named = {normalized(name): [picture(one) for one in given] for name, given in (references or {}).items()}
    finder = NameFinder(named)
    frames, used = [], set[str]()
    for prompt, paths in zip(story.prompts, story.references(), strict=True):
        names = dict.fromkeys(name for _, name in finder.find(normalized(prompt)))
        used |= names.keys()
        of_frame = [*map(picture, paths), *(one for name in names for one in named[name])]
        frames.append(tuple({one.key: one for one in of_frame}.values()))
    if unused := [name for name in named if name not in used]:
        raise InputError(f"no prompt names {unused[0]!r}", expected="names that prompts have", field="references")
    return tuple(frames)


def picture_keys(pictures: FramePictures) -> list[list[str]] | None:
    """What a record says of them; None where there are none."""
    return [[picture.key for picture in of_frame] for of_frame in pictures] if any(pictures) else None
