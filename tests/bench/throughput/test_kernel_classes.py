"""Kernels by class, on names that PyTorch, its libraries and Triton give them."""

import pytest

from storyadapter.bench.throughput.kernel_classes import NAMES, class_of, summarize


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grca_kernel", "grca"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "self-attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "self-attention"),
        ("fmha_cutlassF_f16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)", "self-attention"),
        ("nvjet_hsh_192x192_64x4_1x2_h_bz_coopB_bias_TNN", "matrix products"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matrix products"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<int>>", "matrix products"),
        ("geglu_kernel", "matrix products"),
        ("product_fp8_kernel_3", "fp8 products"),
        ("group_norm_moments_kernel", "norms"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x256x64", "convolutions"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half>", "convolutions"),
        ("triton_red_fused__to_copy_native_layer_norm_11", "norms"),
        ("triton_per_fused_native_group_norm_silu_3", "norms"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::Half>", "norms"),
        ("add_layer_norm_kernel", "norms"),
        ("triton_poi_fused_add_gelu_mul_split_5", "elementwise"),
        ("triton_poi_fused_add_convolution_silu_7", "elementwise"),
        ("triton_tem_fused_addmm_3", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<c10::Half>>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("void at::native::reduce_kernel<512, 1>", "other"),
    ],
)
def test_class_of_a_kernel(name: str, expected: str) -> None:
    assert class_of(name) == expected


def test_the_sum_is_that_of_all_launches() -> None:
    found = summarize([("grca_kernel", 1.0), ("grca_kernel", 2.0), ("gemm", 4.0), ("unheard of", 8.0)], slowest=2)
    assert tuple(found.milliseconds) == NAMES
    assert {name: value for name, value in found.milliseconds.items() if value} == {
        "grca": 3.0,
        "matrix products": 4.0,
        "other": 8.0,
    }
    assert found.total == 15.0 and found.kernels == 4
    assert found.slowest == (("unheard of", "other", 8.0), ("gemm", "matrix products", 4.0))
