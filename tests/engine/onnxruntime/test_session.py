"""Errors of ONNX Runtime, as the program tells them."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from storyadapter.engine.onnxruntime.networks import as_memory_error


def zeros() -> onnxruntime.InferenceSession:
    """A session that makes zeros of the shape that it is given."""
    node = helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [None])
    graph = helper.make_graph([node], "zeros", [shape], [helper.make_tensor_value_info("zeros", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString())


def test_no_memory_is_a_memory_error() -> None:
    session, too_many = zeros(), {"shape": np.array([1 << 24, 1 << 24], np.int64)}
    with pytest.raises(MemoryError, match="Failed to allocate memory"), as_memory_error():
        session.run(None, too_many)


def test_another_error_stays_what_it_is() -> None:
    session, negative = zeros(), {"shape": np.array([-2], np.int64)}
    with pytest.raises(Exception) as caught, as_memory_error():  # noqa: B017, PT011 (the library's are no closer)
        session.run(None, negative)
    assert not isinstance(caught.value, MemoryError)
