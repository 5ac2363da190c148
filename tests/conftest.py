"""Fixtures shared by all tests.

What takes seconds to import is imported where it is used: `pytest -n` reads this file in a process that runs no test,
and starts the others only then.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from storyadapter.checkpoint import Checkpoint
    from storyadapter.engine.store import StoredEngine

# What takes longest begins first, so that no process works alone at the end. Two files that need the same engine lie
# apart, or one would wait while the other builds it. In seconds; all others take less than 30.
LONGEST = (
    "test_fresh_environment.py",  # 200
    "storyadapter/runtime/test_ray_workers.py",  # 130
    "test_readme_commands.py",  # 70
    "engine/inductor/test_inductor.py",  # 120, of which 105 build the tiny model's engine
    "engine/tensorrt/test_builder.py",  # 150
    "storyadapter/cli/test_stopping.py",  # 60
    "engine/test_trial.py",  # 65, of which 35 build the tiny model's engine
    "kernels/test_aot.py",  # 50
    "engine/inductor/test_builder.py",  # 45
    "export/test_quantized_nodes.py",  # 30
    "bench/kernels/test_command.py",  # 35
    "export/test_export.py",  # 45, of which 45 build an engine of the tiny model with a ControlNet
    "export/test_reference_vae.py",  # 30
)
FOLDER = Path(__file__).parent
WITHOUT_ONNX = os.environ | {"PYTHONPATH": str(FOLDER / "without_onnx")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {FOLDER / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On tensors as small as here, two threads that compete with other work are many times slower."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded random SDXL folder for 64×64 pixels, with `image_encoder/` and `ip-adapter.safetensors` in it.

    Read only: every test of the session shares it.
    """
    from storyadapter.demo.training.networks import TINY, write_random_model

    folder = tmp_path_factory.mktemp("tiny-model")
    write_random_model(folder, seed=0, config=TINY)
    tell_pictures_apart(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny_model_dir: Path) -> Checkpoint:
    """The tiny model, opened."""
    from storyadapter.checkpoint import Checkpoint

    paths = {"image_encoder": tiny_model_dir / "image_encoder", "ip_adapter": tiny_model_dir / "ip-adapter.safetensors"}
    return Checkpoint.open(base_model=tiny_model_dir, **paths)


def tell_pictures_apart(folder: Path) -> None:
    """Makes the adapter's tokens depend on the picture, as a trained CLIP's do.

    A random CLIP gives all frames of a story nearly one embedding, so a test with it would hardly see a missing, stale
    or wrong reference. Here the image projection weighs what tells the embeddings of some frames apart a third as
    much as what they have in common; more would make each iteration multiply the rounding errors of the last.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from tests.oracle.published_method import encode_picture, load_published_model, published_frame

    path = folder / "ip-adapter.safetensors"
    model = load_published_model(folder, folder / "image_encoder", path)
    drawing = dict(steps=2, seed=0, height=64, width=64, guidance=5.0, negative_prompt="")
    frames = [
        published_frame(model, word, [], 0.0, **drawing) for word in ("sun", "a fox", "night", "two owls", "", "sea")
    ]
    with torch.no_grad():
        embeddings = torch.cat([encode_picture(model, frame) for frame in frames])
    common = embeddings.mean(0)
    adapter = load_file(path)
    spread = (embeddings - common).square().mean().sqrt()
    weight = adapter["image_proj.proj.weight"]
    adapter["image_proj.proj.weight"] = weight / spread
    adapter["image_proj.proj.bias"] += weight @ (3 * common / common.square().mean().sqrt() - common / spread)
    save_file(adapter, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    """The demo model that the project ships."""
    from storyadapter.checkpoint import Checkpoint
    from storyadapter.checkpoint.paths import CheckpointPaths
    from storyadapter.demo.shipped import MODEL

    return Checkpoint.open(CheckpointPaths(MODEL, MODEL / "image_encoder", MODEL / "ip-adapter.safetensors"))


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one test session see, for what only one of them shall make; lock what you make."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def tiny_engine_dir(tiny_model_dir: Path, session_folder: Path) -> Path:
    """An engine store with one onnxruntime engine of the tiny model: fp32, 64×64, 3 frames at once, 100 references.

    Built once for all processes, by typing the very command that `run` tells when it finds no engine. Read only.
    """
    folder = session_folder / "tiny-engines"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _build_as_told(tiny_model_dir, folder)
    return folder


def _build_as_told(tiny_model_dir: Path, folder: Path) -> None:
    from storyadapter.__main__ import main

    run = [
        *("run", "--base-model", str(tiny_model_dir), "--image-encoder", str(tiny_model_dir / "image_encoder")),
        *("--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--backend", "onnxruntime"),
        *("--precision", "fp32", "--max-frames", "3", "--prompt", "a fox", "--style", "none"),
        *("--out", str(folder / "no-such-folder")),
        *("--engine-dir", str(folder)),
    ]
    with redirect_stderr(StringIO()) as told:
        assert main(run) == 2
    program, *build = shlex.split(told.getvalue().partition("build it: ")[2])
    assert program == "storyadapter-trt"
    assert main([*build, "--quiet"]) == 0


@pytest.fixture(scope="session")
def controlled_checkpoint(
    checkpoint: Checkpoint, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """The tiny model with a ControlNet."""
    from storyadapter.checkpoint import Checkpoint
    from tests.control_models import write_controlnet

    folder = write_controlnet(tiny_model_dir, tmp_path_factory.mktemp("control") / "openpose")
    return Checkpoint.open(replace(checkpoint.paths, controlnets=(folder,)))


@pytest.fixture(scope="session")
def free_engine(controlled_checkpoint: Checkpoint, session_folder: Path) -> StoredEngine:
    """An onnxruntime engine of the tiny model with a ControlNet, whose letters are free but for the width: fp32, 64 to
    96 high, 64 wide, 4 frames at once, 6 references, 3 chunks of a prompt. Built once for all processes; read only."""
    from storyadapter.engine.backends import BACKENDS
    from storyadapter.engine.opening import build_engine
    from storyadapter.model.contract import Range, ShapeRanges

    folder, ranges = session_folder / "free-engines", ShapeRanges(4, 6, Range(64, 96), Range(64, 64), 3)
    numerics = controlled_checkpoint.geometry.numerics("fp32")
    identity = BACKENDS["onnxruntime"].identity(controlled_checkpoint, numerics)
    with FileLock(f"{folder}.lock"):
        return build_engine(controlled_checkpoint, identity, ranges, engine_dir=folder)


@pytest.fixture(scope="session")
def tiny_inductor_dir(tiny_model_dir: Path, session_folder: Path) -> Path:
    """An engine store with one inductor engine of the tiny model for the CPU: fp32, 64×64, 2 frames at once,
    8 references. It takes a minute or two of a C++ compiler, and no ONNX package. Built once for all processes; read
    only."""
    folder = session_folder / "inductor-engines"
    build = [
        *(sys.executable, "-m", "storyadapter", "build", "--base-model", str(tiny_model_dir)),
        *("--image-encoder", str(tiny_model_dir / "image_encoder")),
        *("--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--backend", "inductor"),
        *("--precision", "fp32", "--max-frames", "2", "--max-references", "8"),
        *("--engine-dir", str(folder), "--quiet"),
    ]
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            subprocess.run(build, check=True, env=WITHOUT_ONNX)
    return folder
