"""Numerics with quantized products: their name, as plain data and back, and the keys of what is drawn with them."""

import json
from dataclasses import replace

from storyadapter.method.plan import SamplerSettings
from storyadapter.model.numerics import Numerics, Quantization
from storyadapter.runtime.jobs import FrameJob

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


def test_frames_are_keyed_by_their_scales() -> None:
    job = FrameJob(
        "model", Numerics("fp16"), 64, 64, "a fox", None, None, SamplerSettings("ddim", 2, False, "x", False), 7
    )
    quantized = [replace(job, numerics=Numerics.of("fp16", Quantization("fp8", key))) for key in ("0", "1")]
    assert len({job.key, *(one.key for one in quantized)}) == 3
    # fixed when there was no quantization yet: frames that were drawn then are found again
    assert job.key == "8ccce7130016d241e12da16d11437825b2b937b51523ecb36c65df7c71b431cf"
