import json
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from storyadapter.cli.options import typed
from storyadapter.method.errors import InputError, RunError
from storyadapter.method.events import FrameFinished
from storyadapter.output.frame_files import read_picture
from storyadapter.output.run_folder import RunFolder
from storyadapter.output.run_record import stored_identity
from tests.refusals import raises_typed
from tests.small_disk import run_on_small_disk

FRAMES = 3
SCALES = (None, 0.3, 0.5)
IDENTITY = {"story": {"prompts": ["a", "b", "c"]}, "seed": 7, "scales": SCALES}
TEXT = {"prompt": "a cat in Köln, \u732b", "seed": "7", "scale": "0.3"}


def picture(iteration: int, frame: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    ImageDraw.Draw(image).rectangle((frame, iteration, frame + 8, iteration + 8), (60 * frame, 60 * iteration, 200))
    return image


def open_folder(path: Path, identity: dict = IDENTITY, **options) -> RunFolder:
    return RunFolder.open(path, identity, frames=FRAMES, scales=SCALES, **{"text": lambda frame: TEXT, **options})


def save(folder: RunFolder, iteration: int, frame: int) -> None:
    folder.save(FrameFinished(iteration, frame, SCALES[iteration], picture(iteration, frame))).result()


def loaded(folder: RunFolder, iteration: int, frames: int = FRAMES) -> list[Image.Image]:
    return [read_picture(folder.frame_path(iteration, frame)) for frame in range(frames)]


def make(folder: RunFolder, iterations: range | None = None) -> None:
    for iteration in iterations or range(folder.finished_iterations(), len(SCALES)):
        for frame in range(FRAMES):
            save(folder, iteration, frame)
        folder.finish_iteration(iteration, {"denoise": 1.5}, [2, 1])


def complete(path: Path, **options) -> None:
    with open_folder(path, **options) as folder:
        make(folder)
        folder.finish({"load": 0.5}, ["a", "b", "c"], "Cats")


def files(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in path.rglob("*") if item.is_file()}


def refused(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options).close()
    assert "\n" not in str(caught.value)
    return typed(caught.value)


def test_layout(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    complete(out, details={"versions": {"torch": "2.13"}, "batches": [2, 1]})
    iterations = {f"iteration-{i:02d}/frame-{f:03d}.png" for i in range(3) for f in range(3)}
    strips = {f".thumbnails/iteration-{i:02d}.png" for i in range(3)}
    frames = {f"frames/{f:03d}.png" for f in range(3)}
    assert set(files(out)) == iterations | strips | frames | {
        "contact-sheet.png",
        "story.gif",
        "story.json",
        ".lock",
    }
    for iteration in range(3):
        for frame in range(3):
            with Image.open(out / f"iteration-{iteration:02d}" / f"frame-{frame:03d}.png") as image:
                assert image.convert("RGB").tobytes() == picture(iteration, frame).tobytes()
                assert image.text == TEXT
    for frame in range(3):
        assert files(out)[f"frames/{frame:03d}.png"] == files(out)[f"iteration-02/frame-{frame:03d}.png"]
    with Image.open(out / "story.gif") as animation:
        assert (animation.n_frames, animation.info["duration"]) == (3, 800)
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width > 3 * 240
    record = json.loads((out / "story.json").read_text())
    assert record["identity"] == json.loads(json.dumps(IDENTITY))
    hashes = [
        [sha256(files(out)[f"iteration-{i:02d}/frame-{f:03d}.png"]).hexdigest() for f in range(3)] for i in range(3)
    ]
    assert record["progress"] == {
        "status": "finished",
        "frames": 3,
        "scales": [None, 0.3, 0.5],
        "iterations": [
            {"scale": scale, "seconds": {"denoise": 1.5}, "removed": False, "split": [2, 1], "sha256": own}
            | {"thumbnails_sha256": sha256(files(out)[f".thumbnails/iteration-{i:02d}.png"]).hexdigest()}
            | {"decoded_again": []}
            for i, (scale, own) in enumerate(zip(SCALES, hashes, strict=True))
        ],
        "under_way": None,
        "before": [],
    }
    assert record["edits"] == []
    assert record["sessions"] == [
        {
            "first_iteration": 0,
            "details": {"versions": {"torch": "2.13"}, "batches": [2, 1]},
            "seconds": {"load": 0.5},
            "start": {},
        }
    ]


def test_numbers_grow_with_the_story(tmp_path: Path) -> None:
    scales = (None, *[0.3] * 100)
    with RunFolder.open(tmp_path, {}, frames=1001, scales=scales) as folder:
        path = folder.frame_path(0, 999)
        folder.save(FrameFinished(0, 999, None, picture(0, 0))).result()
    assert path.exists() and path == tmp_path / "iteration-000" / "frame-0999.png"


def test_resume_goes_on_after_the_last_finished_iteration(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        assert folder.finished_iterations() == 0
        make(folder, range(2))
        save(folder, 2, 0)
    (tmp_path / "iteration-02" / ".frame-001.png.0123abcd.part").write_bytes(b"half")
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.finished_iterations() == 2
        assert folder.notices == ()
        assert [path.name for path in (tmp_path / "iteration-02").iterdir()] == ["frame-000.png"]
        images = loaded(folder, 1)
        assert [image.tobytes() for image in images] == [picture(1, frame).tobytes() for frame in range(FRAMES)]
        assert {image.mode for image in images} == {"RGB"}
        make(folder)
        folder.finish({}, ["a", "b", "c"], "Cats")
    whole = tmp_path / "whole"
    complete(whole)
    resumed = {name: data for name, data in files(tmp_path).items() if not name.startswith("whole")}
    straight = files(whole)
    first = [session["first_iteration"] for session in json.loads(resumed.pop("story.json"))["sessions"]]
    assert first == [0, 2]
    del straight["story.json"]
    assert resumed == straight


def test_resume_starts_a_new_folder_too(tmp_path: Path) -> None:
    complete(tmp_path / "out", resume=True)


def test_a_finished_run_is_repaired_by_resume(tmp_path: Path) -> None:
    complete(tmp_path)
    before = files(tmp_path)
    (tmp_path / "contact-sheet.png").unlink()
    (tmp_path / "frames" / "001.png").write_bytes(b"")
    (tmp_path / ".thumbnails" / "iteration-01.png").unlink()
    with open_folder(tmp_path, resume=True) as folder:
        assert (folder.finished_iterations(), folder.notices) == (3, ())
        folder.finish({}, ["a", "b", "c"], "Cats")
    after = files(tmp_path)
    before.pop("story.json")
    after.pop("story.json")
    assert after == before


@pytest.mark.parametrize("damage", ["missing", "cut short", "one bit", "another picture"])
def test_a_picture_that_is_not_what_was_written_is_made_again(tmp_path: Path, damage: str) -> None:
    complete(tmp_path)
    path = tmp_path / "iteration-01" / "frame-002.png"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "another picture":
        picture(2, 2).save(path)
    elif damage == "cut short":
        path.write_bytes(data[:-20])
    else:
        data[data.index(b"IDAT") + 30] ^= 1
        path.write_bytes(data)
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.finished_iterations() == 1
        assert folder.notices == (f"{path} isn't the picture that was written: it is drawn again",)
        assert json.loads((tmp_path / "story.json").read_text())["progress"]["status"] == "running"
        assert not path.exists()
        others = [*(tmp_path / "iteration-01").iterdir(), *(tmp_path / "iteration-02").iterdir()]
        assert len(others) == 2 + 3  # nothing else is drawn again


def test_a_picture_that_is_lost_during_the_run_is_told(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        make(folder)
        path = tmp_path / "iteration-02" / "frame-001.png"
        path.write_bytes(b"")
        with raises_typed(
            RunError, match="frame-001.png doesn't open any more .*; type the command again with --resume"
        ):
            loaded(folder, 2)
        path.unlink()
        with raises_typed(
            RunError, match="frame-001.png doesn't open any more .*; type the command again with --resume"
        ):
            folder.finish({}, ["a", "b", "c"])


def test_keep_last(tmp_path: Path) -> None:
    with open_folder(tmp_path / "last", keep="last") as folder:
        make(folder, range(1))
        assert (tmp_path / "last" / "iteration-00" / "frame-000.png").exists()
        make(folder, range(1, 2))
        assert not (tmp_path / "last" / "iteration-00").exists()
        note = tmp_path / "last" / "iteration-01" / "note.txt"
        note.write_text("somebody's own file")
    with open_folder(tmp_path / "last", keep="last", resume=True) as folder:
        assert folder.finished_iterations() == 2
        assert loaded(folder, 1)[2].tobytes() == picture(1, 2).tobytes()
        make(folder)
        folder.finish({}, ["a", "b", "c"], "Cats")
    complete(tmp_path / "all")
    last, everything = files(tmp_path / "last"), files(tmp_path / "all")
    assert last.pop("iteration-01/note.txt") == b"somebody's own file"
    gone = {name for name in everything if name.startswith(("iteration-00", "iteration-01"))}
    assert set(last) == set(everything) - gone
    assert last["contact-sheet.png"] == everything["contact-sheet.png"]


def test_keep_last_with_a_damaged_picture_starts_again(tmp_path: Path) -> None:
    with open_folder(tmp_path, keep="last") as folder:
        make(folder, range(2))
    (tmp_path / "iteration-01" / "frame-000.png").write_bytes(b"")
    with open_folder(tmp_path, keep="last", resume=True) as folder:
        assert folder.finished_iterations() == 0
        assert len(folder.notices) == 2
        make(folder)


def test_killed_between_record_and_removal(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        make(folder, range(2))
    record = json.loads((tmp_path / "story.json").read_text())
    record["progress"]["iterations"][0]["removed"] = True
    (tmp_path / "story.json").write_text(json.dumps(record))
    with open_folder(tmp_path, resume=True, keep="last") as folder:
        assert folder.finished_iterations() == 2
        assert not (tmp_path / "iteration-00").exists()


def test_refuses_another_run(tmp_path: Path) -> None:
    complete(tmp_path)
    before = files(tmp_path)
    other = {**IDENTITY, "story": {"prompts": ["a", "bee", "c"]}, "seed": 8}
    for resume in (False, True):
        assert refused(open_folder, tmp_path, other, resume=resume) == (
            f"{tmp_path} holds another run: story.prompts[1] is 'b' there, 'bee' here; choose another folder with --out"
        )
    assert "seed is 7 there, 8 here" in refused(open_folder, tmp_path, {**IDENTITY, "seed": 8})
    assert files(tmp_path) == before


def test_refuses_the_same_run_without_resume(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        make(folder, range(2))
    before = files(tmp_path)
    assert refused(open_folder, tmp_path) == (
        f"{tmp_path} already holds this run, with 2 of 3 iterations finished; type --resume to go on with it, or "
        "choose another folder with --out"
    )
    assert files(tmp_path) == before
    with open_folder(tmp_path, resume=True) as folder:
        make(folder)
        folder.finish({}, ["a", "b", "c"])
    assert refused(open_folder, tmp_path) == (
        f"{tmp_path} already holds this run, finished; choose another folder with --out to make it again"
    )


def test_refuses_other_folders(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "tale").mkdir()
    (tmp_path / "tale" / "story.json").write_text('{"prompts": ["a"]}')
    before = files(tmp_path)
    for resume in (False, True):
        assert refused(open_folder, tmp_path / "photos", resume=resume) == (
            f"{tmp_path}/photos holds other files (cat.jpg, …), expected a new or empty folder, or a run's; choose "
            "another one with --out"
        )
        assert "file is a file, expected a folder" in refused(open_folder, tmp_path / "file", resume=resume)
        assert "file/out can't be made: Not a directory" in refused(
            open_folder, tmp_path / "file" / "out", resume=resume
        )
        assert "story.json is something else, expected the record" in refused(open_folder, tmp_path / "tale")
    assert files(tmp_path) == before


def test_a_folder_in_place_of_a_picture_is_refused_and_left(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        make(folder, range(2))
    for iteration in (1, 2):
        path = tmp_path / f"iteration-{iteration:02d}" / "frame-001.png"
        path.unlink(missing_ok=True)
        (path / "mine").mkdir(parents=True)
        assert refused(open_folder, tmp_path, resume=True) == (
            f"{path} is a folder, where a picture of this run belongs; move it away"
        )
        assert (path / "mine").is_dir()
        (path / "mine").rmdir()
        path.rmdir()


def test_a_folder_with_the_name_of_an_unfinished_file_is_left(tmp_path: Path) -> None:
    part = tmp_path / "iteration-00" / ".frame-000.png.0123abcd.part"
    with open_folder(tmp_path) as folder:
        make(folder, range(1))
    part.mkdir()
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.finished_iterations() == 1
    assert part.is_dir()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("size", [(40, 32), (32, 40)])
def test_a_whole_picture_that_the_run_did_not_draw_is_not_taken_for_its_own(
    tmp_path: Path, finished: bool, size: tuple[int, int]
) -> None:
    """Even one that says that the frame's job drew it, as an edited one does."""
    with open_folder(tmp_path) as folder:
        done = [FrameFinished(0, n, None, picture(0, n), key=f"job {n}") for n in range(FRAMES)]
        for event in done:
            folder.save(event).result()
        if finished:
            folder.finish_iteration(0, {}, [3])
        path = folder.frame_path(0, 1)
    with Image.open(path) as own:
        text = PngInfo()
        for name, value in own.text.items():
            text.add_text(name, value)
    picture(2, 2, size).save(path, pnginfo=text)
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.finished_iterations() == 0
        found = [folder.find(0, n, f"job {n}") for n in range(FRAMES)]
        assert [stored is not None for stored in found] == [True, False, True]
        assert folder.notices == (f"{path} isn't the picture that was written: it is drawn again",)


def test_a_row_of_thumbnails_that_is_another_picture_is_made_again(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        make(folder, range(2))
    row = tmp_path / ".thumbnails" / "iteration-00.png"
    right = row.read_bytes()
    picture(2, 2).save(row)
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.finished_iterations() == 2
    assert row.read_bytes() == right


def test_refuses_a_second_process(tmp_path: Path) -> None:
    code = f"""
from storyadapter.output.run_folder import RunFolder
RunFolder.open({str(tmp_path)!r}, {IDENTITY!r}, frames={FRAMES}, scales={SCALES}, resume=True)
"""
    with open_folder(tmp_path):
        before = files(tmp_path)
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"InputError: {tmp_path} is in use by another run" in other.stderr
        assert files(tmp_path) == before
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_error_while_opening_gives_the_lock_back(tmp_path: Path) -> None:
    complete(tmp_path)
    refused(open_folder, tmp_path)
    with open_folder(tmp_path, resume=True) as folder:
        folder.close()
        folder.close()


def test_stored_identity(tmp_path: Path) -> None:
    assert stored_identity(tmp_path) is None
    assert stored_identity(tmp_path / "gone") is None
    with open_folder(tmp_path):
        assert stored_identity(tmp_path) == {**IDENTITY, "scales": [None, 0.3, 0.5]}


def test_misuse(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        save(folder, 0, 0)
        with pytest.raises(ValueError, match=r"frames \[1, 2\] are missing"):
            folder.finish_iteration(0, {})
        with pytest.raises(ValueError):
            folder.finish({}, ["a", "b", "c"])
    assert json.loads((tmp_path / "story.json").read_text())["progress"]["iterations"] == []
    with pytest.raises(InputError, match="is damaged: its frames and scales aren't those of its own settings"):
        RunFolder.open(tmp_path, IDENTITY, frames=4, scales=SCALES, resume=True)


# A run whose pictures are noise, so that they don't compress, until no more can be written.
FILL = """
import os, random, resource, sys
from PIL import Image
from storyadapter.cli.options import typed
from storyadapter.method.errors import RunError
from storyadapter.method.events import FrameFinished
from storyadapter.output.run_folder import RunFolder
out, limit = sys.argv[1], int(sys.argv[2])
def noise(side):
    return Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side))
try:
    with RunFolder.open(out, {}, frames=2, scales=(None, *[0.3] * 30), resume=True) as folder:
        for iteration in range(folder.finished_iterations(), 31):
            if limit and iteration == 1:  # from here on, no file may be as large as a frame
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for frame in range(2):
                folder.save(FrameFinished(iteration, frame, None, noise(96))).result()
            folder.finish_iteration(iteration, {})
except RunError as error:
    print(typed(error))
    sys.exit(error.exit_code)
"""


def check_stopped_run(out: Path, done: subprocess.CompletedProcess, words: str) -> None:
    assert done.returncode == 1, done.stderr
    assert words in done.stdout and "--resume" in done.stdout
    assert done.stdout.count("\n") == 1
    finished = len(json.loads((out / "story.json").read_text())["progress"]["iterations"])
    assert finished >= 1
    assert not [name for name in files(out) if name.endswith(".part")]
    for path in out.rglob("*.png"):
        with Image.open(path) as image:
            image.load()


def test_stopped_by_a_file_size_limit(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FILL, tmp_path, "20000"], capture_output=True, text=True)
    check_stopped_run(tmp_path, done, "the file size limit is reached")
    with RunFolder.open(tmp_path, {}, frames=2, scales=(None, *[0.3] * 30), resume=True) as folder:
        assert folder.finished_iterations() == 1
        assert len(loaded(folder, 0, 2)) == 2


def test_stopped_by_a_full_disk(tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = [sys.executable, "-c", FILL, disk / "out", "0"]
    done = run_on_small_disk(512, command, disk, "out", kept)
    check_stopped_run(kept, done, "no space left on the disk")
    with RunFolder.open(kept, {}, frames=2, scales=(None, *[0.3] * 30), resume=True) as folder:
        count = folder.finished_iterations()
        assert 1 <= count < 30
        assert len(loaded(folder, count - 1, 2)) == 2


# Forks from one process, so that a kill costs milliseconds, not an interpreter's start.
KILL = """
import os, random, signal, sys, time
from pathlib import Path
from PIL import Image
from storyadapter.method.events import FrameFinished
from storyadapter.output.run_folder import RunFolder
out, kills = Path(sys.argv[1]), int(sys.argv[2])
scales = (None, 0.3, 0.4, 0.5)
def work():
    picture = Image.linear_gradient("L").convert("RGB")
    while True:  # a finished run is begun again in its last iteration
        with RunFolder.open(out, {"seed": 7}, frames=2, scales=scales, resume=True, keep="last") as folder:
            for iteration in range(folder.finished_iterations(), len(scales)):
                for frame in range(2):
                    folder.save(FrameFinished(iteration, frame, None, picture)).result()
                folder.finish_iteration(iteration, {})
            folder.finish({}, ["a cat", "a dog"])
        (out / "iteration-03" / "frame-000.png").unlink()
chance, early, attempt = random.Random(0), 0, 0
# on a busy machine a child may get nothing done in time: more kills follow, later ones, until one hits a file
while attempt < kills or not early and attempt < 20 * kills:
    attempt += 1
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(3)
    time.sleep(chance.uniform(0, 0.06) * max(1, attempt / kills))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), f"the run ended by itself: {status}"
    for path in out.rglob("*"):
        if path.suffix in (".png", ".gif"):
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            import json
            json.loads(path.read_bytes())
        elif path.suffix == ".part":
            early += 1
print(early)
with RunFolder.open(out, {"seed": 7}, frames=2, scales=scales, resume=True):
    assert not [path for path in out.rglob("*.part")]
"""


def test_killed_at_any_moment_every_file_opens(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILL, tmp_path, "80"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill came while a file was being written, so nothing was tested"


class Row:
    """An embedding, as a tensor is asked for its numbers."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def numpy(self) -> np.ndarray:
        return np.array(self.values, np.float32)


def drawn(iteration: int, frame: int, embedding: list[float] | None = None) -> FrameFinished:
    key = f"{iteration}{frame}" * 32
    row = Row(embedding) if embedding else None
    return FrameFinished(iteration, frame, SCALES[iteration], picture(iteration, frame), key, row)


def test_frames_are_found_by_the_keys_of_their_jobs_with_their_embeddings(tmp_path: Path) -> None:
    with open_folder(tmp_path, text=lambda frame: {"number": str(frame.frame)}) as folder:
        folder.begin_iteration(0, [2, 1])
        for frame in range(3):
            folder.save(drawn(0, frame, [0.1, -2.5, 3e-8 * (frame + 1)])).result()
        folder.finish_iteration(0, {}, [2, 1])
        folder.begin_iteration(1, [3])
        folder.save(drawn(1, 1)).result()
    with Image.open(tmp_path / "iteration-00" / "frame-002.png") as image:
        assert image.text.keys() == {"number", "job", "pixels", "embedding"} and image.text["number"] == "2"
    with open_folder(tmp_path, resume=True) as folder:
        assert folder.notices == ()
        assert (folder.split(0), folder.split(1), folder.split(2)) == ((2, 1), (3,), None)
        for frame in range(3):
            found = folder.find(0, frame, f"0{frame}" * 32)
            assert found and found.embedding.tolist() == np.float32([0.1, -2.5, 3e-8 * (frame + 1)]).tolist()
            assert found.picture().tobytes() == picture(0, frame).tobytes()
        found = folder.find(1, 1, "11" * 32)
        assert found and found.embedding is None
        assert folder.find(1, 1, "12" * 32) is None  # drawn by another job
        assert folder.find(1, 0, "10" * 32) is None
        for frame in (0, 2):
            folder.save(drawn(1, frame)).result()
        folder.finish_iteration(1, {"denoise": 1.0}, [3])
        folder.finish_iteration(0, {}, [1, 1, 1])  # it was finished before
        record = json.loads((tmp_path / "story.json").read_text())["progress"]["iterations"]
        assert [iteration["split"] for iteration in record] == [[2, 1], [3]]


def test_no_thread_stays_and_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    threads = threading.active_count()
    with open_folder(tmp_path) as folder:
        (tmp_path / "iteration-00").write_text("in the way")
        with pytest.raises(RunError, match="iteration-00"):
            folder.save(drawn(0, 0)).result()
    assert threading.active_count() == threads
    assert not list(tmp_path.rglob("*.part"))
