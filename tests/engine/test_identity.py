"""An engine's key changes with everything the engine depends on, and with nothing else."""

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storyadapter.engine.identity import EngineIdentity, FusedLora, WeightFile, contract_digest, engine_key
from storyadapter.model.contract import Geometry, LayerWidth, Range, ShapeRanges
from storyadapter.model.numerics import PRECISIONS, Numerics
from tests.engine.engine_requests import TEXT, UNET, VAE, digest, identity, ranges

texts = st.text(max_size=8)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
weight_files = st.builds(
    WeightFile, component=st.sampled_from(["unet", "vae", "ip_adapter"]), name=texts, blake3=digests
)
lora_files = st.builds(FusedLora, name=texts, blake3=digests, scale=st.floats(-2, 2))
identities = st.builds(
    EngineIdentity,
    backend=texts,
    backend_version=texts,
    numerics=st.builds(Numerics.of, st.sampled_from(PRECISIONS), vae_decoder=st.sampled_from(PRECISIONS)),
    architecture=texts,
    contract=digests,
    configuration=st.just("") | digests,
    weights=st.lists(weight_files, max_size=4).map(tuple),
    loras=st.lists(lora_files, max_size=3).map(tuple),
    build_options=st.dictionaries(texts, texts, max_size=3).map(lambda options: tuple(options.items())),
)
pixels = st.integers(1, 8).flatmap(
    lambda low: st.integers(low, 8).map(lambda high: Range(32 * low, 32 * high)),
)
shape_ranges = st.builds(
    ShapeRanges, max_frames=st.integers(1, 9), max_references=st.integers(1, 9), height=pixels, width=pixels
)


@given(st.data(), identities, shape_ranges)
def test_any_changed_field_gives_another_key(data: st.DataObject, stored: EngineIdentity, shapes: ShapeRanges) -> None:
    donor, other_shapes = data.draw(identities), data.draw(shape_ranges)
    for field in fields(EngineIdentity):
        changed = replace(stored, **{field.name: getattr(donor, field.name)})
        assert (engine_key(changed, shapes) == engine_key(stored, shapes)) == (changed == stored)
        assert bool(stored.differences(changed)) == (changed != stored)
    for field in fields(ShapeRanges):
        resized = replace(shapes, **{field.name: getattr(other_shapes, field.name)})
        assert (engine_key(stored, resized) == engine_key(stored, shapes)) == (resized == shapes)


@given(st.data(), identities, shape_ranges)
def test_neither_the_order_of_files_nor_their_names_matter(
    data: st.DataObject, stored: EngineIdentity, shapes: ShapeRanges
) -> None:
    shuffled = replace(
        stored,
        weights=tuple(replace(w, name=w.name + "x") for w in data.draw(st.permutations(stored.weights))),
        loras=tuple(replace(lora, name="moved.safetensors") for lora in stored.loras),
        build_options=tuple(data.draw(st.permutations(stored.build_options))),
    )
    assert shuffled == stored
    assert hash(shuffled) == hash(stored)
    assert shuffled.differences(stored) == []
    assert engine_key(shuffled, shapes) == engine_key(stored, shapes)


@given(identities, shape_ranges)
def test_a_manifest_gives_back_the_identity_and_the_key(stored: EngineIdentity, shapes: ShapeRanges) -> None:
    read = EngineIdentity.from_dict(json.loads(json.dumps(stored.as_dict())))
    read_shapes = ShapeRanges.from_dict(json.loads(json.dumps(shapes.as_dict())))
    assert (asdict(read), read_shapes) == (asdict(stored), shapes)
    assert engine_key(read, read_shapes) == engine_key(stored, shapes)


def test_the_key_is_the_same_in_every_process_and_release() -> None:
    """A changed constant here means that every engine ever built is built again: raise STORE_VERSION with it."""
    assert engine_key(identity(), ranges()) == "b5e6e769524d48fbf4507b7ba2c65645"
    assert engine_key(identity(loras=(FusedLora("a", digest("d"), 1),)), ranges()) == engine_key(
        identity(loras=(FusedLora("a", digest("d"), 1.0),)), ranges()
    )


def test_every_field_that_differs_is_told_by_name() -> None:
    asked = identity(backend_version="1.25.0", precision="fp32", vae_precision="fp16", architecture="any")
    assert identity().differences(asked) == [
        "backend version is 1.24.1 in the store, 1.25.0 asked for",
        "precision is fp16 in the store, fp32 asked for",
        "VAE precision is fp32 in the store, fp16 asked for",
        "architecture is cpu-x86_64 in the store, any asked for",
    ]
    assert not identity().serves(identity(vae_precision="bf16"))


def test_loras_in_another_order_are_another_engine() -> None:
    first, second = FusedLora("a", digest("1"), 1.0), FusedLora("b", digest("2"), 1.0)
    assert engine_key(identity(loras=(first, second)), ranges()) != engine_key(
        identity(loras=(second, first)), ranges()
    )


def test_a_component_swapped_with_another_is_another_engine() -> None:
    swapped = (replace(UNET, blake3=VAE.blake3), replace(VAE, blake3=UNET.blake3), TEXT)
    assert engine_key(identity(weights=swapped), ranges()) != engine_key(identity(), ranges())


def test_a_build_option_is_named_once() -> None:
    with pytest.raises(ValueError, match="named twice"):
        identity(build_options=(("opset", "18"), ("opset", "23")))


GEOMETRY = Geometry(
    widths=(LayerWidth(64, 2, 2), LayerWidth(128, 3, 4)),
    time_embedding=128,
    text_width=32,
    text_width_2=64,
    pooled_width=64,
    image_embedding_width=48,
    sample_size=16,
)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": (LayerWidth(64, 2, 2), LayerWidth(128, 3, 2))},  # heads alone: in no network's shapes
        {"widths": (LayerWidth(64, 3, 2), LayerWidth(128, 3, 4))},
        {"time_embedding": 256},
        {"text_width": 64},
        {"image_embedding_width": 64},
        {"pixels_per_latent": 4},
        {"vae_in_fp32": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_contract_changes_with_the_models_sizes(change: dict[str, Any]) -> None:
    assert contract_digest(replace(GEOMETRY)) == contract_digest(GEOMETRY)
    assert contract_digest(replace(GEOMETRY, **change)) != contract_digest(GEOMETRY)


def test_an_engine_for_two_architectures_serves_each_and_no_third() -> None:
    both = identity(architecture="sm89+sm120")
    for architecture in ("sm89", "sm120"):
        assert both.serves(identity(architecture=architecture))
        assert both.differences(identity(architecture=architecture)) == []
    assert not both.serves(identity(architecture="sm12"))
    assert both.differences(identity(architecture="sm90")) == [
        "architecture is sm89+sm120 in the store, sm90 asked for"
    ]
    assert not identity(architecture="sm89").serves(identity(architecture="sm89+sm120"))


def test_tuning_is_in_the_key_but_a_run_does_not_ask_for_it() -> None:
    tuned = identity(tuning=(("workspace MiB", "64"), ("optimization level", "5")))
    assert engine_key(tuned, ranges()) != engine_key(identity(), ranges())
    assert tuned.tuning == (("optimization level", "5"), ("workspace MiB", "64"))
    assert tuned.serves(identity()) and identity().serves(tuned)
    assert tuned.differences(identity()) == []
    assert EngineIdentity.from_dict(tuned.as_dict()) == tuned
    assert not tuned.serves(identity(precision="bf16"))
