"""From a model's files to a pipeline, in one call: where Python programs begin."""

from collections.abc import Callable
from pathlib import Path

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backend import ReportBytes
from storyadapter.engine.backends import AUTO, find_backend
from storyadapter.engine.identity import model_weights
from storyadapter.engine.opening import open_networks
from storyadapter.model.contract import ShapeRanges
from storyadapter.model.numerics import Numerics
from storyadapter.runtime.pipeline import StoryPipeline


def open(  # as of a file: what it gives is ready for use
    checkpoint: Checkpoint,
    *,
    backend: str = AUTO,
    numerics: Numerics | None = None,
    ranges: ShapeRanges | None = None,
    engine_dir: Path | None = None,
    build_command: str = "storyadapter-trt build",
    on_stage: Callable[[str, str], None] = lambda network, stage: None,
    on_bytes: ReportBytes | None = None,
) -> StoryPipeline:
    """A pipeline of a checkpoint on a backend; what it draws is keyed by the checkpoint's files.

    Args:
        checkpoint: opened model files.
        backend: its name; by default the fastest that serves here.
        numerics: such as `checkpoint.geometry.numerics("fp16")`; by default the backend's usual precision, and fp32 for
            a VAE whose configuration asks for it.
        ranges, engine_dir, build_command, on_stage: see `open_networks`.
        on_bytes: called while weight files are read that were never hashed before.

    Raises:
        UnavailableError, EngineMismatchError, EngineBuildError: see `open_networks`.
        CheckpointError: a file can't be read.
    """
    chosen = find_backend(backend)
    networks = open_networks(
        checkpoint,
        backend=chosen.name,
        numerics=numerics or checkpoint.geometry.numerics(chosen.default_precision()),
        ranges=ranges,
        engine_dir=engine_dir,
        build_command=build_command,
        on_stage=on_stage,
        on_bytes=on_bytes,
    )
    return StoryPipeline(networks, checkpoint.load_tokenizers(), model=model_weights(checkpoint, on_bytes).key)
