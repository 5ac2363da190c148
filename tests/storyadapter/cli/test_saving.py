"""Frames that threads write."""

import threading
from pathlib import Path

import pytest
from PIL import Image

from storyadapter.cli.saving import FrameSaver
from storyadapter.method.errors import RunError
from storyadapter.method.events import FrameFinished
from storyadapter.output.run_folder import RunFolder

FRAMES = 12


def frame(number: int) -> FrameFinished:
    return FrameFinished(0, number, None, Image.new("RGB", (64, 64), (number, 0, 0)))


@pytest.fixture
def folder(tmp_path: Path):
    with RunFolder.open(tmp_path / "out", {}, frames=FRAMES, scales=[None]) as folder:
        yield folder


def test_frames_are_told_in_their_order_when_they_are_written(folder: RunFolder) -> None:
    with FrameSaver(folder, lambda event: {"number": str(event.frame)}) as saver:
        told = []
        for number in range(FRAMES):
            saver.save(frame(number))
            told += [(event.frame, folder.frame_path(0, event.frame).exists()) for event in saver.saved()]
        told += [(event.frame, folder.frame_path(0, event.frame).exists()) for event in saver.saved(wait=True)]
        assert told == [(number, True) for number in range(FRAMES)]
        assert not list(saver.saved(wait=True))
    folder.finish_iteration(0, {})
    for number, picture in enumerate(folder.load_iteration(0)):
        assert picture.getpixel((0, 0)) == (number, 0, 0)
    with Image.open(folder.frame_path(0, 7)) as image:
        assert image.text == {"number": "7"}


def test_a_frame_that_cannot_be_written_is_an_error_and_no_thread_stays(folder: RunFolder) -> None:
    threads = threading.active_count()
    (folder.path / "iteration-00").write_text("in the way")
    with pytest.raises(RunError, match="iteration-00"), FrameSaver(folder, lambda event: {}) as saver:
        for number in range(FRAMES):
            saver.save(frame(number))
        list(saver.saved(wait=True))
    assert threading.active_count() == threads
    assert not list(folder.path.rglob("*.part"))
