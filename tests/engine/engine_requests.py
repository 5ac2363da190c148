"""What the store's tests ask engines for."""

from pathlib import Path
from typing import Any

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.backends import find_backend
from storyadapter.engine.identity import EngineIdentity, FusedLora, WeightFile
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.numerics import Numerics, Precision


def digest(letter: str) -> str:
    return letter * 64


UNET = WeightFile("unet", "unet.safetensors", digest("a"))
VAE = WeightFile("vae", "vae.safetensors", digest("b"))
TEXT = WeightFile("text_encoder", "model.safetensors", digest("c"))


def identity(*, precision: Precision = "fp16", vae_precision: Precision = "fp32", **changes: Any) -> EngineIdentity:
    settings: dict[str, Any] = {
        "backend": "onnxruntime",
        "backend_version": "1.24.1",
        "numerics": Numerics.of(precision, vae_decoder=vae_precision),
        "architecture": "cpu-x86_64",
        "contract": digest("e"),
        "weights": (UNET, VAE, TEXT),
        "loras": (FusedLora("style.safetensors", digest("d"), 0.8),),
        "build_options": (("opset", "23"), ("export version", "1")),
    }
    return EngineIdentity(**(settings | changes))


def identify(checkpoint: Checkpoint, backend: str, numerics: Numerics, *, options: Any = None) -> EngineIdentity:
    """What a run asks the store for; see `Backend.identity`."""
    return find_backend(backend).identity(checkpoint, numerics, options)


def ranges(
    max_frames: int = 4,
    max_references: int = 100,
    height: Range | int = 512,
    width: Range | int = 512,
) -> ShapeRanges:
    height, width = (Range(size, size) if isinstance(size, int) else size for size in (height, width))
    return ShapeRanges(max_frames, max_references, height, width)


def write_small(folder: Path) -> dict[str, Any]:
    """An engine of two files, one of them in a folder below."""
    (folder / "denoiser.onnx").write_bytes(b"graph")
    (folder / "weights").mkdir()
    (folder / "weights" / "denoiser.data").write_bytes(bytes(1000))
    return {"versions": {"onnx": "1.22"}, "errors": {"denoiser": 1e-6}}


def never_waits(message: str) -> None:
    raise AssertionError(f"nothing should have been waited for: {message}")
