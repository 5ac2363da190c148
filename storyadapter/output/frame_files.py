"""Frames as PNG files that say which job drew them, and hold their own embedding."""

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from storyadapter.method.errors import Field, RunError
from storyadapter.method.events import FrameFinished
from storyadapter.method.story import FinalFrame
from storyadapter.runtime.frame_store import StoredFrame

JOB_TEXT: Final = "job"  # keywords of PNG text chunks
EMBEDDING_TEXT: Final = "embedding"
PIXELS_TEXT: Final = "pixels"
LATENTS_TEXT: Final = "latents"
DECODED_TEXT: Final = "decoded again in"
_EMBEDDED: Final = 4_000  # letters of a text in a frame's file


def frame_path(folder: Path, iteration: int, frame: int, *, iterations: int, frames: int) -> Path:
    """Where a run folder has a frame's picture, of a run with so many of both; both are counted from 0."""
    return folder / iteration_name(iteration, iterations) / f"frame-{numbered(frame, frames)}.png"


def iteration_name(iteration: int, iterations: int) -> str:
    """ "iteration-00", with as many digits as all of them need."""
    return f"iteration-{iteration:0{max(2, len(str(iterations - 1)))}d}"


def numbered(frame: int, frames: int) -> str:
    """ "007", with as many digits as all of them need."""
    return f"{frame:0{max(3, len(str(frames - 1)))}d}"


def encode_png(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """A PNG file with text chunks: keyword (at most 79 Latin-1 letters) -> text."""
    info = PngInfo()
    for keyword, value in text.items():
        info.add_text(keyword, value)
    file = BytesIO()
    # Level 1: the levels above take longer and save little on photographs.
    image.save(file, "PNG", compress_level=1, pnginfo=info)
    return file.getvalue()


def frame_text(frames: Sequence[FinalFrame]) -> Callable[[FrameFinished], Mapping[str, str]]:
    """What is written into a frame's file for people; texts that are no more than long stand in `story.json`."""

    def text(drawn: FrameFinished) -> Mapping[str, str]:
        frame = frames[drawn.frame]
        words = {"prompt": frame.prompt, "negative_prompt": frame.negative_prompt or ""}
        cut = {name: text if len(text) <= _EMBEDDED else f"{text[:_EMBEDDED]}…" for name, text in words.items() if text}
        scale = "none" if drawn.scale is None else f"{drawn.scale:g}"
        return {**cut, "seed": str(frame.seed), "scale": scale}

    return text


def job_text(frame: FrameFinished) -> dict[str, str]:
    """What a frame's file says of its job: the key and, where a later iteration reads them, the embedding (fp32, little
    endian, base64) and the latents (their sizes, then fp16 alike); whether it was decoded again; and a hash of its
    pixels, by which a picture that was put or edited into its place is known."""
    text = {JOB_TEXT: frame.key, PIXELS_TEXT: picture_hash(frame.picture)} if frame.key else {}
    if frame.embedding is not None:
        text[EMBEDDING_TEXT] = base64.b64encode(frame.embedding.numpy().astype("<f4").tobytes()).decode()
    if frame.latents is not None:
        sizes = "x".join(map(str, frame.latents.shape))
        text[LATENTS_TEXT] = f"{sizes}:{base64.b64encode(frame.latents.numpy().astype('<f2').tobytes()).decode()}"
    if frame.decoded_again:
        text[DECODED_TEXT] = "fp32"
    return text


def picture_hash(picture: Image.Image) -> str:
    """SHA-256 of a picture's size and RGB values."""
    rgb = picture.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()


def read_frame(path: Path, *, whole: bool = False) -> StoredFrame | None:
    """A frame, by its file; None if that isn't whole, names no job, or has other pixels than its job gave.

    Args:
        whole: whether the file is known to be as it was written, so that its pixels need not be read.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = dict(image.info)  # of chunks before the pixels; `text` would read these, and `verify` couldn't then
            if not whole:
                image.verify()
        if not whole and text.get(PIXELS_TEXT) != picture_hash(read_picture(path)):
            return None
        embedding = base64.b64decode(text[EMBEDDING_TEXT], validate=True) if EMBEDDING_TEXT in text else b""
        sizes, _, encoded = text.get(LATENTS_TEXT, "").partition(":")
        latents, shape = base64.b64decode(encoded, validate=True), tuple(map(int, sizes.split("x"))) if sizes else ()
    except (OSError, SyntaxError, ValueError, RunError, binascii.Error):
        return None
    if JOB_TEXT not in text or len(embedding) % 4 or len(latents) != (2 * prod(shape) if shape else 0):
        return None
    import torch

    def read(data: bytes, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.frombuffer(bytearray(data), dtype=dtype) if data else None

    kept = read(latents, torch.float16)
    kept, picture = None if kept is None else kept.view(shape), partial(read_picture, path)
    return StoredFrame(text[JOB_TEXT], read(embedding, torch.float32), picture, kept, DECODED_TEXT in text)


def read_picture(path: Path) -> Image.Image:
    """A picture as RGB. Raises RunError: it doesn't open any more."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        advice = ("type the command again with ", Field("resume"))
        raise RunError(f"{path} doesn't open any more ({error})", advice=advice) from error


def opens(path: Path) -> bool:
    """Whether a picture is there and whole: the checksum of every part of it is right, and a frame has its pixels."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = image.info.get(PIXELS_TEXT)
            image.verify()
        return pixels is None or pixels == picture_hash(read_picture(path))
    except (OSError, SyntaxError, ValueError, RunError):
        return False
