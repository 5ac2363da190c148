"""Numerics with quantized products: their name, and as plain data and back."""

import json
from dataclasses import replace

from storyadapter.model.numerics import Numerics, Quantization, vae_arithmetic

QUANTIZED = Numerics.of("fp16", Quantization("fp8", "0123"), vae_decoder="fp32")


def test_a_quantized_denoiser_gives_the_name() -> None:
    assert (str(QUANTIZED), QUANTIZED.name, QUANTIZED["denoiser"]) == ("fp8 (VAE fp32)", "fp8", "fp16")
    plain = replace(QUANTIZED, quantization=None)
    assert (str(plain), plain.name) == ("fp16 (VAE fp32)", "fp16")
    assert plain == Numerics.of("fp16", vae_decoder="fp32") != QUANTIZED


def test_numerics_are_read_back() -> None:
    for numerics in (QUANTIZED, Numerics("bf16"), Numerics.of("fp32", Quantization("fp8"))):
        assert Numerics.from_dict(json.loads(json.dumps(numerics.as_dict()))) == numerics
    for numerics in (
        Numerics.of("fp16", vae_decoder=Quantization("fp8", "0123")),
        Numerics.of("bf16", Quantization("int8"), vae_decoder=Quantization("fp8")),
    ):
        assert Numerics.from_dict(json.loads(json.dumps(numerics.as_dict()))) == numerics
    assert Numerics("bf16").as_dict() == {"precision": "bf16"}  # as in manifests of before


def test_a_quantized_vae_is_in_bf16_beside_its_products_and_named_by_its_format() -> None:
    for precision, of_denoiser, text in (
        ("fp16", None, "fp16 (VAE fp8)"),
        ("bf16", None, "bf16 (VAE fp8)"),
        ("fp16", Quantization("fp8"), "fp8 (VAE fp8)"),
    ):
        numerics = Numerics.of(precision, of_denoiser, vae_decoder=Quantization("fp8", "0123"))
        assert (str(numerics), numerics["vae_decoder"], numerics.named("vae_decoder")) == (text, "bf16", "fp8")
        assert numerics["denoiser"] == precision and numerics.named("text_encoder") == precision
        assert numerics.tolerance("vae_decoder") > numerics.tolerance("image_encoder")
        keyed = numerics.with_scales({"vae_decoder": "other", "denoiser": "third"})
        assert keyed.quantizations["vae_decoder"].scales == "other"
        assert ("denoiser" in keyed.quantizations) == (of_denoiser is not None)
        assert keyed.with_scales({}).quantizations["vae_decoder"].scales == ""
    plain = Numerics.of("fp16", vae_decoder="bf16")
    assert "vae_quantization" not in plain.as_values() and plain.as_values() == {
        "precision": "fp16",
        "exceptions": (("vae_decoder", "bf16"),),
        "quantization": None,
    }
    assert Numerics.of("fp16", vae_decoder=Quantization("fp8")).as_values() != plain.as_values()


def test_what_is_asked_for_of_the_vae() -> None:
    assert [vae_arithmetic(name) for name in ("auto", "fp32", "bf16", "fp8", "int8")] == [
        None,
        "fp32",
        "bf16",
        Quantization("fp8"),
        None,
    ]
