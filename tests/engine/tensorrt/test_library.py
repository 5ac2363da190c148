"""Which TensorRT serves which target, and what is told where none does."""

import pytest

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backends import find_backend
from storyadapter.engine.tensorrt.library import (
    Library,
    choose_library,
    describe_libraries,
    installed_libraries,
    parse_targets,
)
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.method.errors import InputError, UnavailableError
from storyadapter.model.numerics import NumberFormat, Numerics, Quantization
from tests.refusals import raises_typed

FULL = Library("tensorrt", "10.14.1.48")
RTX = Library("tensorrt-rtx", "1.7.1.116")


def test_targets_are_sorted_and_named_once() -> None:
    assert parse_targets("auto") == ()
    assert parse_targets("sm120,sm89, sm120") == ("sm89", "sm120")


@pytest.mark.parametrize("text", ["", "89", "sm", "sm8", "sm89,", "SM89", "cuda", "sm89 sm120", "sm1200"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected auto, or architectures such as sm89 or sm89,sm120$"):
        parse_targets(text)


@pytest.mark.parametrize(
    ("targets", "present", "libraries", "chosen"),
    [
        ((), "sm90", (FULL, RTX), (FULL, ("sm90",))),
        ((), "sm89", (FULL, RTX), (FULL, ("sm89",))),
        ((), "sm89", (RTX,), (RTX, ("sm89",))),
        (("sm120",), "sm89", (FULL, RTX), (RTX, ("sm120",))),
        (("sm89", "sm120"), "sm89", (FULL, RTX), (RTX, ("sm89", "sm120"))),
        (("sm89", "sm120"), None, (RTX,), (RTX, ("sm89", "sm120"))),
        (("sm89",), "sm89", (Library("tensorrt", "10.13.3"), RTX), (RTX, ("sm89",))),
    ],
)
def test_the_library_is_chosen_by_what_is_installed_and_by_the_target(
    targets: tuple[str, ...],
    present: str | None,
    libraries: tuple[Library, ...],
    chosen: tuple[Library, tuple[str, ...]],
) -> None:
    assert choose_library(targets, present, libraries) == chosen


@pytest.mark.parametrize(
    ("targets", "present", "libraries", "told"),
    [
        ((), None, (RTX,), "backend tensorrt: there is no GPU here that PyTorch can use; .* such as --target sm89$"),
        (
            (),
            "sm90",
            (RTX,),
            "can't serve sm90 here: tensorrt-rtx 1.7.1.116 builds for sm75, .* only; type: pip install",
        ),
        (("sm90",), None, (FULL,), r"tensorrt 10.14.1.48 builds only for the GPU that is present \(none\); type: pip"),
        (("sm89",), None, (), r"neither tensorrt nor tensorrt-rtx is installed; .*storyadapter-trt\[tensorrt-rtx\]'$"),
        ((), "sm90", (Library("tensorrt", "10.13.3"),), "tensorrt 10.13.3 is too old, expected 10.14 or later"),
        (("sm89", "sm90"), None, (RTX,), "can't serve sm89, sm90 here"),
    ],
)
def test_why_none_serves_is_one_line(
    targets: tuple[str, ...], present: str | None, libraries: tuple[Library, ...], told: str
) -> None:
    with raises_typed(UnavailableError, match=told) as caught:
        choose_library(targets, present, libraries)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "target", "told"),
    [
        ("fp8", "sm86", "sm86 doesn't multiply fp8 numbers; expected --target sm89 or later"),
        ("int8", "sm75", "sm75 doesn't multiply int8 numbers; expected --target sm80 or later"),
        ("fp8", "sm89", ""),
        ("int8", "sm80", ""),
    ],
)
def test_a_target_without_a_number_format_is_told(
    form: NumberFormat, target: str, told: str, checkpoint: Checkpoint
) -> None:
    pytest.importorskip("tensorrt_rtx")
    numerics, options = Numerics.of("fp16", Quantization(form)), BuildOptions(targets=(target, "sm120"))
    if not told:
        assert find_backend("tensorrt").identity(checkpoint, numerics, options).numerics == numerics
        return
    with raises_typed(UnavailableError, match=f"^{told}$"):
        find_backend("tensorrt").identity(checkpoint, numerics, options)


def test_the_installed_one_is_found_and_can_be_loaded() -> None:
    pytest.importorskip("tensorrt_rtx")
    library = next(library for library in installed_libraries() if library.distribution == "tensorrt-rtx")
    module = library.load()
    assert module.__name__ == "tensorrt_rtx"
    assert module.__version__ == library.version
    assert not library.has_plugins


def test_doctor_tells_what_each_can_do_here() -> None:
    everywhere = "builds for sm75, sm80, sm86, sm89, sm120, sm121 anywhere; knows no plugins: attention is its own"
    here = "builds for this GPU only; embeds the fused attention kernel"
    assert describe_libraries(None, ()) == ["none installed"]
    assert describe_libraries("sm89", (FULL, RTX)) == [
        f"tensorrt 10.14.1.48: runs on this GPU (sm89); {here}",
        f"tensorrt-rtx 1.7.1.116: runs on this GPU (sm89); {everywhere}",
    ]
    assert describe_libraries(None, (RTX,)) == [f"tensorrt-rtx 1.7.1.116: can't run here (no GPU); {everywhere}"]
    assert describe_libraries("sm90", (RTX,)) == [
        "tensorrt-rtx 1.7.1.116: can't run on this GPU (sm90): it builds for sm75, sm80, sm86, sm89, sm120, sm121 "
        f"only; {everywhere}"
    ]
