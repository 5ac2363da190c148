"""A finished story as one file that can be handed on: a page per frame with its prompt."""

import base64
import html
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias
from xml.etree import ElementTree

import pydantic
from PIL import Image, ImageDraw

from storyadapter.method.errors import Field, InputError
from storyadapter.method.story import Story
from storyadapter.output.files import write_atomically
from storyadapter.output.frame_files import read_picture
from storyadapter.output.lettering import Lettering
from storyadapter.output.run_record import RECORD_NAME, RunRecord

Format: TypeAlias = Literal["html", "pdf", "cbz"]

_QUALITY: Final = 92  # of JPEG
_LINE: Final = 1.35  # line height over font size
_LINES_AT_MOST: Final = 12
_PAGES_AT_ONCE: Final = 16  # in memory
_STYLE: Final = """\
body{margin:0;background:#f4f2ee;color:#202124;font:1.1rem/1.5 Georgia,serif}
h1{text-align:center;font-weight:normal;margin:2rem 1rem}
figure{margin:0 auto 3rem;max-width:min(64rem,94vw)}
img{display:block;width:100%;height:auto}
figcaption{padding:.8rem 0;white-space:pre-line}
@media print{figure{break-after:page}}
"""


@dataclass(frozen=True)
class Book:
    """What a book is made of.

    Attributes:
        folder: of the run.
        title: of the story, if it has one.
        captions: prompts as they were written, one per picture.
        pictures: files of the last iteration, in story order.
    """

    folder: Path
    title: str | None
    captions: tuple[str, ...]
    pictures: tuple[Path, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a finished run.

        Raises:
            InputError: the folder isn't there, holds no run, or one that isn't finished.
        """
        path = folder / RECORD_NAME
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder,", expected="the output folder of a finished run")
        record = RunRecord.read(path)
        if not record.finished:
            raise InputError(f"{folder} holds a run that isn't finished", advice=("go on with it by ", Field("resume")))
        try:
            story = pydantic.TypeAdapter(Story).validate_python(record.identity.get("story"))
        except (InputError, pydantic.ValidationError) as error:
            raise InputError(f"{path} holds no story: {str(error).splitlines()[0]}") from None
        digits = max(3, len(str(record.frames - 1)))
        pictures = tuple(folder / "frames" / f"{frame:0{digits}d}.png" for frame in range(record.frames))
        missing = next((picture for picture in pictures if not picture.is_file()), None)
        if missing or len(story.frames) != record.frames:
            found = f"{missing} is missing" if missing else f"{path} has {len(story.frames)} prompts"
            raise InputError(found, expected=f"{record.frames} of them")
        return cls(folder, story.title, story.prompts, pictures)

    def write(self, form: Format, lettering: Lettering) -> Path:
        """Write `book.html`, `.pdf` or `.cbz` into the folder of the run; returns its path.

        Raises:
            RunError: no space is left, or a picture doesn't open any more.
        """
        path = self.folder / f"book.{form}"
        write = {"html": self._html, "pdf": self._pdf, "cbz": self._cbz}[form]
        write_atomically(path, write(lettering))
        return path

    def _html(self, lettering: Lettering) -> bytes:
        """One page with all pictures inside; text by the browser's fonts, in the direction of its script."""
        title = html.escape(self.title or "")
        parts = ['<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n']
        parts.append('<meta name="viewport" content="width=device-width">\n')
        parts.append(f"<title>{title or 'A story'}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n")
        if title:
            parts.append(f'<h1 dir="auto">{title}</h1>\n')
        for caption, picture in zip(self.captions, self.pictures, strict=True):
            image, text = base64.b64encode(_jpeg(read_picture(picture))).decode(), html.escape(caption)
            parts.append(f'<figure>\n<img alt="{text}" src="data:image/jpeg;base64,{image}">\n')
            parts.append(f'<figcaption dir="auto">{text}</figcaption>\n</figure>\n')
        parts.append("</body>\n</html>\n")
        return "".join(parts).encode()

    def _pdf(self, lettering: Lettering) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "book.pdf"  # Pillow adds pages to a file, and keeps those that it adds in memory
            for number, pages in enumerate(_groups(self._pages(lettering), _PAGES_AT_ONCE)):
                title = {"title": self.title} if self.title and not number else {}
                options: dict[str, Any] = {"save_all": True, "append_images": pages[1:], "append": number > 0}
                pages[0].save(path, "PDF", resolution=150, quality=_QUALITY, **options, **title)
            return path.read_bytes()

    def _cbz(self, lettering: Lettering) -> bytes:
        file = BytesIO()
        info = ElementTree.Element("ComicInfo")
        ElementTree.SubElement(info, "Title").text = self.title or self.folder.name
        ElementTree.SubElement(info, "PageCount").text = str(len(self.pictures))
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("ComicInfo.xml", ElementTree.tostring(info, "utf-8", xml_declaration=True))
            for picture, page in zip(self.pictures, self._pages(lettering), strict=True):
                archive.writestr(f"{picture.stem}.jpg", _jpeg(page))
        return file.getvalue()

    def _pages(self, lettering: Lettering) -> Iterator[Image.Image]:
        """RGB pictures of one size, each a frame with its prompt below."""
        width, height = read_picture(self.pictures[0]).size
        size = max(12, width // 40)
        lines = [lettering.wrap(caption, width - 2 * size, size, _LINES_AT_MOST) for caption in self.captions]
        foot = round(size * (_LINE * max(map(len, lines)) + 1.5))
        for picture, caption in zip(self.pictures, lines, strict=True):
            page = Image.new("RGB", (width, height + foot), "white")
            page.paste(read_picture(picture), (0, 0))
            draw = ImageDraw.Draw(page)
            for number, line in enumerate(caption):
                lettering.draw(draw, (size, height + size * (0.7 + number * _LINE)), line, (32, 33, 36), size)
            yield page


def _groups(pages: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    while group := [*islice(pages, size)]:
        yield group


def _jpeg(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
