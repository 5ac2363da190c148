import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.cli.options import typed
from storyadapter.method.errors import InputError, spelled
from storyadapter.output.run_record import (
    EditRecord,
    IterationRecord,
    RunRecord,
    Session,
    UnderWay,
    first_difference,
    json_values,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
PATHS = st.binary(max_size=5).map(os.fsdecode)  # not always UTF-8
IDENTITIES = st.dictionaries(st.text(), VALUES | PATHS, max_size=4)

RECORD = RunRecord(
    identity={"story": {"title": "Größe"}, "seed": 7},
    frames=2,
    scales=(None, 0.3),
    iterations=(IterationRecord(None, {"denoise": 1.5}, split=(1, 1), sha256=("ab", "cd")),),
    sessions=(Session(0, {"versions": {"torch": "2.13"}}, {"load": 0.5}),),
    under_way=UnderWay(1, (2,)),
    edits=(EditRecord((1,), (0,), ("an owl",), "before-edit-01"),),
    before=(IterationRecord(None, {}),),
)


def test_layout() -> None:
    """The layout is a promise to whoever reads the file: a change needs another schema number."""
    text = RECORD.to_json().decode()
    assert json.loads(text) == {
        "format": "storyadapter-trt run",
        "schema": 4,
        "identity": {"story": {"title": "Größe"}, "seed": 7},
        "progress": {
            "status": "running",
            "frames": 2,
            "scales": [None, 0.3],
            "iterations": [
                {"scale": None, "seconds": {"denoise": 1.5}, "removed": False, "split": [1, 1], "sha256": ["ab", "cd"]}
                | {"thumbnails_sha256": "", "decoded_again": []}
            ],
            "under_way": {"iteration": 1, "split": [2]},
            "before": [
                {
                    "scale": None,
                    "seconds": {},
                    "removed": False,
                    "split": [],
                    "sha256": [],
                    "thumbnails_sha256": "",
                    "decoded_again": [],
                }
            ],
        },
        "edits": [{"frames": [1], "older": [0], "before": ["an owl"], "kept": "before-edit-01"}],
        "sessions": [
            {
                "first_iteration": 0,
                "details": {"versions": {"torch": "2.13"}},
                "seconds": {"load": 0.5},
                "start": {},
            },
        ],
    }
    assert '\n  "identity": {\n    "seed": 7,\n    "story": {\n      "title": "Größe"\n' in text


@given(IDENTITIES, st.booleans())
def test_reads_back(tmp_path_factory: pytest.TempPathFactory, identity: dict, finished: bool) -> None:
    record = RunRecord(identity, 3, (None, 0.5), RECORD.iterations, RECORD.sessions, finished, RECORD.under_way)
    path = tmp_path_factory.getbasetemp() / "record.json"
    path.write_bytes(record.to_json())
    assert RunRecord.read(path) == record


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is no valid JSON"),
        (b'{"format": ', "is no valid JSON"),
        (b"\xff\xfe", "is no valid JSON"),
        (b"[" * 100_000, "is no valid JSON"),
        (b'{"name": "my story"}', "is something else, expected the record of a storyadapter-trt run"),
        (b"[]", "is something else, expected the record of a storyadapter-trt run"),
        (b'{"format": "storyadapter-trt run", "schema": 3}', "has schema 3, expected 4"),
        (b'{"format": "storyadapter-trt run", "schema": 4}', "is damaged (KeyError('progress'))"),
        (RECORD.to_json().replace(b'"removed"', b'"gone"'), "is damaged (iterations.0.gone: Unexpected keyword"),
        (RECORD.to_json().replace(b"0.3", b'"x"'), "is damaged (scales.1: Input should be a valid number"),
        (RECORD.to_json().replace(b'"cd"', b""), "is no valid JSON"),
        (RECORD.to_json().replace(b"1.5", b"NaN"), "is no valid JSON"),
        (RECORD.to_json().replace(b'"frames": 2', b'"frames": 1e999'), "is damaged (frames: Input should be"),
        (RECORD.to_json().replace(b'"frames": 2', b'"frames": ' + b"9" * 5000), "is no valid JSON"),
        (b" " * (64 << 20) + b"{}", "is longer than 64 MiB, expected the record of a storyadapter-trt run"),
    ],
)
def test_bad_record(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "story.json"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        RunRecord.read(path)
    assert str(caught.value).startswith(f"{path} {expected}")
    assert typed(caught.value).endswith("choose another folder with --out")
    assert "\n" not in str(caught.value)


def test_not_json() -> None:
    for value in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((TypeError, ValueError)):
            json_values(value)


@given(IDENTITIES, IDENTITIES)
def test_first_difference_finds_any(first: dict, second: dict) -> None:
    assert first_difference(first, first) is None
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert same <= (first_difference(first, second) is None)
    assert (first_difference(first, second) is None) <= (first == second)


@pytest.mark.parametrize(
    ("stored", "given_", "expected"),
    [
        ({"seed": 1, "steps": 2}, {"steps": 3, "seed": 4}, "steps is 2 there, 3 here"),
        ({"seed": 1}, {}, "seed is 1 there, not given here"),
        ({}, {"lora": ["a"]}, 'lora is not given there, ["a"] here'),
        ({"a": {"b": [1, {"c": "x"}]}}, {"a": {"b": [1, {"c": "y"}]}}, "a.b[1].c is 'x' there, 'y' here"),
        ({"a": [1]}, {"a": [1, 2]}, "a has 1 items there, 2 here"),
        ({"a": True}, {"a": 1}, "a is true there, 1 here"),
        ({"a": None}, {"a": "none"}, "a is null there, 'none' here"),
        (
            {"a": "word " * 30 + "cat"},
            {"a": "word " * 30 + "dog"},
            "a is '…word word word word cat' there, '…word word word word dog' here",
        ),
        ({"a": "b" * 90}, {"a": "c" * 90}, f"a is '{'b' * 40}…' there, '{'c' * 40}…' here"),
        ({"a": "b"}, {"a": "bc"}, "a is 'b' there, 'bc' here"),
    ],
)
def test_first_difference_in_words(stored: dict, given_: dict, expected: str) -> None:
    found = first_difference(stored, given_)
    assert found is not None and spelled(found) == expected
