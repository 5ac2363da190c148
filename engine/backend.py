"""What a backend is: one object per folder, which says what it needs, and identifies, builds and opens engines.

Imports nothing heavy until it is asked.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from storyadapter.engine.acceptance import Acceptance, AcceptancePlan
from storyadapter.engine.identity import EngineIdentity, configuration_digest, contract_digest, model_weights
from storyadapter.method.errors import Field, InputError, Text, UnavailableError
from storyadapter.model.numerics import PRECISIONS, NumberFormat, Numerics, Precision

if TYPE_CHECKING:
    import torch

    from storyadapter.checkpoint import Checkpoint
    from storyadapter.engine.store import StoredEngine
    from storyadapter.model.contract import NetworkSpec, Range, ShapeRanges
    from storyadapter.model.networks import Networks

Loaded = TypeVar("Loaded")
ReportStage = Callable[[str, str], None]  # network ("" for none in particular), what is being done
ReportBytes = Callable[[int, int], None]  # bytes read, bytes to be read
ReportFraction = Callable[[str, float], None]  # network, how much of its engine is built


@dataclass(frozen=True)
class Setting:
    """A setting of one backend's builds, which a face spells and reads."""

    name: str  # as `Field` names it
    placeholder: str  # of its value
    help: Text  # what it does
    kind: type = str  # of its value
    default: Any = None  # what it is if it isn't given
    several: bool = False  # whether it may be given several times, and is a list


@dataclass(frozen=True)
class EngineRequest:
    """An engine to be built."""

    checkpoint: "Checkpoint"  # opened model files
    identity: EngineIdentity  # what a backend's `identity` gave for them
    ranges: "ShapeRanges"  # the shapes to be served
    options: Any  # those that the identity was made with
    folder: Path  # gets the engine; empty
    shared: Path  # a folder for what this backend's builds share
    on_stage: ReportStage
    on_fraction: ReportFraction

    @property
    def numerics(self) -> Numerics:
        return self.identity.numerics

    @property
    def letters(self) -> "dict[str, Range]":
        """The range of every dynamic letter that the engine is to serve."""
        return self.ranges.letters(self.checkpoint.geometry.pixels_per_latent)


@dataclass(frozen=True)
class OpenRequest:
    """Networks to be opened."""

    checkpoint: "Checkpoint"
    numerics: Numerics
    device: "torch.device"  # as a backend's `device` gives it
    engine: "StoredEngine | None"  # that serves them; None for a backend that doesn't build
    on_stage: ReportStage

    @property
    def stored(self) -> "StoredEngine":
        """The engine, of a backend that builds."""
        assert self.engine is not None
        return self.engine

    @property
    def letters(self) -> "dict[str, Range]":
        """The range of every dynamic letter that the engine serves."""
        return self.stored.ranges.letters(self.checkpoint.geometry.pixels_per_latent)

    def load_each(self, load: "Callable[[NetworkSpec], Loaded]") -> "dict[str, Loaded]":
        """What `load` gives for each network, by name; each is told before it is loaded."""
        from storyadapter.model.contract import network_specs

        loaded = {}
        for name, spec in network_specs(self.checkpoint.geometry).items():
            self.on_stage(name, "loading engine")
            loaded[name] = load(spec)
        return loaded


class Backend(ABC):
    """A way to run the networks of the contract."""

    name: ClassVar[str]  # as users type it
    purpose: ClassVar[str]  # for help and overviews
    packages: ClassVar[tuple[str, ...]] = ("torch",)  # what must be installed to run
    build_packages: ClassVar[tuple[str, ...]] = ()  # what besides to build
    extra: ClassVar[str | None] = None  # installs both
    # of these packages, one must be installed to run or to build; with what each is for. The extra of the same name
    # installs it and both of the others
    one_of: ClassVar[tuple[tuple[str, str], ...]] = ()
    builds: ClassVar[bool] = True  # whether `build` makes an engine that `open` needs
    holds_weights: ClassVar[bool] = True  # whether its engines do; else `open` reads them from the checkpoint's files
    any_device: ClassVar[bool] = False  # whether it runs on whatever device it is given
    precisions: ClassVar[tuple[Precision, ...]] = PRECISIONS  # those it can serve
    vae_precisions: ClassVar[tuple[Precision, ...]] = PRECISIONS  # the VAE's needn't be that of the other networks
    number_formats: ClassVar[tuple[NumberFormat, ...]] = ()  # of quantized products that it can serve
    vae_number_formats: ClassVar[tuple[NumberFormat, ...]] = ()  # of those of the VAE's decoder
    settings: ClassVar[tuple[Setting, ...]] = ()  # of its builds
    accepted_first: ClassVar[bool] = False  # whether it is this machine's default only where it was accepted

    @abstractmethod
    def rank(self) -> int:
        """How much it should be this machine's default; of all backends the highest is taken."""

    def default_precision(self, device: "torch.device | None" = None) -> Precision:
        """fp16 on a GPU, fp32 on a CPU. Raises UnavailableError: see `device`."""
        return "fp16" if self.device(device).type == "cuda" else "fp32"

    def runs_on(self, device: "torch.device") -> bool:
        """Whether it runs on this device of this machine."""
        try:
            self.device(device)
        except UnavailableError:
            return False
        return True

    def device(self, asked: "torch.device | None" = None) -> "torch.device":
        """Where it runs here: the CUDA GPU if there is one, else the CPU.

        Raises:
            UnavailableError: it doesn't run on the device that was asked for.
        """
        return self._own_device(default_device(), asked)

    def _own_device(self, own: "torch.device", asked: "torch.device | None") -> "torch.device":
        if asked is not None and not _is_device(asked, own):
            raise UnavailableError(
                f"backend {self.name} runs on {own} here; {asked} asked for", expected="no device, or backend eager"
            )
        return own

    def wake(self) -> None:
        """Where it runs on a GPU, begin to make its context, beside what else there is to do: it takes a second."""
        import torch

        def use(device: torch.device) -> None:
            with suppress(RuntimeError, AssertionError):  # whoever uses it next is told
                torch.empty(1, device=device)

        if (device := self.device()).type == "cuda":
            Thread(target=use, args=(device,)).start()

    def why_unavailable(self, *, to_build: bool = False) -> str | None:
        """Why it can't serve here, in words; None if it can. Asks for packages, not a GPU."""
        needed = self.packages + (self.build_packages if to_build else ())
        missing = [package for package in needed if installed_version(package) is None]
        extras = [(self.extra, "")]
        if self.one_of and all(installed_version(package) is None for package, _ in self.one_of):
            missing.insert(0, " or ".join(package for package, _ in self.one_of))
            extras = [(package, f" for {purpose}") for package, purpose in self.one_of]
        if not missing:
            return None
        ways = "; ".join(f"pip install 'storyadapter-trt[{extra}]'{purpose}" for extra, purpose in extras)
        return f"{' and '.join(missing)} not installed; type: {ways}"

    def why_it_cant_run(self) -> str | None:
        """Why engines that are built for this machine can't run on it; None if they can."""
        return None

    def why_it_cant_build(self) -> UnavailableError | None:
        """Why it runs engines here, but doesn't build them; None if it builds."""
        return None

    def acceptance(self) -> Acceptance | None:
        """Whether it was accepted on this machine; None where it can't run, or needs no acceptance."""
        return None

    def acceptance_plan(self, folder: Path) -> AcceptancePlan:
        """How it is accepted on this machine.

        Args:
            folder: an engine store for it.

        Raises:
            UnavailableError: it can't be; the text says what is missing.
        """
        raise UnavailableError(f"backend {self.name} needs no acceptance")

    def describe(self) -> list[tuple[str, str]]:
        """What else is to be known of it on this machine: headings and texts."""
        return []

    def check(self, numerics: Numerics, ranges: "ShapeRanges | None" = None) -> None:
        """What can be told before any weights are read.

        Args:
            ranges: to build for; None to run alone.

        Raises:
            UnavailableError: it can't serve here, or not in these numerics.
            InputError: it can't be built for these ranges.
        """
        refused = f"backend {self.name} can't serve here: "
        if reason := self.why_unavailable(to_build=ranges is not None):
            raise UnavailableError(refused + reason)
        for field, what, network, precisions, formats in (
            ("precision", "", "denoiser", self.precisions, self.number_formats),
            ("vae_precision", " the VAE", "vae_decoder", self.vae_precisions, self.vae_number_formats),
        ):
            asked, served = numerics[network], (*precisions,)
            if network in numerics.quantizations and (form := numerics.named(network)) not in formats:
                asked, served = form, (*precisions, *formats)
            if asked not in precisions:
                expected = (Field(field), f" {' or '.join(served)}")
                raise UnavailableError(f"{refused}it can't run{what} in {asked}", expected=expected, field=field)

    def options(self, given: Mapping[str, Any]) -> Any:
        """How it is to build, from the values of its `settings` by name; has `named()`, those chosen, for the key.

        Raises:
            InputError: a value that can't be served.
        """
        return None

    def identity(
        self, checkpoint: "Checkpoint", numerics: Numerics, options: Any = None, on_bytes: ReportBytes | None = None
    ) -> EngineIdentity:
        """Everything that what it computes with this checkpoint depends on.

        Args:
            options: as `options` gives them; None for the default.
            on_bytes: called while weight files are read that were never hashed before.

        Raises:
            CheckpointError: a file can't be read.
            UnavailableError: it can't build or run here.
        """
        version, architecture = self.target(options)
        weights = model_weights(checkpoint, on_bytes) if self.holds_weights else None
        return EngineIdentity(
            backend=self.name,
            backend_version=version,
            numerics=numerics if weights else numerics.with_scales({}),
            architecture=architecture,
            contract=contract_digest(checkpoint.geometry),
            configuration="" if weights else configuration_digest(checkpoint.configuration),
            weights=weights.files if weights else (),
            loras=weights.loras if weights else (),
            build_options=self.recipe(architecture),
            tuning=options.named() if options else (),
        )

    @abstractmethod
    def target(self, options: Any) -> tuple[str, str]:
        """The versions of what reads its engines, and the architecture that they run on, as an identity has them.

        Raises:
            UnavailableError: it can't build or run here.
        """

    def recipe(self, architecture: str) -> tuple[tuple[str, str], ...]:
        """What in this version of the program decides what a build for an architecture makes, name and value."""
        return ()

    def build(self, request: EngineRequest) -> dict[str, Any]:
        """Write an engine; returns what the manifest shall say of it, as plain data.

        Raises:
            InputError: it needs no build, or an option doesn't fit.
            EngineBuildError: a network was refused by a compiler, or doesn't compute what eager computes.
        """
        raise InputError(
            f"backend {self.name} needs no build", advice="type the same command with run instead of build"
        )

    def accept(self, engine: "StoredEngine", checkpoint: "Checkpoint", on_stage: ReportStage) -> None:
        """Compare code of the store with eager if it never was with these weights; most engines hold their own.

        Raises:
            EngineBuildError: it computes something else.
        """
        return None

    @abstractmethod
    def open(self, request: OpenRequest) -> "Networks":
        """The networks of a checkpoint.

        Raises:
            EngineMismatchError: the engine isn't what it seems.
            EngineBuildError: code for any weights computes something else than eager with these.
            RunError: it can't be loaded.
        """


def default_device() -> "torch.device":
    """The CUDA GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checked_device(name: str) -> "torch.device":
    """ "cpu", "cuda" or "cuda:1".

    Raises:
        UnavailableError: it is none, or isn't there.
    """
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UnavailableError(Field("device"), f" is {name!r}", expected='"cpu", "cuda" or "cuda:1"')
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this PyTorch is a CPU build)"
        raise UnavailableError(Field("device"), f" is {name}, and PyTorch finds no CUDA GPU here{built}")
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise UnavailableError(Field("device"), f" is {name}", expected=f"cuda:0 to cuda:{count - 1}")
    return device


def _is_device(asked: "torch.device", own: "torch.device") -> bool:
    """Whether a device is the one that a backend runs on; of a GPU without a number, the current one."""
    import torch

    if asked.type != own.type:
        return False
    return asked.type != "cuda" or asked.index in (None, torch.cuda.current_device())


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    from importlib.metadata import PackageNotFoundError, version  # a tenth of the time that --help takes

    try:
        return version(package)
    except PackageNotFoundError:
        return None
