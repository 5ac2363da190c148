"""The full-size build's report, without the build."""

from storyadapter.bench.tensorrt_build import REFERENCES, SELF, TEXT, Measured, fused_by_kind, write_report
from storyadapter.engine.tensorrt.library import Library
from storyadapter.engine.tensorrt.worker import BuildReport, Layer
from storyadapter.model.contract import Range, ShapeRanges

GRCA = "GlobalReferenceCrossAttention"
LAYERS = (
    Layer("_gemm_mha_v2_myl0_1", "kgen", ("node_scaled_dot_product_attention",)),
    Layer("_gemm_mha_v2_myl0_2", "kgen", (f"{GRCA}/Attention_14 | node__symbolic ({GRCA})",)),
    Layer("_gemm_mha_v2_myl0_3", "kgen", (f"{GRCA}/MatMul_55 | node__symbolic ({GRCA})",)),
    Layer("_gemm_mha_v2_myl0_4", "kgen", (f"{GRCA}/MatMul_55 | node__symbolic_1 ({GRCA})",)),
    Layer("node_linear_1_myl0_5", "gemm", ("node_linear_1",)),
)


def test_fused_attentions_are_counted_by_kind() -> None:
    assert fused_by_kind(LAYERS) == {SELF: 1, TEXT: 1, REFERENCES: 2}
    assert fused_by_kind(LAYERS[-1:]) == {SELF: 0, TEXT: 0, REFERENCES: 0}


def test_the_report_says_what_was_measured() -> None:
    library = Library("tensorrt-rtx", "1.7.1")
    pixels = Range(1024, 1024)
    report = BuildReport(172.4, 2.1, 15 << 30, 4 << 30, 5, 4, 131.6)
    measured = Measured(
        library, ("sm89",), "fp16", ShapeRanges(8, 100, pixels, pixels), 310, 11 << 30, 2.1e-3, report, LAYERS
    )
    text = write_report(measured, "the command")
    for line in (
        "Command: `the command`",
        "| ranges | B 1..16, P 1..16, G 1..17, R 1..400, h 128, w 128 |",
        "| export to ONNX and comparison with eager | 310 s, peak memory 11.0 GiB, relative error 2.1e-03 |",
        "| parse and build | 172 s, of which parse 2 s; peak memory 15.0 GiB |",
        "| engine | 4.00 GiB for 1 architectures |",
        "| layers | 5: 4 kgen, 1 gemm |",
        "| self-attention | 1 of 70 |",
        "| reference attention | 2 of 70 |",
    ):
        assert line in text.splitlines()
