"""The backend `onnxruntime` as an object. Imports nothing heavy until it is asked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from storyadapter.engine.backend import (
    Backend,
    EngineRequest,
    OpenRequest,
    ReportBytes,
    ReportFraction,
    ReportStage,
    installed_version,
)
from storyadapter.engine.identity import EngineIdentity, identity_of
from storyadapter.engine.sources import export_recipe
from storyadapter.model.numerics import Numerics

if TYPE_CHECKING:
    import torch

    from storyadapter.checkpoint import Checkpoint
    from storyadapter.model.networks import Networks


class OnnxRuntime(Backend):
    name = "onnxruntime"
    purpose = "ONNX on the CPU: the default without a GPU"
    packages = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnxruntime"
    precisions = ("fp32", "fp16")
    vae_precisions = ("fp32", "fp16")

    def rank(self) -> int:
        return 2 if self.why_unavailable() is None else 0

    def device(self, asked: "torch.device | None" = None) -> "torch.device":
        import torch

        return self._own_device(torch.device("cpu"), asked)

    def identity(
        self, checkpoint: "Checkpoint", numerics: Numerics, options: Any, on_bytes: ReportBytes | None
    ) -> EngineIdentity:
        version = installed_version("onnxruntime") or ""
        return identity_of(self.name, version, "any", checkpoint, numerics, on_bytes, self.recipe("any"))

    def recipe(self, architecture: str) -> tuple[tuple[str, str], ...]:
        return export_recipe()

    def build(
        self, request: EngineRequest, folder: Path, on_stage: ReportStage, on_fraction: ReportFraction
    ) -> dict[str, Any]:
        from storyadapter.engine.onnxruntime.networks import build_onnx

        return {"relative_error_against_eager": build_onnx(request, folder, on_stage)}

    def open(self, request: OpenRequest) -> "Networks":
        from storyadapter.engine.onnxruntime.networks import open_onnxruntime

        return open_onnxruntime(request)


BACKEND = OnnxRuntime()
