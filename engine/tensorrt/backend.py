"""The backend `tensorrt` as an object. Imports nothing heavy until it is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from storyadapter.engine.acceptance import Acceptance, AcceptancePlan, find_acceptance
from storyadapter.engine.backend import Backend, EngineRequest, OpenRequest, ReportBytes
from storyadapter.engine.identity import EngineIdentity
from storyadapter.engine.sources import export_recipe, sources_digest
from storyadapter.engine.tensorrt import SOURCES
from storyadapter.engine.tensorrt.library import (
    MULTIPLIED_FROM,
    choose_library,
    describe_libraries,
    gpu_target,
    multiplies,
    why_it_cant_run,
)
from storyadapter.engine.tensorrt.options import SETTINGS, BuildOptions
from storyadapter.method.errors import Field, UnavailableError
from storyadapter.model.numerics import NUMBER_FORMATS, Numerics, Precision

if TYPE_CHECKING:
    import torch

    from storyadapter.checkpoint import Checkpoint
    from storyadapter.model.networks import Networks


# what decides a picture between a plan and the GPU
_ACCEPTED_SOURCES: Final = (
    *("storyadapter.engine.tensorrt", "storyadapter.engine.trial", "storyadapter.engine.graphs"),
    *("storyadapter.export", "storyadapter.kernels", "storyadapter.quantization"),
    *("storyadapter.model", "storyadapter.runtime"),
)


class TensorRT(Backend):
    name = "tensorrt"
    purpose = "engines of TensorRT or TensorRT-RTX, for NVIDIA GPUs"
    packages = ()
    build_packages = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnxruntime"
    one_of = (("tensorrt-rtx", "an RTX GPU, or to build on any machine"), ("tensorrt", "a data-centre GPU"))
    precisions = ("fp16", "bf16")
    number_formats = NUMBER_FORMATS
    settings = SETTINGS
    accepted_first = True

    def rank(self) -> int:
        """The highest where its engines were run and compared with eager, and 0 elsewhere."""
        found = self.acceptance()
        return 4 if found and found.record else 0

    def acceptance(self) -> Acceptance | None:
        if self.why_unavailable() or self.why_it_cant_run():
            return None
        import torch

        from storyadapter.engine.gpu import driver_version

        library, (target,) = choose_library((), gpu_target())
        facts = {
            "backend": self.name,
            "GPU": torch.cuda.get_device_name(),
            "architecture": target,
            "driver": driver_version(),
            "TensorRT": str(library),
            "PyTorch": torch.__version__,
            "sources": sources_digest(_ACCEPTED_SOURCES),
        }
        return find_acceptance(facts)

    def acceptance_plan(self, folder: Path) -> AcceptancePlan:
        if why := self.why_it_cant_run() or self.why_unavailable(to_build=True):
            raise UnavailableError(f"backend {self.name} can't be accepted here: {why}")
        from storyadapter.engine.tensorrt.acceptance import plan

        return plan(folder)

    def default_precision(self, device: "torch.device | None" = None) -> Precision:
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

    def target(self, options: BuildOptions | None) -> tuple[str, str]:
        library, targets = choose_library(options.targets if options else (), gpu_target())
        return str(library), "+".join(targets)

    def identity(
        self, checkpoint: "Checkpoint", numerics: Numerics, options: Any = None, on_bytes: ReportBytes | None = None
    ) -> EngineIdentity:
        found = super().identity(checkpoint, numerics, options, on_bytes)
        if numerics.quantization:
            form = numerics.quantization.number_format
            if older := [target for target in found.architecture.split("+") if not multiplies(form, target)]:
                raise UnavailableError(
                    f"{older[0]} doesn't multiply {form} numbers",
                    expected=(Field("target"), f" {MULTIPLIED_FROM[form]} or later"),
                )
        return found

    def recipe(self, architecture: str) -> tuple[tuple[str, str], ...]:
        return export_recipe(*SOURCES)

    def build(self, request: EngineRequest) -> dict[str, Any]:
        from storyadapter.engine.tensorrt.builder import build_tensorrt

        return build_tensorrt(request)

    def open(self, request: OpenRequest) -> "Networks":
        from storyadapter.engine.tensorrt.networks import open_tensorrt

        return open_tensorrt(request)


BACKEND = TensorRT()
