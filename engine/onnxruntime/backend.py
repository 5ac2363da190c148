"""The backend `onnxruntime` as an object. Imports nothing heavy until it is asked."""

from typing import TYPE_CHECKING, Any

from storyadapter.engine.backend import Backend, EngineRequest, OpenRequest, installed_version
from storyadapter.engine.sources import export_recipe
from storyadapter.engine.uses import ERRORS
from storyadapter.model.numerics import NUMBER_FORMATS

if TYPE_CHECKING:
    import torch

    from storyadapter.model.networks import Networks


class OnnxRuntime(Backend):
    name = "onnxruntime"
    purpose = "ONNX on the CPU: the default without a GPU"
    packages = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnxruntime"
    precisions = ("fp32", "fp16")
    vae_precisions = ("fp32", "fp16")
    number_formats = NUMBER_FORMATS  # what a GPU multiplies in 8 bits is computed in the precision beside it

    def rank(self) -> int:
        return 2 if self.why_unavailable() is None else 0

    def device(self, asked: "torch.device | None" = None) -> "torch.device":
        import torch

        return self._own_device(torch.device("cpu"), asked)

    def target(self, options: Any) -> tuple[str, str]:
        return installed_version("onnxruntime") or "", "any"

    def recipe(self, architecture: str) -> tuple[tuple[str, str], ...]:
        return export_recipe()

    def build(self, request: EngineRequest) -> dict[str, Any]:
        from storyadapter.engine.onnxruntime.networks import build_onnx

        return {ERRORS: build_onnx(request)}

    def open(self, request: OpenRequest) -> "Networks":
        from storyadapter.engine.onnxruntime.networks import open_onnxruntime

        return open_onnxruntime(request)


BACKEND = OnnxRuntime()
