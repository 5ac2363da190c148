"""Nested phases as one fraction."""

from storyadapter.engine.tensorrt.worker import Progress


def test_phases_within_phases_add_up() -> None:
    progress = Progress()
    progress.start("build", None, 2)
    assert progress.fraction == 0
    progress.start("first", "build", 4)
    progress.step("first", 0)
    assert progress.fraction == 1 / 8
    progress.start("deep", "first", 2)
    progress.step("deep", 0)
    assert progress.fraction == 1 / 8 + 1 / 16
    progress.finish("deep")
    progress.step("first", 1)
    assert progress.fraction == 2 / 8
    progress.finish("first")
    progress.step("build", 0)
    assert progress.fraction == 1 / 2
    progress.step("build", 1)
    progress.finish("build")
    assert progress.fraction == 1


def test_it_never_falls() -> None:
    progress = Progress()
    progress.start("build", None, 10)
    progress.start("half", "build", 2)
    progress.step("half", 0)
    before = progress.fraction
    progress.start("again", "build", 100)
    assert progress.fraction == before > 0


def test_unknown_phases_are_passed_over() -> None:
    progress = Progress()
    progress.step("never started", 3)
    progress.finish("never started")
    assert progress.fraction == 0
