"""The one place where backends and the method meet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine import identity as identity_module
from storyadapter.engine.opening import open_networks, why_outdated
from storyadapter.engine.store import EngineStore
from storyadapter.method.errors import EngineMismatchError, UnavailableError
from storyadapter.model.contract import CONTRACT_VERSION
from storyadapter.model.numerics import Numerics
from tests.engine.engine_requests import identify, never_waits, ranges


def test_a_device_that_a_backend_does_not_run_on_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError, match=r"^backend onnxruntime runs on cpu here; cuda:1 asked for; expected no device"
    ):
        open_networks(checkpoint, backend="onnxruntime", device="cuda:1", engine_dir=tmp_path)
    with pytest.raises(EngineMismatchError):  # its own: it goes on and finds no engine
        open_networks(checkpoint, backend="onnxruntime", device="cpu", engine_dir=tmp_path)


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_an_engine_is_outdated_by_versions_of_this_program(
    backend: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is built now isn't outdated, whatever is installed later; after a change of the program it is."""
    asked = identify(checkpoint, backend, Numerics("fp32"))
    store = EngineStore(tmp_path)

    def built(details: dict[str, Any], **changes: Any) -> list[str]:
        return why_outdated(store.build(replace(asked, **changes), ranges(), lambda folder: details, never_waits))

    details = {"geometry": checkpoint.geometry.as_dict()}
    assert built(details) == []
    assert built(details, backend_version="of another library", architecture="any") == []
    option, value = asked.build_options[-1]
    older = *asked.build_options[:-1], (option, "0")
    assert option == "sources"
    assert built(details, build_options=older) == [f"{option} is 0 in the store, {value} asked for"]
    assert "is described otherwise" in built({"geometry": {"width": 3}}, numerics=Numerics("fp16"))[0]
    monkeypatch.setattr(identity_module, "CONTRACT_VERSION", CONTRACT_VERSION + 1)
    (reason,) = built(details)
    assert reason.startswith("contract is ") and reason.endswith(", or another version of this program)")


def test_an_engine_for_a_gpu_is_judged_where_there_is_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    asked = identify(checkpoint, "inductor", Numerics("fp16"))
    gpu = replace(asked, architecture="sm90")
    details = {"geometry": checkpoint.geometry.as_dict()}
    engine = EngineStore(tmp_path).build(gpu, ranges(), lambda folder: details, never_waits)
    assert why_outdated(engine) == []
    other = replace(engine, identity=replace(gpu, build_options=(("sources", "00000000"),)))
    assert [reason.partition(",")[0] for reason in why_outdated(other)] == ["sources is 00000000 in the store"]
