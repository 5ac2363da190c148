"""A finished run as one file."""

import base64
import re
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, PdfParser

from storyadapter.method.errors import InputError
from storyadapter.output.book import Book
from storyadapter.output.lettering import Lettering
from storyadapter.output.run_record import RunRecord

PROMPTS = ("Ada climbs <the> stairs & sings", "Привет, שלום", *(f"frame {n} of a long story" for n in range(16)))
COLORS = [(37 * n % 256, 91 * n % 256, 200) for n in range(len(PROMPTS))]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    story = {"title": "Ein <Turm>", "style": None, "characters": {}, "prompts": [{"prompt": PROMPTS[0], "seed": 7}]}
    story["prompts"] += PROMPTS[1:]
    record = RunRecord({"story": story}, len(PROMPTS), (None,), finished=True)
    (tmp_path / "story.json").write_bytes(record.to_json())
    (tmp_path / "frames").mkdir()
    for frame, color in enumerate(COLORS):
        Image.new("RGB", (96, 64), color).save(tmp_path / "frames" / f"{frame:03d}.png")
    return tmp_path


def color(picture: Image.Image) -> tuple[int, int, int]:
    return picture.convert("RGB").getpixel((48, 32))


def test_html_holds_every_picture_and_prompt(run: Path) -> None:
    text = Book.read(run).write("html", Lettering()).read_text(encoding="utf-8")
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)]
    assert len(pictures) == len(PROMPTS)
    for data, expected in zip(pictures, COLORS, strict=True):
        with Image.open(BytesIO(data)) as picture:
            assert picture.size == (96, 64)
            assert max(abs(a - b) for a, b in zip(color(picture), expected, strict=True)) < 4
    assert '<h1 dir="auto">Ein &lt;Turm&gt;</h1>' in text
    assert '<figcaption dir="auto">Ada climbs &lt;the&gt; stairs &amp; sings</figcaption>' in text
    assert '<figcaption dir="auto">Привет, שלום</figcaption>' in text


def test_pdf_has_a_page_per_frame(run: Path) -> None:
    with PdfParser.PdfParser(Book.read(run).write("pdf", Lettering())) as pdf:
        assert len(pdf.pages) == len(PROMPTS)
        assert PdfParser.decode_text(pdf.info[b"Title"]) == "Ein <Turm>"


def test_cbz_has_pages_with_prompts_in_order(run: Path) -> None:
    with zipfile.ZipFile(Book.read(run).write("cbz", Lettering())) as archive:
        info, *names = archive.namelist()
        assert names == [f"{frame:03d}.jpg" for frame in range(len(PROMPTS))] and info == "ComicInfo.xml"
        assert "<Title>Ein &lt;Turm&gt;</Title><PageCount>18</PageCount>" in archive.read(info).decode()
        with Image.open(BytesIO(archive.read("001.jpg"))) as page:
            assert page.width == 96 and page.height > 64
            assert sum(page.convert("L").crop((0, 64, 96, page.height)).histogram()[:128]) > 20  # its prompt


def test_what_is_no_finished_run(run: Path) -> None:
    with pytest.raises(InputError, match="gone: there is no such folder, expected the output folder of a finished run"):
        Book.read(run / "gone")
    (run / "frames" / "003.png").unlink()
    with pytest.raises(InputError, match="003.png is missing; expected 18 of them"):
        Book.read(run)
    (run / "story.json").write_bytes(RunRecord({"story": {"prompts": [3]}}, 1, (None,), finished=True).to_json())
    with pytest.raises(InputError, match="holds no story: prompt 1 is a number"):
        Book.read(run)
    (run / "story.json").write_bytes(RunRecord({}, 1, (None,)).to_json())
    with pytest.raises(InputError, match="holds a run that isn't finished; go on with it by resume"):
        Book.read(run)
    (run / "story.json").unlink()
    with pytest.raises(InputError, match="story.json can't be read: No such file or directory"):
        Book.read(run)
