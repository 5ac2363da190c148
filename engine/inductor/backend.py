"""The backend `inductor` as an object. Imports nothing heavy until it is asked."""

from typing import TYPE_CHECKING, Any, Final

from storyadapter.engine.backend import Backend, EngineRequest, OpenRequest, ReportStage, default_device
from storyadapter.engine.inductor import SOURCES
from storyadapter.engine.sources import sources_digest
from storyadapter.engine.uses import ERRORS
from storyadapter.method.errors import Field, InputError, UnavailableError
from storyadapter.model.numerics import Numerics

if TYPE_CHECKING:
    from storyadapter.checkpoint import Checkpoint
    from storyadapter.engine.store import StoredEngine
    from storyadapter.model.contract import ShapeRanges
    from storyadapter.model.networks import Networks

_LEAST_PIXELS: Final = 64
_FP8_FROM: Final = (8, 9)  # compute capability


class Inductor(Backend):
    name = "inductor"
    purpose = "compiled by PyTorch with the fused kernels: the default with a CUDA GPU"
    holds_weights = False
    number_formats = ("fp8",)
    vae_number_formats = ("fp8",)

    def rank(self) -> int:
        return 3 if default_device().type == "cuda" else 0

    def why_it_cant_build(self) -> UnavailableError | None:
        from storyadapter.engine.inductor.target import check_compilers

        try:
            check_compilers(default_device())
        except UnavailableError as error:
            return error
        return None

    def check(self, numerics: Numerics, ranges: "ShapeRanges | None" = None) -> None:
        super().check(numerics, ranges)
        if numerics.quantizations and (found := _why_no_fp8()):
            network = next(iter(numerics.quantizations))
            field, what = ("precision", "") if network == "denoiser" else ("vae_precision", " the VAE")
            raise UnavailableError(
                f"backend {self.name} can't serve here: it can't run{what} in {numerics.named(network)} on {found}",
                expected=f"a CUDA GPU of compute capability {'.'.join(map(str, _FP8_FROM))} or later",
                advice=("type another ", Field(field), ", or backend eager, which emulates it"),
                field=field,
            )
        if ranges is None:
            return
        for field, pixels in (("height", ranges.height), ("width", ranges.width)):
            if pixels.minimum < pixels.maximum and pixels.minimum < _LEAST_PIXELS:
                raise InputError(
                    Field(field),
                    f" is {pixels}; backend inductor expects a range from {_LEAST_PIXELS} on: a compiler takes a "
                    "size of 1 for a constant, and at 32 pixels the UNet's innermost layers have it",
                )

    def target(self, options: Any) -> tuple[str, str]:
        from storyadapter.engine.inductor.target import compiler_versions, target_architecture

        device = self.device()
        return compiler_versions(device), target_architecture(device)

    def recipe(self, architecture: str) -> tuple[tuple[str, str], ...]:
        return (("sources", sources_digest(SOURCES)),)

    def build(self, request: EngineRequest) -> dict[str, Any]:
        from storyadapter.checkpoint import Checkpoint
        from storyadapter.engine.inductor.builder import build_inductor
        from storyadapter.engine.inductor.weights import remember_recipes

        built = build_inductor(
            request.checkpoint, request.numerics, request.ranges, request.folder, self.device(), request.on_stage
        )
        if isinstance(request.checkpoint, Checkpoint):
            remember_recipes(request.checkpoint, request.numerics, self.device())
        return {
            ERRORS: {name: network.relative_error for name, network in built.items()},
            "weight_bytes": sum(network.weight_bytes for network in built.values()),
        }

    def accept(self, engine: "StoredEngine", checkpoint: "Checkpoint", on_stage: ReportStage) -> None:
        from storyadapter.engine.inductor.networks import open_inductor, was_compared

        if not was_compared(engine, checkpoint):
            open_inductor(engine, checkpoint, engine.identity.numerics, self.device(), on_stage)

    def open(self, request: OpenRequest) -> "Networks":
        from storyadapter.engine.inductor.networks import open_inductor

        return open_inductor(request.stored, request.checkpoint, request.numerics, request.device, request.on_stage)


def _why_no_fp8() -> str:
    """What there is instead of a GPU that multiplies e4m3 numbers; "" if there is one."""
    import torch

    device = default_device()
    if device.type != "cuda":
        return str(device)
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= _FP8_FROM else f"compute capability {'.'.join(map(str, capability))}"


BACKEND = Inductor()
