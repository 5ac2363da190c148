"""A user's model files: found, checked from their headers before anything slow is done, and loaded.

Imports nothing heavy; PyTorch, diffusers and transformers are imported when a checkpoint is opened.
"""

from storyadapter.checkpoint.checkpoint import Checkpoint
from storyadapter.checkpoint.controlnets import ControlNetSpec
from storyadapter.checkpoint.ip_adapter import AdapterLayer, IPAdapterWeights
from storyadapter.checkpoint.paths import CheckpointPaths, LoraSpec

__all__ = ["AdapterLayer", "Checkpoint", "CheckpointPaths", "ControlNetSpec", "IPAdapterWeights", "LoraSpec"]
