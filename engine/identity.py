"""Everything an engine depends on: its identity, the key made from it, and how two identities differ, in words."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from storyadapter.model.contract import CONTRACT_VERSION, Geometry, ShapeRanges, network_specs
from storyadapter.model.numerics import Numerics

if TYPE_CHECKING:
    from storyadapter.checkpoint import Checkpoint

STORE_VERSION: Final = 6  # of the manifest and the key; raised, it makes every engine built before unknown
_KEY_DIGITS: Final = 32


@dataclass(frozen=True)
class WeightFile:
    """One file of a component ("unet", "vae", …). The name is for messages only: a renamed file is the same file."""

    component: str
    name: str = field(compare=False)
    blake3: str

    def __str__(self) -> str:
        return f"{self.name} (blake3 {self.blake3[:8]})"


@dataclass(frozen=True)
class FusedLora:
    """A LoRA fused at export. As with weights, the name is for messages only."""

    name: str = field(compare=False)
    blake3: str
    scale: float

    def __str__(self) -> str:
        return f"{self.name}:{self.scale:g} (blake3 {self.blake3[:8]})"


@dataclass(frozen=True)
class ModelWeights:
    """Every file that a model is made from, configuration files included, and its LoRAs in the order of fusing."""

    files: tuple[WeightFile, ...]
    loras: tuple[FusedLora, ...]
    remembered: bool = field(default=False, compare=False)  # whether some of it was hashed at another time

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits; equal for equal files, whatever their names, and LoRAs of equal scales."""
        contents, fused = _contents(self.files, self.loras)
        return _digest([sorted(contents), fused])[:_KEY_DIGITS]


@dataclass(frozen=True)
class EngineIdentity:
    """Everything an engine depends on except the shapes it is built for. Compiled code alone depends on no weights.

    Not the versions of diffusers and transformers, whose modules are what is compiled: most of them change nothing, and
    an engine is compared with eager when it is built. `bench parity` compares it again.

    Raises:
        ValueError: a build option is named twice.
    """

    backend: str  # "onnxruntime", "tensorrt", …
    backend_version: str  # of the library that reads the engine
    numerics: Numerics
    architecture: str  # what the engine runs on: "cpu-x86_64-avx2", "sm90-x86_64-avx512", "sm89+sm120", or "any"
    contract: str  # `contract_digest` of the model's geometry
    configuration: str = ""  # `configuration_digest` of the model's networks, where the engine is code for any weights
    # every file whose contents the engine holds, configuration files included; kept sorted and once each, so the order
    # in which they were listed doesn't matter
    weights: tuple[WeightFile, ...] = ()
    # in the order in which they are fused; another order is another engine, as sums round differently
    loras: tuple[FusedLora, ...] = ()
    # what else decides the result, name and value: the opset, the version of the export, …; sorted
    build_options: tuple[tuple[str, str], ...] = ()
    # how the engine was built, where that doesn't change what it computes: part of the key, but nothing that a run asks
    # for; sorted
    tuning: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if len(dict(self.build_options)) != len(self.build_options):
            raise ValueError(f"a build option is named twice in {self.build_options}")
        by_content = {(w.component, w.blake3): w for w in sorted(self.weights, key=lambda w: w.name, reverse=True)}
        object.__setattr__(self, "weights", tuple(by_content[content] for content in sorted(by_content)))
        object.__setattr__(self, "build_options", tuple(sorted(self.build_options)))
        object.__setattr__(self, "tuning", tuple(sorted(self.tuning)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest; `EngineIdentity.from_dict` reads it back."""
        return {
            **asdict(self),
            "numerics": self.numerics.as_dict(),
            "build_options": dict(self.build_options),
            "tuning": dict(self.tuning),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EngineIdentity":
        return cls(
            **{
                **data,
                "numerics": Numerics.from_dict(data["numerics"]),
                "weights": tuple(WeightFile(**weight) for weight in data["weights"]),
                "loras": tuple(FusedLora(**lora) for lora in data["loras"]),
                "build_options": tuple(data["build_options"].items()),
                "tuning": tuple(data["tuning"].items()),
            }
        )

    def serves(self, asked: "EngineIdentity") -> bool:
        """Whether an engine of this identity is one that `asked` asks for, shapes aside."""
        if asked.architecture not in self.architecture.split("+"):
            return False
        return replace(self, architecture=asked.architecture, tuning=()) == replace(asked, tuning=())

    def differences(self, asked: "EngineIdentity") -> list[str]:
        """Each field in which this stored engine's identity isn't the one asked for, in words; empty if it serves.

        The version and the options of a backend are compared only where the backend is the same.
        """
        same_backend = self.backend == asked.backend
        simple = [("backend", self.backend, asked.backend)]
        if same_backend:
            simple.append(("backend version", self.backend_version, asked.backend_version))
        simple.append(("precision", self.numerics.name, asked.numerics.name))
        own, others = self.numerics, asked.numerics
        quantized = (own.quantizations.keys() | others.quantizations.keys()) - {"denoiser"}
        for network in sorted(quantized | dict(own.exceptions).keys() | dict(others.exceptions).keys()):
            words = "VAE precision" if network == "vae_decoder" else f"{network} precision"
            simple.append((words, own.named(network), others.named(network)))
        if asked.architecture not in self.architecture.split("+"):
            simple.append(("architecture", self.architecture, asked.architecture))
        found = [
            f"{words} is {mine} in the store, {theirs} asked for" for words, mine, theirs in simple if mine != theirs
        ]
        if self.contract != asked.contract:
            found.append(
                f"contract is {self.contract[:8]} in the store, {asked.contract[:8]} asked for "
                "(a model of other sizes, or another version of this program)"
            )
        if self.configuration != asked.configuration:
            mine, theirs = (value[:8] or "none" for value in (self.configuration, asked.configuration))
            found.append(f"configuration of the networks is {mine} in the store, {theirs} asked for")
        found += self._weight_differences(asked)
        if self.loras != asked.loras:
            mine, theirs = (", ".join(map(str, identity.loras)) or "none" for identity in (self, asked))
            found.append(f"LoRA is {mine} in the store, {theirs} asked for")
        if same_backend:
            stored_options, asked_options = dict(self.build_options), dict(asked.build_options)
            found += [
                f"{name} is {stored_options.get(name, 'not set')} in the store, "
                f"{asked_options.get(name, 'not set')} asked for"
                for name in sorted(stored_options.keys() | asked_options.keys())
                if stored_options.get(name) != asked_options.get(name)
            ]
        return found

    def _weight_differences(self, asked: "EngineIdentity") -> list[str]:
        """At most one line: with the files where one pair tells all, else the names of the components alone."""
        names = sorted({weight.component for weight in (*self.weights, *asked.weights)})
        by_words: dict[tuple[str, str], list[str]] = {}
        for name in names:
            mine, theirs = ([w for w in identity.weights if w.component == name] for identity in (self, asked))
            if mine != theirs:
                by_words.setdefault((_files(mine, theirs), _files(theirs, mine)), []).append(name)
        components = _join([name for group in by_words.values() for name in group])
        if len(by_words) > 1:
            return [f"the weights of {components} are others in the store than asked for"]
        return [f"{components} weights are {mine} in the store, {theirs} asked for" for mine, theirs in by_words]


def model_weights(
    checkpoint: "Checkpoint", on_bytes: Callable[[int, int], None] | None = None, *, anew: bool = False
) -> ModelWeights:
    """The weights of a checkpoint, by the hashes of its files.

    Args:
        on_bytes: called with (bytes read, bytes to be read) while files are read that were never hashed before.
        anew: read all of them, whatever is remembered.

    Raises:
        CheckpointError: a file can't be read.
    """
    from storyadapter.engine.fingerprint import fingerprint_files

    components = checkpoint.files_by_component
    loras = [lora.path for lora in checkpoint.loras]
    paths = [*(path for paths in components.values() for path in paths), *loras]
    digests, remembered = fingerprint_files(paths, on_bytes, anew=anew)
    return ModelWeights(
        tuple(
            WeightFile(component, path.name, digests[path]) for component, paths in components.items() for path in paths
        ),
        tuple(FusedLora(lora.path.name, digests[lora.path], lora.scale) for lora in checkpoint.loras),
        remembered=bool(remembered),
    )


def contract_digest(geometry: Geometry) -> str:
    """A hash of every input and output of the networks of such a model."""
    networks = {name: asdict(spec) for name, spec in network_specs(geometry).items()}
    # The geometry beside them: the number of heads, for one, is in no shape.
    return _digest([CONTRACT_VERSION, geometry.as_dict(), networks])


def configuration_digest(configuration: Mapping[str, Mapping[str, Any]]) -> str:
    """A hash of the settings of a model's networks, by network."""
    return _digest({name: dict(settings) for name, settings in configuration.items()})


def engine_key(identity: EngineIdentity, ranges: ShapeRanges) -> str:
    """The name of the engine's folder: 32 hexadecimal digits, equal for equal identities and ranges."""
    data = identity.as_dict()
    data["weights"], data["loras"] = _contents(identity.weights, identity.loras)
    return _digest([STORE_VERSION, data, ranges.as_dict()])[:_KEY_DIGITS]


def _contents(files: tuple[WeightFile, ...], loras: tuple[FusedLora, ...]) -> tuple[list[Any], list[Any]]:
    # -0.0 equals 0.0 and 1 equals 1.0, so they are written alike
    fused = [[lora.blake3, float(lora.scale) + 0.0] for lora in loras]
    return [[weight.component, weight.blake3] for weight in files], fused


def _digest(data: Any) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _files(files: list[WeightFile], others: list[WeightFile]) -> str:
    """Those of `files` that aren't among `others`."""
    own = [file for file in files if file not in others]
    if not files:
        return "none"
    if not own:
        return f"without {_first([file for file in others if file not in files])}"
    return _first(own)


def _first(files: list[WeightFile]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _join(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""
