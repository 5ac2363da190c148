"""Which TensorRT there is, and which one serves a target. Loads nothing until it is asked to.

`tensorrt` builds for the GPU that is present and embeds the fused kernel as a plugin. `tensorrt_rtx` builds for several
RTX architectures at once, on any machine, and knows no plugins. A target is a compute capability written "sm89".
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from storyadapter.engine.backend import installed_version
from storyadapter.method.errors import Field, InputError, UnavailableError
from storyadapter.model.numerics import NumberFormat

AUTO: Final = "auto"
RTX_TARGETS: Final = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
# for sm75, TensorRT-RTX multiplies int8 matrices, but leaves convolutions in fp16
MULTIPLIED_FROM: Final[Mapping[NumberFormat, str]] = {"fp8": "sm89", "int8": "sm80"}
OLDEST: Final = {"tensorrt": (10, 14), "tensorrt-rtx": (1, 7)}  # the first whose ONNX parser knows Attention


@dataclass(frozen=True)
class Library:
    """One installed TensorRT: `distribution` as pip knows it, its version, and the module to import."""

    distribution: str
    version: str

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")

    @property
    def has_plugins(self) -> bool:
        return self.distribution == "tensorrt"

    @property
    def has_levels(self) -> bool:
        """Whether the builder's optimization level decides what it builds: TensorRT-RTX chooses kernels at run time."""
        return self.distribution == "tensorrt"

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def installed_libraries() -> tuple[Library, ...]:
    """`tensorrt` first; each only if it is installed, whatever its version."""
    return tuple(Library(name, version) for name in OLDEST if (version := installed_version(name)))


def gpu_target() -> str | None:
    """The target of this machine's GPU, or None without one that PyTorch can use."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def multiplies(number_format: NumberFormat, target: str) -> bool:
    """Whether GPUs of a target multiply such numbers."""
    return int(target[2:]) >= int(MULTIPLIED_FROM[number_format][2:])


def parse_targets(text: str) -> tuple[str, ...]:
    """ "auto" → (); "sm89,sm120" → ("sm89", "sm120"), sorted and once each. Raises InputError: anything else."""
    if text == AUTO:
        return ()
    targets = [part.strip() for part in text.split(",")]
    for target in targets:
        if not re.fullmatch(r"sm\d{2,3}", target):
            expected = "auto, or architectures such as sm89 or sm89,sm120"
            raise InputError(Field("target"), f" is {text!r}", expected=expected)
    return tuple(sorted(set(targets), key=lambda target: int(target[2:])))


def choose_library(
    targets: tuple[str, ...], present: str | None, libraries: tuple[Library, ...] | None = None
) -> tuple[Library, tuple[str, ...]]:
    """The library that builds for these targets, and the targets, `auto` resolved.

    Args:
        targets: as `parse_targets` gives them; empty is this machine's GPU.
        present: `gpu_target()`.
        libraries: to choose from, by default those that are installed.

    Raises:
        UnavailableError: no library that is here serves all the targets; the text says which would.
    """
    libraries = installed_libraries() if libraries is None else libraries
    if not targets and present is None:
        raise UnavailableError(
            "backend tensorrt: there is no GPU here that PyTorch can use",
            advice=("run needs one, and build needs to know for which one, such as ", Field("target"), " sm89"),
        )
    targets = targets or (str(present),)
    reasons = []
    for library in libraries:
        if reason := _why_not(library, targets, present):
            reasons.append(f"{library} {reason}")
        else:
            return library, targets
    rtx = all(target in RTX_TARGETS for target in targets)
    how = f"pip install 'storyadapter-trt[{'tensorrt-rtx' if rtx else 'tensorrt'}]'"
    raise UnavailableError(
        f"backend tensorrt can't serve {', '.join(targets)} here: "
        f"{'; '.join(reasons) or 'neither tensorrt nor tensorrt-rtx is installed'}; type: {how}"
        + ("" if rtx else f", on a machine with that GPU (tensorrt-rtx builds for {', '.join(RTX_TARGETS)} anywhere)")
    )


def why_it_cant_run(present: str | None) -> str | None:
    """Why no TensorRT that is installed runs engines on this machine; None if one does."""
    if present is None:
        return "it builds here but can't run: there is no GPU that PyTorch can use"
    try:
        choose_library((), present)
    except UnavailableError as error:
        return str(error).removeprefix("backend tensorrt ")
    return None


def describe_libraries(present: str | None, libraries: tuple[Library, ...] | None = None) -> list[str]:
    """For each TensorRT that is installed: whether it runs on this machine's GPU, and whether it embeds the kernel."""
    lines = []
    for library in installed_libraries() if libraries is None else libraries:
        runs = f"runs on this GPU ({present})" if present else "can't run here (no GPU)"
        if present and (reason := _why_not(library, (present,), present)):
            runs = f"can't run on this GPU ({present}): it {reason}"
        builds = "builds for this GPU only" if library.has_plugins else f"builds for {', '.join(RTX_TARGETS)} anywhere"
        kernel = (
            "embeds the fused attention kernel" if library.has_plugins else "knows no plugins: attention is its own"
        )
        lines.append(f"{library}: {runs}; {builds}; {kernel}")
    return lines or ["none installed"]


def _why_not(library: Library, targets: tuple[str, ...], present: str | None) -> str | None:
    oldest = OLDEST[library.distribution]
    if tuple(int(part) for part in re.findall(r"\d+", library.version)[:2]) < oldest:
        return f"is too old, expected {oldest[0]}.{oldest[1]} or later"
    if library.has_plugins:
        return None if targets == (present,) else f"builds only for the GPU that is present ({present or 'none'})"
    unknown = [target for target in targets if target not in RTX_TARGETS]
    return f"builds for {', '.join(RTX_TARGETS)} only" if unknown else None
