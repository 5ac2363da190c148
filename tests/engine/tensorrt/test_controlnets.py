"""ControlNets built with TensorRT-RTX, without a GPU: their networks, and the denoiser that takes what they give."""

from pathlib import Path

import pytest
import torch

from storyadapter.bench.synthetic import TOY, SyntheticCheckpoint
from storyadapter.engine.tensorrt.builder import build_request, profiles_of, run_worker
from storyadapter.engine.tensorrt.library import Library
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.export.onnx_export import export_network
from storyadapter.model.contract import network_specs, size_of
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics
from tests.engine.tensorrt.building import LETTERS, bound_tensors, built_size

pytest.importorskip("tensorrt_rtx")

NAMES = ("control_embedding_0", "control_projection_0", "controlnet_0", "denoiser")


def test_they_are_built_with_the_contracts_inputs_and_outputs(rtx: Library, tmp_path: Path) -> None:
    checkpoint = SyntheticCheckpoint(TOY, torch.device("cpu"), controlnets=1)
    specs = network_specs(checkpoint.geometry)
    for name, module in iterate_modules(checkpoint, Numerics("fp16"), grca, only=NAMES):
        spec = specs[name]
        path = export_network(spec, module, LETTERS, "fp16", tmp_path)
        request = build_request(spec, path, tmp_path, LETTERS, "fp16", rtx, ("sm89",), BuildOptions(), ((8, 12),))
        run_worker(name, request, lambda fraction: None)
        found = {tensor.name: tensor for tensor in bound_tensors(Path(request.layers).read_text())}
        assert found.keys() == {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        for tensor in (*spec.inputs, *spec.outputs):
            seen = found[tensor.name]
            assert seen.shape == tuple(map(built_size, tensor.shape))
            if not seen.is_input:
                continue
            for (least, _, most), letters in zip(seen.profiles, profiles_of(spec, LETTERS, ((8, 12),)), strict=True):
                for bound, shape in (("minimum", least), ("maximum", most)):
                    values = {letter: getattr(allowed, bound) for letter, allowed in letters.items()}
                    assert shape == tuple(size_of(dim, values) for dim in tensor.shape)
