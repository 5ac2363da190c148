"""The backend `inductor` as an object. Imports nothing heavy until it is asked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from storyadapter.engine.backend import (
    Backend,
    EngineRequest,
    ReportBytes,
    ReportFraction,
    ReportStage,
    default_device,
)
from storyadapter.engine.identity import EngineIdentity, identity_of
from storyadapter.method.errors import Field, InputError, UnavailableError
from storyadapter.model.numerics import Numerics

if TYPE_CHECKING:
    import torch

    from storyadapter.checkpoint import Checkpoint
    from storyadapter.engine.store import StoredEngine
    from storyadapter.model.contract import ShapeRanges
    from storyadapter.model.networks import Networks

_LEAST_PIXELS: Final = 64


class Inductor(Backend):
    name = "inductor"
    purpose = "compiled by PyTorch with the fused kernels: the default with a CUDA GPU"

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
        if ranges is None:
            return
        for field, pixels in (("height", ranges.height), ("width", ranges.width)):
            if pixels.minimum < pixels.maximum and pixels.minimum < _LEAST_PIXELS:
                raise InputError(
                    Field(field),
                    f" is {pixels}; backend inductor expects a range from {_LEAST_PIXELS} on: a compiler takes a "
                    "size of 1 for a constant, and at 32 pixels the UNet's innermost layers have it",
                )

    def identity(
        self, checkpoint: "Checkpoint", numerics: Numerics, options: Any, on_bytes: ReportBytes | None
    ) -> EngineIdentity:
        from storyadapter.engine.inductor.target import compiler_versions, target_architecture

        device = self.device()
        version, architecture = compiler_versions(device), target_architecture(device)
        return identity_of(self.name, version, architecture, checkpoint, numerics, on_bytes, self.recipe(architecture))

    def recipe(self, architecture: str) -> tuple[tuple[str, str], ...]:
        import torch

        from storyadapter.engine.inductor.target import build_options

        return build_options(torch.device("cuda" if architecture.startswith("sm") else "cpu"))

    def build(
        self, request: EngineRequest, folder: Path, on_stage: ReportStage, on_fraction: ReportFraction
    ) -> dict[str, Any]:
        from storyadapter.engine.inductor.builder import build_inductor

        errors = build_inductor(request.checkpoint, request.numerics, request.ranges, folder, self.device(), on_stage)
        return {"relative_error_against_eager": errors}

    def open(
        self,
        checkpoint: "Checkpoint",
        numerics: Numerics,
        device: "torch.device",
        engine: "StoredEngine | None",
        on_stage: ReportStage,
    ) -> "Networks":
        from storyadapter.engine.inductor.session import open_inductor

        assert engine is not None
        letters = engine.ranges.letters(checkpoint.geometry.pixels_per_latent)
        return open_inductor(engine.folder, checkpoint.geometry, numerics, letters, default_device(), on_stage)


BACKEND = Inductor()
