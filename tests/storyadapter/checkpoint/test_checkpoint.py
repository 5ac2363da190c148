"""A diffusers folder in all the forms it comes in, and everything that can be wrong with one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from storyadapter.checkpoint import Checkpoint, CheckpointPaths
from storyadapter.method.errors import CheckpointError
from storyadapter.model.contract import Geometry, LayerWidth
from storyadapter.model.grca import grca
from storyadapter.model.modules import iterate_modules
from storyadapter.model.numerics import Numerics
from tests.storyadapter.checkpoint.spoil import cut_short, edit_config, edit_tensors, refuses, tiny_paths

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
WEIGHTS = {name: f"{'diffusion_pytorch_model' if name in ('unet', 'vae') else 'model'}" for name in NETWORKS}
PICKLES = {name: stem if name in ("unet", "vae") else "pytorch_model" for name, stem in WEIGHTS.items()}


def load(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return checkpoint.load(name, dtype)


def assert_same(checkpoint: Checkpoint, other: Checkpoint) -> None:
    for name in NETWORKS:
        state, expected = load(checkpoint, name).state_dict(), load(other, name).state_dict()
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), f"{name}.{key}"


def rewrite(folder: Path, name: str, form: str) -> None:
    """Turn a network's weights into another of the forms that folders on the hub have."""
    file = folder / name / f"{WEIGHTS[name]}.safetensors"
    tensors = load_file(file)
    file.unlink()
    if form == "bin":
        torch.save(tensors, folder / name / f"{PICKLES[name]}.bin")
    elif form == "variant":
        save_file(tensors, folder / name / f"{WEIGHTS[name]}.fp16.safetensors")
    else:
        shards = [dict(list(tensors.items())[i::3]) for i in range(3)]
        files = [f"{WEIGHTS[name]}-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
        for shard, shard_file in zip(shards, files, strict=True):
            save_file(shard, folder / name / shard_file)
        weight_map = {key: shard_file for shard, shard_file in zip(shards, files, strict=True) for key in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / name / f"{WEIGHTS[name]}.safetensors.index.json").write_text(json.dumps(index))


def test_geometry(tiny_checkpoint: Checkpoint) -> None:
    assert tiny_checkpoint.geometry == Geometry(
        widths=(LayerWidth(32, 3, 1), LayerWidth(64, 4, 2)),
        time_embedding=128,
        text_width=32,
        text_width_2=32,
        pooled_width=32,
        image_embedding_width=32,
        sample_size=8,
        vae_in_fp32=False,
    )


def test_networks_are_those_of_the_libraries(tiny_checkpoint: Checkpoint, tiny_model_dir: Path) -> None:
    """The libraries' own loaders, given the same folder, compute the same numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    classes = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
    tokens, pixels = torch.arange(77)[None], torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    for name, model_class in zip(NETWORKS, (*classes, CLIPVisionModelWithProjection), strict=True):
        network = load(tiny_checkpoint, name)
        expected = model_class.from_pretrained(tiny_model_dir / name)
        assert type(network) is model_class
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert not any(t.is_meta for t in [*network.parameters(), *network.buffers()])
        with torch.no_grad():
            if name.startswith("text"):
                assert torch.equal(network(tokens)[0], expected(tokens)[0])
            if name == "image_encoder":
                assert torch.equal(network(pixels).image_embeds, expected(pixels).image_embeds)
        for key, tensor in expected.state_dict().items():
            assert torch.equal(network.state_dict()[key], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision(tiny_checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    for name in NETWORKS:
        network, full = load(tiny_checkpoint, name, dtype), load(tiny_checkpoint, name)
        for (key, tensor), expected in zip(network.named_parameters(), full.parameters(), strict=True):
            assert torch.equal(tensor, expected.to(dtype)), key


@pytest.mark.parametrize("form", ["bin", "variant", "shards"])
def test_every_form_of_the_weights(model_dir: Path, tiny_checkpoint: Checkpoint, form: str) -> None:
    for name in NETWORKS:
        rewrite(model_dir, name, form)
    checkpoint = Checkpoint.open(tiny_paths(model_dir))
    assert_same(checkpoint, tiny_checkpoint)


def test_variant_where_there_are_both(model_dir: Path, tiny_checkpoint: Checkpoint) -> None:
    file = model_dir / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {name: t.half() for name, t in load_file(file).items()}
    save_file(halves, file.with_suffix(".fp16.safetensors"))
    checkpoint = Checkpoint.open(tiny_paths(model_dir, variant="fp16"))
    for name, tensor in load(checkpoint, "unet").state_dict().items():
        assert torch.equal(tensor, halves[name].float())
    # the other networks have no variant, and without asking for it the plain file is taken
    assert_same(Checkpoint.open(tiny_paths(model_dir)), tiny_checkpoint)


def test_old_spellings(model_dir: Path, tiny_checkpoint: Checkpoint) -> None:
    """`position_ids` and "text_model." of older transformers, and the attention of older diffusers' VAEs."""

    def old_text(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if not name.startswith("text_model.")]:
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    def old_vae(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".attentions.0." in name]:
            old = name
            for today, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                old = old.replace(today, then)
            tensor = tensors.pop(name)
            tensors[old] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor

    edit_tensors(model_dir / "text_encoder" / "model.safetensors", old_text)
    edit_tensors(model_dir / "vae" / "diffusion_pytorch_model.safetensors", old_vae)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(
        model_dir / "vae" / "diffusion_pytorch_model.safetensors"
    )
    assert_same(Checkpoint.open(tiny_paths(model_dir)), tiny_checkpoint)


def test_whole_clip_model_as_image_encoder(model_dir: Path, tiny_checkpoint: Checkpoint) -> None:
    config = json.loads((model_dir / "image_encoder" / "config.json").read_text())
    whole = {"model_type": "clip", "projection_dim": config.pop("projection_dim"), "vision_config": config}
    (model_dir / "image_encoder" / "config.json").write_text(json.dumps(whole))
    text_half = {"logit_scale": torch.tensor(4.6), "text_projection.weight": torch.zeros(2, 2)}
    edit_tensors(model_dir / "image_encoder" / "model.safetensors", lambda tensors: tensors.update(text_half))
    assert_same(Checkpoint.open(tiny_paths(model_dir)), tiny_checkpoint)


def test_what_is_loaded_lies_on_the_device(tiny_checkpoint: Checkpoint) -> None:
    meta = torch.device("meta")
    modules = dict(iterate_modules(tiny_checkpoint, Numerics("fp16"), grca, device=meta))
    assert len(modules) == 7
    for module in modules.values():
        assert {tensor.device for tensor in (*module.parameters(), *module.buffers())} == {meta}
        assert {weight.dtype for weight in module.parameters()} == {torch.float16}


def test_the_configuration_is_what_code_depends_on(model_dir: Path, tiny_checkpoint: Checkpoint) -> None:
    for name in NETWORKS:
        notes = {"_name_or_path": "elsewhere", "torch_dtype": "float16", "transformers_version": "4.1.0"}
        edit_config(model_dir / name / "config.json", **notes)
    assert Checkpoint.open(tiny_paths(model_dir)).configuration == tiny_checkpoint.configuration
    edit_config(model_dir / "vae" / "config.json", scaling_factor=0.2)
    changed = Checkpoint.open(tiny_paths(model_dir)).configuration
    assert [name for name in changed if changed[name] != tiny_checkpoint.configuration[name]] == ["vae"]


def test_files_by_component(tiny_checkpoint: Checkpoint, tiny_model_dir: Path) -> None:
    files = tiny_checkpoint.files_by_component
    assert set(files) == {*NETWORKS, "tokenizer", "tokenizer_2", "ip_adapter"}
    for name in NETWORKS:
        assert files[name] == (
            tiny_model_dir / name / "config.json",
            tiny_model_dir / name / f"{WEIGHTS[name]}.safetensors",
        )
    assert tiny_model_dir / "tokenizer_2" / "vocab.json" in files["tokenizer_2"]
    assert files["ip_adapter"] == (tiny_model_dir / "ip-adapter.safetensors",)


def test_tokenizers(tiny_model_dir: Path, tiny_checkpoint: Checkpoint) -> None:
    """As transformers reads and uses them: cut, filled up with each one's own token, in any script."""
    texts = [
        "",
        "a fox",
        "A  FOX's den, 12 <|endoftext|> ! \u00e9e\u0301 \u72d0 \U0001f98a",
        "owl " * 200,
        "a\n\tb\u202e",
    ]
    for part, ours in zip(("tokenizer", "tokenizer_2"), tiny_checkpoint.load_tokenizers(), strict=True):
        theirs = CLIPTokenizer.from_pretrained(tiny_model_dir / part)
        assert (ours.end, ours.size) == (theirs.eos_token_id, len(theirs))
        padded = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.padded(texts, 77) == padded
        assert [ours.ids(text) for text in texts] == theirs(texts, verbose=False).input_ids


def test_opening_by_keywords(tiny_model_dir: Path, tiny_checkpoint: Checkpoint) -> None:
    paths = tiny_paths(tiny_model_dir)
    typed = {"base_model": str(tiny_model_dir), "image_encoder": paths.image_encoder, "ip_adapter": paths.ip_adapter}
    assert Checkpoint.open(**typed).paths == CheckpointPaths(**typed)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, storyadapter.checkpoint; print({'torch', 'diffusers', 'transformers'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "an inpainting UNet with 9 input channels; expected an SDXL base model's with 4"),
        ("unet", {"in_channels": 8}, "8 input and 4 output channels; expected 4 and 4"),
        ("unet", {"addition_embed_type": None, "cross_attention_dim": 768}, "not an SDXL UNet: … None … 768 wide"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; expected a UNet of SDXL"),
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "of FluxTransformer2DModel; expected UNet2DConditionModel"),
        ("unet", {"block_out_channels": [1]}, "unet/config.json doesn't describe the UNet: "),
        ("unet", {"block_out_channels": [32, 32, 96]}, "the UNet in … doesn't fit … of another shape ( … expected ["),
        ("unet", {"attention_head_dim": [1, 1, 3]}, "tensors of another shape ( … is [64], expected [63])"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "configuration of AutoencoderTiny; expected AutoencoderKL"),
        ("vae", {"latent_channels": 16}, "16 latent channels; expected SDXL's 4"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean is set; expected an SDXL VAE"),
        ("vae", {"block_out_channels": None}, "vae/config.json doesn't describe the VAE: "),
        ("text_encoder", {"model_type": "t5"}, "a 't5' model; expected 'clip_text_model'"),
        ("text_encoder", {"max_position_embeddings": 248}, "248 text positions; expected 77"),
        ("text_encoder_2", {"hidden_size": "wide"}, "text_encoder_2/config.json doesn't describe text encoder 2: "),
        ("image_encoder", {"model_type": "siglip"}, "a 'siglip' model; expected a CLIP image encoder"),
        ("image_encoder", {"model_type": None}, "no model_type there; expected a CLIP image encoder"),
        ("image_encoder", {"image_size": 336}, "pictures of 336 pixels; expected 224"),
        (
            "image_encoder",
            {"projection_dim": 48},
            "the image encoder in … 1 tensor of another shape (visual_projection",
        ),
    ],
)
def test_configuration_that_is_not_sdxl(model_dir: Path, name: str, changes: dict[str, Any], message: str) -> None:
    edit_config(model_dir / name / "config.json", **changes)
    refuses(message, tiny_paths(model_dir))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("projection_class_embeddings_input_dim", 72, "projection_class_embeddings_input_dim is 72; expected 80"),
        (
            "cross_attention_dim",
            48,
            "the UNet takes text 48 wide, the text encoders give 32 + 32; expected an SDXL base",
        ),
    ],
)
def test_unet_of_other_text_encoders(model_dir: Path, field: str, value: int, message: str) -> None:
    """Whole in itself, but made for other text encoders (a refiner has one encoder and five sizes)."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(model_dir / "unet")
    UNet2DConditionModel.from_config({**config, field: value}).save_pretrained(model_dir / "unet")
    refuses(message, tiny_paths(model_dir))


def test_layers_of_one_width_with_other_heads(model_dir: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(model_dir / "unet")
    other = {**config, "block_out_channels": [32, 64, 64], "attention_head_dim": [1, 1, 2]}
    UNet2DConditionModel.from_config(other).save_pretrained(model_dir / "unet")
    refuses("layers of one width have different head counts; expected one, as in SDXL", tiny_paths(model_dir))


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "FluxPipeline", "StableDiffusionXLInpaintPipeline"])
def test_another_pipeline(model_dir: Path, pipeline: str) -> None:
    edit_config(model_dir / "model_index.json", _class_name=pipeline)
    refuses(f"is a {pipeline}; expected an SDXL base model (StableDiffusionXLPipeline)", tiny_paths(model_dir))


def test_folder_without_model_index(model_dir: Path) -> None:
    (model_dir / "model_index.json").unlink()
    Checkpoint.open(tiny_paths(model_dir))


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_short(model_dir: Path, name: str) -> None:
    cut_short(model_dir / name / f"{WEIGHTS[name]}.safetensors")
    refuses(
        f"{name}/{WEIGHTS[name]}.safetensors is not a whole .safetensors file ( … ); fetch it again",
        tiny_paths(model_dir),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_garbage_configuration(model_dir: Path, name: str) -> None:
    (model_dir / name / "config.json").write_text('{"a": ')
    refuses(f"{name}/config.json is not valid JSON", tiny_paths(model_dir))


@pytest.mark.parametrize("name", NETWORKS)
def test_missing_weights(model_dir: Path, name: str) -> None:
    (model_dir / name / f"{WEIGHTS[name]}.safetensors").unlink()
    refuses(
        f"{name} has no weights; expected {WEIGHTS[name]}.safetensors or {PICKLES[name]}.bin", tiny_paths(model_dir)
    )


def test_missing_part(model_dir: Path) -> None:
    (model_dir / "text_encoder_2").rename(model_dir / "elsewhere")
    refuses(
        "text_encoder_2 is missing; expected a diffusers SDXL folder with a folder text_encoder_2",
        tiny_paths(model_dir),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_missing_unexpected_and_other_tensors(model_dir: Path, name: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        first, second, third = sorted(tensors)[:3]
        del tensors[first]
        tensors["zzz"] = torch.zeros(1)
        tensors[second] = torch.zeros(7, 5)
        tensors[third] = torch.zeros(tensors[third].shape, dtype=torch.int8)

    edit_tensors(model_dir / name / f"{WEIGHTS[name]}.safetensors", spoil)
    refuses(
        f" in … doesn't fit … {name}/config.json: 1 tensor missing ( … ); 1 tensor unexpected (zzz); 1 tensor of "
        "another shape ( … is [7, 5], expected [ … ]); 1 tensor of whole numbers ( … : a quantized checkpoint",
        tiny_paths(model_dir),
    )


def test_several_missing_tensors(model_dir: Path) -> None:
    def keep_one(tensors: dict[str, Tensor]) -> None:
        for name in sorted(tensors)[1:]:
            del tensors[name]

    edit_tensors(model_dir / "vae" / "diffusion_pytorch_model.safetensors", keep_one)
    refuses("the VAE in … tensors missing (", tiny_paths(model_dir))


def test_pickle_with_code(model_dir: Path) -> None:
    (model_dir / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Path.cwd}, model_dir / "vae" / "diffusion_pytorch_model.bin")
    refuses("vae/diffusion_pytorch_model.bin is a pickle that wants to run code (", tiny_paths(model_dir))


def test_file_changed_after_it_was_checked(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(tiny_paths(model_dir))
    edit_tensors(model_dir / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.popitem())
    with pytest.raises(CheckpointError, match="the VAE in .* 1 tensor missing"):
        checkpoint.load("vae", torch.float32)


def test_tokenizer_without_vocabulary(model_dir: Path) -> None:
    (model_dir / "tokenizer_2" / "vocab.json").unlink()
    refuses("tokenizer_2 has no vocab.json; expected the tokenizer of an SDXL folder", tiny_paths(model_dir))


def test_corrupt_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer" / "vocab.json").write_text("{")
    refuses("tokenizer holds no readable CLIP tokenizer: ", tiny_paths(model_dir))


def test_tokenizer_of_another_model(model_dir: Path) -> None:
    vocabulary = json.loads((model_dir / "tokenizer" / "vocab.json").read_text())
    vocabulary |= {f"new{i}": len(vocabulary) + i for i in range(10)}
    (model_dir / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    refuses(
        "tokenizer has 524 tokens, its text encoder knows 514; expected the tokenizer that belongs",
        tiny_paths(model_dir),
    )


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"base_model": "/nowhere"}, "--base-model /nowhere: there is no such file or folder"),
        ({"image_encoder": "/nowhere"}, "--image-encoder /nowhere: there is no such file or folder"),
        ({"vae": "/nowhere"}, "--vae /nowhere: there is no such file or folder"),
        (
            {"base_config": "/nowhere"},
            "--base-config /nowhere belongs to a single-file --base-model, but … is a folder",
        ),
    ],
)
def test_paths_that_lead_nowhere(tiny_model_dir: Path, typed: dict[str, Any], message: str) -> None:
    refuses(message, tiny_paths(tiny_model_dir, **typed))


def test_image_encoder_that_is_a_file(tiny_model_dir: Path) -> None:
    file = tiny_model_dir / "image_encoder" / "model.safetensors"
    refuses("--image-encoder … is a file; expected a folder", tiny_paths(tiny_model_dir, image_encoder=file))
