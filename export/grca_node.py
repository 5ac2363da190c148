"""`storyadapter::grca` in ONNX: a node of our own domain that carries its meaning as a model-local function.

A runtime that has the fused kernel replaces the node; any other one runs the function. The attribute
`plugin_namespace` lets TensorRT's parser find a plugin of that name before it turns to the function.
"""

from onnx import FunctionProto, ModelProto, helper
from onnxscript import FLOAT, INT32, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor
from torch.onnx.ops import symbolic

DOMAIN = "storyadapter"
OP_TYPE = "GlobalReferenceCrossAttention"
OP_VERSION = 1

# Far below every score, yet finite in half precision: a masked key's weight underflows to exactly zero, and a tile of
# nothing but masked keys doesn't make a NaN in a fused attention.
_MASKED = -30000.0


def grca_node(
    q: Tensor, text_kv: Tensor, text_row: Tensor, ref_kv: Tensor, ref_row: Tensor, ref_length: Tensor
) -> Tensor:
    """Stand-in for `storyadapter.model.grca.grca` while a network is exported: becomes a node. Same arguments."""
    return symbolic(
        f"{DOMAIN}::{OP_TYPE}",
        (q, text_kv, text_row, ref_kv, ref_row, ref_length),
        {"plugin_namespace": DOMAIN},
        dtype=q.dtype,
        shape=q.shape,
        version=OP_VERSION,
    )


@script(Opset(DOMAIN, OP_VERSION), default_opset=op)
def GlobalReferenceCrossAttention(  # noqa: N802 (the operator's name in ONNX)
    q: FLOAT, text_kv: FLOAT, text_row: INT32, ref_kv: FLOAT, ref_row: INT32, ref_length: INT32
) -> FLOAT:
    """The operator in standard ONNX operators; q and result [B, S, H, D], see `storyadapter.model.grca.grca`.

    FLOAT stands for any of fp32, fp16 and bf16: a FunctionProto carries no types.
    """
    heads = op.Shape(q, start=2, end=4)
    split_heads = op.Concat(op.Constant(value_ints=[0, 0]), heads, axis=0)  # [B, K, C] -> [B, K, H, D]
    queries = op.Transpose(q, perm=[0, 2, 1, 3])

    text = op.Gather(text_kv, text_row, axis=0)
    text_k, text_v = op.Split(text, axis=1, num_outputs=2)
    text_keys = op.Transpose(op.Reshape(op.Squeeze(text_k, [1]), split_heads), perm=[0, 2, 1, 3])
    text_values = op.Transpose(op.Reshape(op.Squeeze(text_v, [1]), split_heads), perm=[0, 2, 1, 3])
    from_text = op.Attention(queries, text_keys, text_values)

    ref = op.Gather(ref_kv, ref_row, axis=0)
    ref_k, ref_v = op.Split(ref, axis=1, num_outputs=2)
    ref_keys = op.Transpose(op.Reshape(op.Squeeze(ref_k, [1]), split_heads), perm=[0, 2, 1, 3])
    ref_values = op.Transpose(op.Reshape(op.Squeeze(ref_v, [1]), split_heads), perm=[0, 2, 1, 3])
    length = op.Unsqueeze(op.Cast(op.Gather(ref_length, ref_row, axis=0), to=7), [1])  # [B, 1]
    tokens = op.Squeeze(op.Shape(ref_kv, start=2, end=3), [0])
    positions = op.Unsqueeze(op.Range(0, tokens, 1), [0])  # [1, R]
    penalty = op.Where(op.Less(positions, length), 0.0, _MASKED)
    mask = op.Unsqueeze(op.CastLike(penalty, q), [1, 2])  # [B, 1, 1, R]
    # written out: ONNX Runtime's Attention takes no mask that is broadcast over the queries
    root = op.CastLike(op.Sqrt(op.Cast(op.Shape(q, start=3, end=4), to=1)), q)
    scores = op.Add(op.MatMul(op.Div(queries, root), op.Transpose(ref_keys, perm=[0, 1, 3, 2])), mask)
    from_references = op.MatMul(op.Softmax(scores, axis=-1), ref_values)

    return op.Transpose(op.Add(from_text, from_references), perm=[0, 2, 1, 3])


def function_proto() -> FunctionProto:
    """The function that is appended to every model with such a node; its inner nodes carry names."""
    proto = GlobalReferenceCrossAttention.to_function_proto()
    for index, node in enumerate(proto.node):
        node.name = f"{OP_TYPE}/{node.op_type}_{index}"
    return proto


def attach_function(model: ModelProto) -> None:
    """Append the function if a node of the model needs it and it isn't there yet."""
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return
    if not any(function.domain == DOMAIN for function in model.functions):
        model.functions.append(function_proto())
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, OP_VERSION))
