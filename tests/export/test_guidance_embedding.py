"""The denoiser of a UNet that takes the guidance as an embedding, exported with every letter free."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from storyadapter.checkpoint import Checkpoint
from storyadapter.export.onnx_export import export_compared
from storyadapter.model.contract import Range, ShapeRanges, network_specs
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics
from tests.storyadapter.checkpoint.spoil import tiny_paths

WIDTH = 16


def test_it_computes_what_eager_computes(tiny_model_dir: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = checkpoint.load("unet", torch.float32)
    unet = UNet2DConditionModel.from_config(plain.config, time_cond_proj_dim=WIDTH)
    unet.load_state_dict(plain.state_dict(), strict=False)
    unet.save_pretrained(tmp_path / "unet")
    opened = Checkpoint.open(tiny_paths(tiny_model_dir, unet=tmp_path / "unet"))
    spec = network_specs(opened.geometry)["denoiser"]
    assert [(tensor.name, tensor.shape) for tensor in spec.inputs[2:4]] == [
        ("added_embedding", ("B", opened.geometry.time_embedding)),
        ("time_condition", ("B", WIDTH)),
    ]
    ((_, module),) = iterate_modules(opened, Numerics("fp32"), grca, only=("denoiser",))
    letters = ShapeRanges(4, 6, Range(64, 96), Range(64, 64)).letters()
    _, error = export_compared(spec, module, letters, "fp32", tmp_path)
    assert 0 < error < 1e-5
