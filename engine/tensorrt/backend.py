"""The backend `tensorrt` as an object. Imports nothing heavy until it is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storyadapter.engine.backend import Backend, EngineRequest, OpenRequest, ReportBytes, ReportFraction, ReportStage
from storyadapter.engine.identity import EngineIdentity, identity_of
from storyadapter.engine.sources import export_recipe
from storyadapter.engine.tensorrt import SOURCES
from storyadapter.engine.tensorrt.library import choose_library, describe_libraries, gpu_target, why_it_cant_run
from storyadapter.engine.tensorrt.options import SETTINGS, BuildOptions
from storyadapter.method.errors import Field, UnavailableError
from storyadapter.model.numerics import Numerics, Precision

if TYPE_CHECKING:
    import torch

    from storyadapter.checkpoint import Checkpoint
    from storyadapter.model.networks import Networks


class TensorRT(Backend):
    name = "tensorrt"
    purpose = "engines of TensorRT or TensorRT-RTX, for NVIDIA GPUs"
    packages = ()
    build_packages = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnxruntime"
    one_of = (("tensorrt-rtx", "an RTX GPU, or to build on any machine"), ("tensorrt", "a data-centre GPU"))
    precisions = ("fp16", "bf16")
    settings = SETTINGS

    def rank(self) -> int:
        return 0

    def default_precision(self) -> Precision:
        """fp16: it builds for a GPU, wherever it is built."""
        return "fp16"

    def device(self, asked: "torch.device | None" = None) -> "torch.device":
        if gpu_target() is None:
            raise UnavailableError(
                "backend tensorrt builds here but can't run here: there is no GPU that PyTorch can use",
                expected=("another ", Field("backend"), ", or a machine with a GPU"),
            )
        return super().device(asked)

    def why_it_cant_run(self) -> str | None:
        return why_it_cant_run(gpu_target())

    def describe(self) -> list[tuple[str, str]]:
        return [("TensorRT", line) for line in describe_libraries(gpu_target())]

    def options(self, given: Mapping[str, Any]) -> BuildOptions:
        return BuildOptions.read(given)

    def identity(
        self, checkpoint: "Checkpoint", numerics: Numerics, options: BuildOptions | None, on_bytes: ReportBytes | None
    ) -> EngineIdentity:
        options = options or BuildOptions()
        library, targets = choose_library(options.targets, gpu_target())
        return identity_of(
            self.name,
            str(library),
            "+".join(targets),
            checkpoint,
            numerics,
            on_bytes,
            self.recipe("+".join(targets)),
            options.named(),
        )

    def recipe(self, architecture: str) -> tuple[tuple[str, str], ...]:
        return export_recipe(*SOURCES)

    def build(
        self, request: EngineRequest, folder: Path, on_stage: ReportStage, on_fraction: ReportFraction
    ) -> dict[str, Any]:
        from storyadapter.engine.tensorrt.builder import build_tensorrt

        library, targets = choose_library(tuple(request.identity.architecture.split("+")), gpu_target())
        return build_tensorrt(
            request.checkpoint,
            request.numerics,
            request.ranges,
            library,
            targets,
            request.options or BuildOptions(),
            folder,
            # what TensorRT measured of single layers, for all builds; TensorRT-RTX measures nothing
            request.shared / f"timing-{library.version}-{targets[0]}.cache" if library.has_plugins else None,
            on_stage,
            on_fraction,
        )

    def open(self, request: OpenRequest) -> "Networks":
        from storyadapter.engine.tensorrt.networks import open_tensorrt

        return open_tensorrt(request)


BACKEND = TensorRT()
