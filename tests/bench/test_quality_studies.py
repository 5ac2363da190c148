"""What an author adds, measured: edits, reference pictures, long prompts."""

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

from storyadapter.bench import quality
from storyadapter.bench.frame_memory import FrameMemory
from storyadapter.bench.quality_studies import STUDIES, Estimate, Studio, Study
from storyadapter.engine.store import EngineStore
from storyadapter.method.errors import InputError
from storyadapter.method.events import FrameFinished


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return parser.parse_args(words)


def small(tiny: Path, study: str, *more: str) -> argparse.Namespace:
    options = ("--model", str(tiny), "--iterations", "1", "--steps", "1", "--stories", "2", "--frames", "2")
    return arguments(*options, "--seeds", "1", "--precision", "fp32", "--study", study, *more)


def test_an_edit_costs_its_share_and_is_written(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quality.run(small(tiny, "edit", "--out", str(tmp_path / "out")))
    assert "costs its share of the rows: yes" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/quality.json").read_text())
    assert found["facts"] == {"rows of the edit, of those of the story": 0.5}
    assert found["settings"]["study"] == "edit"


def test_pictures_that_are_not_kept_count_in_the_first_iteration_alike(tiny: Path) -> None:
    study = STUDIES["references"](Studio.open(small(tiny, "references")))
    first, last = list(study.measures.values())[:2]
    assert first["pictures"] == first["pictures, kept"]
    assert all(0 <= estimate.mean <= 1 for found in (first, last) for estimate in found.values())


def test_long_prompts_are_drawn_by_an_engine_that_is_built_for_their_chunks(tiny: Path, tmp_path: Path) -> None:
    engine = ("--backend", "onnxruntime", "--engine-dir", str(tmp_path))
    study = STUDIES["long-prompts"](Studio.open(small(tiny, "long-prompts", *engine)))
    (built,), _ = EngineStore(tmp_path).scan()
    assert built.ranges.max_prompt_chunks > 1
    assert study.facts["species by chance"] == pytest.approx(1 / 6)
    assert set(study.measures["species as prompted"]) == {"cut at token 75", "in chunks", "the short prompt"}


def test_a_study_in_words() -> None:
    low, high = Estimate(0.2, 0.1, 0.3), Estimate(0.8, 0.7, 0.9)
    text = Study({"right": {"a": low, "b": high}}, {"b less a": high}, {"b is better": True}, {"rows": 0.25}).text()
    assert text.splitlines() == [
        "| arm | right |",
        "| --- | --- |",
        "| a | 0.200 [0.100, 0.300] |",
        "| b | 0.800 [0.700, 0.900] |",
        "b less a: 0.800 [0.700, 0.900]",
        "rows: 0.25",
        "b is better: yes",
    ]


def test_frames_in_memory_are_found_by_their_jobs_and_those_that_stay_by_their_place() -> None:
    store, picture = FrameMemory(), Image.new("RGB", (8, 8))
    store.save(FrameFinished(0, 1, None, picture, "key")).result()
    assert store.find(0, 1, "key") is not None and store.find(0, 1, "other") is None and store.find(1, 1, "key") is None
    store.stays = [1]
    found = store.find(0, 1, "other")
    assert found is not None and found.key == "key" and store.pictures(0) == [picture]


def test_a_study_needs_the_pipeline(tiny: Path) -> None:
    with pytest.raises(InputError, match="--sampler batched with --study edit; expected the pipeline"):
        quality.run(small(tiny, "edit", "--sampler", "batched"))
