"""The pictures by which ControlNets guide frames: found, read, and brought to the frames' size."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from storyadapter.method.canny import canny
from storyadapter.method.errors import Field, InputError, Text, can_not_be_read
from storyadapter.method.picture_files import read_picture_file
from storyadapter.method.plan import RunPlan
from storyadapter.method.story import Story

if TYPE_CHECKING:
    import numpy as np

_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True, eq=False)
class ControlPicture:
    """What a ControlNet gets of a frame: `pixels` [height, width, 3] uint8, as large as that; `key`: their hash."""

    pixels: "np.ndarray[Any, np.dtype[np.uint8]]"
    key: str


# of each frame one per ControlNet, None where it has no picture for it; () of a frame without any
Controls = tuple[tuple[ControlPicture | None, ...], ...]


def read_controls(story: Story, plan: RunPlan, on_notice: Callable[[Text], None] = lambda notice: None) -> Controls:
    """Every frame's control pictures: resized to the frame by Pillow's default filter, as published, then made to edges
    where the plan asks for it.

    Args:
        plan: with a size, and settings for each ControlNet.
        on_notice: told of pictures that were resized.

    Raises:
        InputError: a picture can't be used, there is none of the ControlNets that it is for, or a frame has more or
            fewer than there are.
    """
    given = [number for number, frame in enumerate(story.frames) if frame.control]
    if given and not plan.controls:
        found = f"frame {given[0]} has a control picture, and there is no ControlNet"
        raise InputError(found, expected=(Field("controlnet"), " with it"), field="controlnet")
    resized: list[str] = []
    controls = []
    for number, frame in enumerate(story.frames):
        if frame.control and len(frame.control) != len(plan.controls):
            found = f"frame {number} has {len(frame.control)} control pictures"
            expected = (f"{len(plan.controls)}: one for each ", Field("controlnet"), ", null for none")
            raise InputError(found, expected=expected, field="controlnet")
        pictures = [
            None if path is None else _read(Path(path), number, plan.size, settings.preprocess, resized)
            for path, settings in zip(frame.control or (), plan.controls, strict=False)
        ]
        controls.append(tuple(pictures) if any(pictures) else ())
    if resized:
        height, width = plan.size
        more = f", and {len(resized) - 1} more" if len(resized) > 1 else ""
        on_notice(f"{resized[0]}{more}: resized to {width}x{height}, as the frames are")
    return tuple(controls)


def control_identity(controls: Controls) -> dict[str, Any]:
    """What a record says of them: hashes, whatever the pictures' paths; {} where there are none."""
    keys = [[None if picture is None else picture.key for picture in pictures] for pictures in controls]
    return {"control": keys} if any(controls) else {}


def control_paths(story: Story) -> list[list[str | None] | None]:
    """Where they lie, so that an edit finds them from anywhere."""
    given = (frame.control for frame in story.frames)
    return [None if paths is None else [path and os.path.abspath(path) for path in paths] for paths in given]


def _read(path: Path, frame: int, size: tuple[int, int], preprocess: str, resized: list[str]) -> ControlPicture:
    import numpy as np

    height, width = size
    picture = read_picture_file(path, f"frame {frame}: the control picture", background="black")
    if picture.size != (width, height):
        resized.append(f"frame {frame}: the control picture {path} is {picture.width}x{picture.height}")
        picture = picture.resize((width, height))
    if preprocess == "canny":
        picture = canny(picture)
    pixels = np.array(picture)
    return ControlPicture(pixels, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest())


def with_control_images(
    story: Story, folders: Sequence[Path], on_notice: Callable[[Text], None] = lambda notice: None
) -> Story:
    """The same story, its frames with the pictures of folders in their order: 2.png before 10.png.

    Args:
        folders: one for each ControlNet.
        on_notice: told of frames without a picture, and of files that aren't pictures.

    Raises:
        InputError: a folder can't be read, has no picture or more than there are frames, or the story has its own.
    """
    if own := [number for number, frame in enumerate(story.frames) if frame.control]:
        raise InputError(Field("control_images"), f" is given, and frame {own[0]} has its own", advice="leave one out")
    columns = [_pictures(folder, len(story.frames), on_notice) for folder in folders]
    data = story.to_dict()
    for place, prompt in enumerate(data["prompts"]):
        control = [str(column[place]) if place < len(column) else None for column in columns]
        if any(control):
            data["prompts"][place] = {**({"prompt": prompt} if isinstance(prompt, str) else prompt), "control": control}
    return Story(**data)


def _pictures(folder: Path, frames: int, on_notice: Callable[[Text], None]) -> list[Path]:
    option = Field("control_images")
    try:
        files = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural)
    except (OSError, ValueError) as error:
        found = can_not_be_read(folder, error)
        raise InputError(option, f" {found}", expected="a folder with a picture per frame") from error
    pictures = [path for path in files if path.suffix.lower() in _SUFFIXES]
    if others := [path.name for path in files if path not in pictures]:
        on_notice((option, f" {folder}: not used, as they are no pictures: {', '.join(others[:5])}"))
    if not pictures or len(pictures) > frames:
        count = f"{len(pictures)} pictures" if pictures else "no picture"
        raise InputError(option, f" {folder} has {count}", expected=f"1 to {frames}, one per frame in their order")
    if len(pictures) < frames:
        found = f" {folder} has {len(pictures)} pictures for {frames} frames: those from frame {len(pictures)} on"
        on_notice((option, found, " are drawn without"))
    return pictures


def _natural(path: Path) -> list[Any]:
    """Numbers in names count as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name.casefold())]
