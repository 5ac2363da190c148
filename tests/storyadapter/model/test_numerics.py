"""Numerics with quantized products: their name, and as plain data and back."""

import json
from dataclasses import replace

from storyadapter.model.numerics import Numerics, Quantization

QUANTIZED = Numerics.of("fp16", Quantization("fp8", "0123"), vae_decoder="fp32")


def test_a_quantized_denoiser_gives_the_name() -> None:
    assert (str(QUANTIZED), QUANTIZED.name, QUANTIZED["denoiser"]) == ("fp8 (VAE fp32)", "fp8", "fp16")
    plain = replace(QUANTIZED, quantization=None)
    assert (str(plain), plain.name) == ("fp16 (VAE fp32)", "fp16")
    assert plain == Numerics.of("fp16", vae_decoder="fp32") != QUANTIZED


def test_numerics_are_read_back() -> None:
    for numerics in (QUANTIZED, Numerics("bf16"), Numerics.of("fp32", Quantization("fp8"))):
        assert Numerics.from_dict(json.loads(json.dumps(numerics.as_dict()))) == numerics
    assert Numerics("bf16").as_dict() == {"precision": "bf16"}  # as in manifests of before
