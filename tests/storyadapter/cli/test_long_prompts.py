"""Prompts beyond 75 tokens, as they are typed."""

import re
import shlex
from pathlib import Path

from PIL import Image

from storyadapter.runtime.psnr import psnr_of_each
from tests.storyadapter.cli.running import Type, files

LONG = " ".join(["a red fox runs in the snow"] * 12)


def test_what_is_read_is_told(type_in: Type, tiny_model: list[str]) -> None:
    Path("tale.txt").write_text(f"{LONG}\na fox\n")
    done = type_in("story", "check", "tale.txt", *tiny_model, "--style", "none")
    assert "of 77 tokens" in done.out and "warning: frame 0: the prompt is over 77 tokens; cut off: " in done.out
    done = type_in("story", "check", "tale.txt", *tiny_model, "--style", "none", "--prompt-chunks", "auto")
    assert done.code == 0 and "warning" not in done.out
    assert re.search(r"^frame 0: \d+ tokens in 4 chunks$", done.out, re.MULTILINE)
    assert re.search(r"^frame 1: \d tokens in 1 chunk$", done.out, re.MULTILINE)


def test_all_of_a_prompt_is_drawn(type_in: Type, quick_run: list[str]) -> None:
    words = [word if word != "a fox" else LONG for word in quick_run]
    done = type_in(*words, "--iterations", "0", "--out", "cut")
    assert done.code == 0 and "cut off" in done.err
    done = type_in(*words, "--iterations", "0", "--prompt-chunks", "auto")
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
    done = type_in(*words, "--prompt-chunks", "auto", "--engine-dir", tiny_engine_dir)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert "max prompt chunks is 1, " in done.err
    told = shlex.split(done.err.partition("build it: ")[2])
    assert told[told.index("--max-prompt-chunks") + 1].isdecimal()
    assert files(tmp_path) == before


def test_chunks_that_no_engine_can_have(type_in: Type, tiny_model: list[str]) -> None:
    done = type_in("build", *tiny_model, "--backend", "onnxruntime", "--max-prompt-chunks", "17")
    assert done.code == 2 and "--max-prompt-chunks is 17; expected 16 or less" in done.err
    done = type_in("build", *tiny_model, "--backend", "onnxruntime", "--max-prompt-chunks", "0")
    assert done.code == 2 and "--max-prompt-chunks is 0; expected 1 or more" in done.err
