"""Whose numbers a model's are: the hashes of its files, and of the LoRAs that are fused into it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.fingerprint import fingerprint_files
from storyadapter.engine.identity import FusedLora, WeightFile, weights_key


@dataclass(frozen=True)
class ModelWeights:
    """Every file that a model is made from, configuration files included, and its LoRAs in the order of fusing."""

    files: tuple[WeightFile, ...]
    loras: tuple[FusedLora, ...]

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits; equal for equal files, whatever their names, and LoRAs of equal scales."""
        return weights_key(self.files, self.loras)


def model_weights(checkpoint: Checkpoint, on_bytes: Callable[[int, int], None] | None = None) -> ModelWeights:
    """The weights of a checkpoint.

    Args:
        on_bytes: called with (bytes read, bytes to be read) while files are read that were never hashed before.

    Raises:
        CheckpointError: a file can't be read.
    """
    components = checkpoint.files_by_component
    loras = [lora.path for lora in checkpoint.loras]
    digests = fingerprint_files([*(path for paths in components.values() for path in paths), *loras], on_bytes)
    return ModelWeights(
        tuple(
            WeightFile(component, path.name, digests[path]) for component, paths in components.items() for path in paths
        ),
        tuple(FusedLora(lora.path.name, digests[lora.path], lora.scale) for lora in checkpoint.loras),
    )
