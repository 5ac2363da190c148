"""The backend `eager` as an object. Imports nothing heavy until it is asked."""

from typing import TYPE_CHECKING, Any

from storyadapter.engine.backend import Backend, OpenRequest, default_device, installed_version
from storyadapter.model.numerics import NUMBER_FORMATS, VAE_NUMBER_FORMATS

if TYPE_CHECKING:
    import torch

    from storyadapter.model.networks import Networks


class Eager(Backend):
    name = "eager"
    purpose = "plain PyTorch on CPU or GPU: the reference"
    builds = False
    holds_weights = False
    any_device = True
    number_formats = NUMBER_FORMATS  # emulated
    vae_number_formats = VAE_NUMBER_FORMATS

    def rank(self) -> int:
        return 1

    def device(self, asked: "torch.device | None" = None) -> "torch.device":
        return asked or default_device()

    def target(self, options: Any) -> tuple[str, str]:
        return installed_version("torch") or "", "any"

    def open(self, request: OpenRequest) -> "Networks":
        from storyadapter.engine.eager.networks import open_eager

        told = request.on_stage
        return open_eager(
            request.checkpoint, request.numerics, request.device, lambda network: told(network, "loading weights")
        )


BACKEND = Eager()
