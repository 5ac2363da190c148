import json
import pickle

from storyadapter.cli.options import typed
from storyadapter.method.errors import Field, InputError, RunError, StoryAdapterError, UnavailableError


def test_an_error_is_data_and_each_face_spells_its_fields() -> None:
    error = InputError(Field("max_frames"), " is 0", expected="1 or more", advice=("see ", Field("vae_precision")))
    assert str(error) == "max_frames is 0; expected 1 or more; see vae_precision"
    assert typed(error) == "--max-frames is 0; expected 1 or more; see --vae-precision"
    assert json.loads(json.dumps(error.as_dict())) == {
        "field": "max_frames",
        "found": "max_frames is 0",
        "expected": "1 or more",
        "advice": "see vae_precision",
    }


def test_what_is_not_said_is_none() -> None:
    assert RunError("a frame of {braces}").as_dict() == {
        "field": None,
        "found": "a frame of {braces}",
        "expected": None,
        "advice": None,
    }


def test_a_comma_stands_before_expected() -> None:
    error = InputError("out is a file,", expected="a folder", advice=("choose another ", Field("out")), field="out")
    assert typed(error) == "out is a file, expected a folder; choose another --out"
    assert (error.field, error.as_dict()["found"]) == ("out", "out is a file")


def test_errors_travel_between_processes() -> None:
    error = UnavailableError(Field("backend"), " can't serve", expected=("another ", Field("backend")), advice="wait")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is UnavailableError and copy.exit_code == 2 and isinstance(copy, StoryAdapterError)
    assert (copy.as_dict(), typed(copy)) == (error.as_dict(), typed(error))
