"""The model in the form that a rung needs; one form at a time is in memory, so that each rung's peak is its own."""

import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from storyadapter.bench.model import BenchmarkModel, Tell
from storyadapter.bench.report import Progress
from storyadapter.checkpoint import IPAdapterWeights
from storyadapter.engine.eager.networks import EagerNetwork
from storyadapter.method.errors import EngineBuildError
from storyadapter.model.contract import ShapeRanges
from storyadapter.model.grca import GrcaFunction, grca
from storyadapter.model.modules import VaeDecoder, iterate_modules
from storyadapter.model.networks import TORCH_DTYPES, Network, Networks
from storyadapter.model.numerics import Numerics, Precision
from storyadapter.model.unet import GlobalReferenceCrossAttention


class Workbench:
    """Loads forms of one model and lets go of the one before.

    Args:
        model: the model.
        ranges: what engines are built for.
        progress: told of what is slow.
        quantized: the same model with its denoiser quantized, if that is to be measured beside it.

    Attributes:
        build_seconds: by backend, and number format if it is quantized, of the engines that were built.
    """

    def __init__(
        self, model: BenchmarkModel, ranges: ShapeRanges, progress: Progress, quantized: BenchmarkModel | None = None
    ) -> None:
        self.model = model
        self.quantized = quantized
        self.ranges = ranges
        self.progress = progress
        self.build_seconds: dict[str, float] = {}
        self._name = ""
        self._form: Any = None
        self._refused: dict[str, EngineBuildError] = {}  # by the same, why its engine can't be built

    def unet(self, user: str = "published") -> tuple[UNet2DConditionModel, IPAdapterWeights]:
        """diffusers' UNet and the adapter, on the device; who changes the UNet for good asks by another `user` name."""
        if self._name != user:
            self.clear()
            checkpoint, device = self.model.checkpoint, self.model.device
            dtype = TORCH_DTYPES[self.model.engine.precision]
            self._form = checkpoint.load("unet", dtype, device), checkpoint.load_ip_adapter(dtype, device)
            self._name = user
        return self._form

    def networks(self, backend: str, *, quantized: bool = False) -> Networks:
        """The contract's networks on a backend; raises what `BenchmarkModel.open` does."""
        model = self.quantized if quantized else self.model
        assert model is not None
        name = f"{backend} in {model.numerics.name}" if quantized else backend
        if self._name != name:
            self.clear()
            if name in self._refused:
                raise self._refused[name]
            try:
                opened = model.open(self.ranges, self.progress.tell, backend)
            except EngineBuildError as error:
                self._refused[name] = error  # told of every rung and case, but not built for minutes again
                raise
            if opened.build_seconds:
                self.build_seconds[name] = opened.build_seconds
                self.progress.leave_out(opened.build_seconds)
            self._form = opened.networks
            self._name = name
        return self._form

    def eager(self, attention: GrcaFunction) -> Networks:
        """Eager networks whose denoiser attends by this implementation of the operator."""
        networks = self.networks("eager")
        denoiser = networks["denoiser"]
        assert isinstance(denoiser, EagerNetwork)
        for module in denoiser.module.modules():
            if isinstance(module, GlobalReferenceCrossAttention):
                module.grca = attention
        return networks

    def clear(self) -> None:
        """Let go of what is in memory."""
        self._name, self._form = "", None
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def with_eager_vae(networks: Networks, model: BenchmarkModel, precision: Precision) -> Networks:
    """The same networks with a VAE in plain PyTorch, channels last; in fp32 on a GPU, its convolutions use TF32."""
    decoder = VaeDecoder(model.checkpoint.load("vae", TORCH_DTYPES[precision], model.device)).eval()
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads lack it
    return _with_vae(networks, EagerNetwork(networks["vae_decoder"].spec, decoder, precision), precision)


def with_compiled_vae(
    networks: Networks, model: BenchmarkModel, ranges: ShapeRanges, precision: Precision, tell: Tell
) -> Networks:
    """The same networks of the backend `inductor`, whose VAE is compiled for another precision, as `build` does it.

    Raises:
        EngineBuildError: see `build_inductor`.
    """
    from storyadapter.engine.inductor.builder import build_inductor
    from storyadapter.engine.inductor.fusion import prepare
    from storyadapter.engine.inductor.networks import InductorNetwork

    spec, device, letters = networks["vae_decoder"].spec, model.device, networks.letters
    assert letters is not None

    def on_stage(network: str, what: str) -> None:
        if network:
            tell(f"    building inductor: {network} in {precision}: {what}")

    tell(f"    the store keeps no VAE in {precision} beside an engine: it is built first, for minutes")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numerics = Numerics(precision)
        build_inductor(model.checkpoint, numerics, ranges, folder, device, on_stage, only=(spec.name,))
        ((_, module),) = iterate_modules(model.checkpoint, numerics, grca, (spec.name,), device)
        weights = prepare(module, device)
        network = InductorNetwork(spec, folder, precision, device, letters, weights)
    return _with_vae(networks, network, precision)


def _with_vae(networks: Networks, vae: Network, precision: Precision) -> Networks:
    numerics = Numerics.of(networks.numerics.precision, vae_decoder=precision)
    return dataclasses.replace(networks, by_name={**networks.by_name, "vae_decoder": vae}, numerics=numerics)
