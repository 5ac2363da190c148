"""Why a network of a checkpoint may have given values that aren't finite: what its files say, and what can help."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from storyadapter.checkpoint.tensor_files import read_tensors
from storyadapter.method.errors import Field, Text
from storyadapter.model.numerics import DTYPE_NAMES, Precision, finer_precision

if TYPE_CHECKING:
    from torch import Tensor

    from storyadapter.checkpoint.checkpoint import Checkpoint

_WITH_LORAS: Final = ("unet", "text_encoder", "text_encoder_2")


def explain_not_finite(checkpoint: "Checkpoint", network: str, precision: Precision) -> tuple[Text, Text]:
    """What the weights say of a network's values that aren't finite in this precision, and what can help; reads all of
    them once.

    Raises:
        CheckpointError: a file can't be read any more.
    """
    import torch

    from storyadapter.model.modules import model_parts

    parts = {name: part for part, names in model_parts(checkpoint.geometry).items() for name in names}
    part = (parts | {"reference_projection": "ip_adapter"})[network]
    dtype = getattr(torch, DTYPE_NAMES[precision])
    loras = checkpoint.loras if part in _WITH_LORAS else ()
    for lora in loras:
        if name := _first_not_finite(read_tensors(lora.path).items()):
            return f": so is {name} in {lora.path}", ("leave this ", Field("lora"), " out")
    finer, large = finer_precision(network, precision), None
    for path, prefix in checkpoint.weight_files(part):
        tensors = {name: t for name, t in read_tensors(path).items() if name.startswith(prefix)}
        if name := _first_not_finite(tensors.items()):
            return f": so is {name} in {path}", "the file is damaged, fetch it again"
        if name := _first_not_finite((name, tensor.to(dtype)) for name, tensor in tensors.items()):
            large = large or f": {name} in {path} is beyond the range of {precision}"
    if large:
        return large, finer
    found = ", though its weights are"
    if finer:
        return found, finer
    return found, ("try a smaller scale of ", Field("lora")) if loras else ""


def _first_not_finite(tensors: "Iterable[tuple[str, Tensor]]") -> str | None:
    return next((name for name, t in tensors if t.is_floating_point() and not bool(t.isfinite().all())), None)
