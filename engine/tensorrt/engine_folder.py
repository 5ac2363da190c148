"""What a session must know of the engines in one folder: written by the builder, beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from storyadapter.engine.tensorrt.library import installed_libraries
from storyadapter.method.errors import EngineMismatchError
from storyadapter.model.contract import Range

# The contract's dtypes as TensorRT names them.
TENSORRT_NAMES: Final = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
_NAME: Final = "engines.json"


def engine_name(network: str) -> str:
    return f"{network}.engine"


@dataclass(frozen=True)
class EngineFolder:
    """The builder's description of the engines in one folder."""

    folder: Path
    module: str  # of the TensorRT that built them, "tensorrt" or "tensorrt_rtx"
    version: str  # of that
    targets: tuple[str, ...]  # architectures that they run on
    plugin: bool  # whether the denoiser holds the fused kernel
    # by network, the ranges of its letters in each optimization profile; the first holds all others
    profiles: Mapping[str, tuple[Mapping[str, Range], ...]]

    def write(self) -> None:
        """Write the description into the folder."""
        profiles = {
            name: [{letter: [r.minimum, r.maximum] for letter, r in ranges.items()} for ranges in found]
            for name, found in self.profiles.items()
        }
        data = {
            "module": self.module,
            "version": self.version,
            "targets": self.targets,
            "plugin": self.plugin,
            "profiles": profiles,
        }
        (self.folder / _NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "EngineFolder":
        data = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        profiles = {
            name: tuple({letter: Range(*bounds) for letter, bounds in ranges.items()} for ranges in found)
            for name, found in data["profiles"].items()
        }
        return cls(folder, data["module"], data["version"], tuple(data["targets"]), data["plugin"], profiles)

    def load_module(self) -> ModuleType:
        """Import the TensorRT that built these engines.

        Raises:
            EngineMismatchError: another version is installed, or none.
        """
        for library in installed_libraries():
            if library.module == self.module and library.version == self.version:
                return library.load()
        installed = ", ".join(map(str, installed_libraries())) or "none"
        raise EngineMismatchError(
            f"{self.folder} was built by {self.module} {self.version}; installed: {installed}; "
            "build it again with the same options, or install that version"
        )

    def profile_for(self, network: str, values: Mapping[str, int]) -> int:
        """The optimization profile for these values: one made for exactly this size if there is one."""
        profiles = self.profiles[network]
        for index in range(len(profiles) - 1, 0, -1):
            if all(values[letter] in allowed for letter, allowed in profiles[index].items()):
                return index
        return 0
