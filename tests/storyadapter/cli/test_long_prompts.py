"""Prompts beyond 75 tokens, as they are typed."""

import re
import shlex
import shutil
from pathlib import Path

from PIL import Image

from storyadapter.runtime.psnr import psnr_of_each
from tests.storyadapter.cli.running import Type, files, pictures

LONG = " ".join(["a red fox runs in the snow"] * 12)


def test_what_is_read_is_told(type_in: Type, tiny_model: list[str]) -> None:
    Path("tale.txt").write_text(f"{LONG}\na fox\n")
    done = type_in("story", "check", "tale.txt", *tiny_model, "--style", "none", "--prompt-chunks", "1")
    assert "of 77 tokens" in done.out and "warning: frame 0: the prompt is over 77 tokens; cut off: " in done.out
    done = type_in("story", "check", "tale.txt", *tiny_model, "--style", "none")
    assert done.code == 0 and "warning" not in done.out
    assert re.search(r"^frame 0: \d+ tokens in 4 chunks$", done.out, re.MULTILINE)
    assert re.search(r"^frame 1: \d tokens in 1 chunk$", done.out, re.MULTILINE)
    assert "\ntexts of 4 chunks need an engine of build --max-prompt-chunks 4, or backend eager\n" in done.out
    Path("tale.txt").write_text("a fox\nan owl\n")
    assert "engine" not in type_in("story", "check", "tale.txt", *tiny_model, "--style", "none").out


def test_all_of_a_prompt_is_drawn(type_in: Type, quick_run: list[str]) -> None:
    words = [word if word != "a fox" else LONG for word in quick_run]
    done = type_in(*words, "--iterations", "0", "--prompt-chunks", "1", "--out", "cut")
    assert done.code == 0 and "cut off" in done.err
    done = type_in(*words, "--iterations", "0")
    assert done.code == 0 and "cut off" not in done.err
    # batches of other sizes round otherwise
    drawn = [[Image.open(Path(out, f"frames/{n:03d}.png")) for n in range(3)] for out in ("out", "cut")]
    assert [psnr > 60 for psnr in psnr_of_each(*drawn)] == [False, True, True]


def test_more_chunks_than_an_engine_has_are_refused(
    type_in: Type, quick_run: list[str], tiny_engine_dir: Path, tmp_path: Path
) -> None:
    words = [
        word if word not in ("a fox", "eager") else {"a fox": LONG, "eager": "onnxruntime"}[word] for word in quick_run
    ]
    before = files(tmp_path)
    words += ["--engine-dir", str(tiny_engine_dir)]
    done = type_in(*words)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert "error: the texts of frame 0 fill 4 chunks of 75 tokens; no engine in " in done.err
    assert "max prompt chunks is 1, 4 asked for; type --prompt-chunks 1 to cut texts at " in done.err
    told = shlex.split(done.err.partition("build it: ")[2])
    assert told[told.index("--max-prompt-chunks") + 1] == "4"
    assert files(tmp_path) == before
    done = type_in(*words, "--out", "cut", "--prompt-chunks", "1", "--iterations", "0")
    assert done.code == 0 and "cut off" in done.err
    # where cutting would be no help, it isn't offered
    done = type_in(*words, "--precision", "bf16", "--backend", "inductor")
    assert done.code == 2 and "--prompt-chunks" not in done.err


def test_a_prompt_of_one_chunk_is_drawn_as_before_there_were_more(
    type_in: Type, quick_run: list[str], tiny_engine_dir: Path
) -> None:
    words = [word if word != "eager" else "onnxruntime" for word in quick_run]
    words += ["--engine-dir", str(tiny_engine_dir), "--iterations", "1"]
    assert type_in(*words, "--out", "published", "--prompt-chunks", "1").code == 0
    assert type_in(*words).code == 0
    drawn = pictures(Path("out"))
    assert len(drawn) == 13 and drawn == pictures(Path("published"))  # with the keys that are in them


def test_a_run_that_was_begun_with_prompts_cut_goes_on_so(type_in: Type, quick_run: list[str]) -> None:
    words = [word if word != "a fox" else LONG for word in quick_run]
    assert type_in(*words, "--iterations", "1", "--prompt-chunks", "1").code == 0
    drawn = pictures(Path("out/iteration-00"))
    shutil.rmtree("out/frames")
    assert type_in(*words, "--iterations", "1").err.endswith("to make it again\n")  # the same run: without --resume
    done = type_in(*words, "--resume")
    assert done.code == 0 and "cut off" in done.err
    assert pictures(Path("out/iteration-00")) == drawn and len(pictures(Path("out/iteration-02"))) == 3
    words.remove("--iterations")
    words.remove("2")
    done = type_in(*words, "--scales", "0.3,0.3", "--resume", "--prompt-chunks", "auto")
    assert done.code == 2 and "--prompt-chunks is '1' there, 'auto' here" in done.err


def test_chunks_that_no_engine_can_have(type_in: Type, tiny_model: list[str]) -> None:
    done = type_in("build", *tiny_model, "--backend", "onnxruntime", "--max-prompt-chunks", "17")
    assert done.code == 2 and "--max-prompt-chunks is 17; expected 16 or less" in done.err
    done = type_in("build", *tiny_model, "--backend", "onnxruntime", "--max-prompt-chunks", "0")
    assert done.code == 2 and "--max-prompt-chunks is 0; expected 1 or more" in done.err
