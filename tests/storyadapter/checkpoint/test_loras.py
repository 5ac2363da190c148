"""LoRAs: fused weights against the formula and against peft's unfused layers, in the file formats people have."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d

from storyadapter.checkpoint import Checkpoint, LoraSpec
from storyadapter.checkpoint.lora_names import LoraName, LoraNames
from storyadapter.checkpoint.outline import Outline
from storyadapter.method.errors import CheckpointError
from tests.storyadapter.checkpoint.original_layout import original_unet
from tests.storyadapter.checkpoint.spoil import cut_short, edit_tensors, refuses, tiny_paths

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET_LAYERS = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.0.proj", "mid_block.resnets.0.conv1")
TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")
RANK, ALPHA = 4, 2.0
# network -> its layers in the LoRA, as published files name them
LAYERS = {
    "unet": UNET_LAYERS,
    "text_encoder": tuple(f"text_model.{name}" for name in TEXT_LAYERS),
    "text_encoder_2": tuple(f"text_model.{name}" for name in TEXT_LAYERS),
}


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The weights without LoRAs, by network and by the names of LAYERS."""
    networks = {name: tiny_checkpoint.load(name, torch.float32) for name in LAYERS}
    return {name: {layer: _weight(networks[name], layer) for layer in layers} for name, layers in LAYERS.items()}


def _weight(network: torch.nn.Module, layer: str) -> Tensor:
    state = network.state_dict()
    name = f"{layer}.weight"
    return state[name if name in state else name.removeprefix("text_model.")]


def matrices(weights: dict[str, dict[str, Tensor]], seed: int) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Random (down, up) of every layer."""
    generator = torch.Generator().manual_seed(seed)

    def pair(weight: Tensor) -> tuple[Tensor, Tensor]:
        down = torch.randn(RANK, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        return down, torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator)

    return {name: {layer: pair(w) for layer, w in layers.items()} for name, layers in weights.items()}


def kohya(parts: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """The format of most published LoRAs."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for network, layers in parts.items():
        for layer, (down, up) in layers.items():
            name = prefixes[network] + layer.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def peft_format(parts: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """The format that diffusers' training scripts write; alpha = rank."""
    return {
        f"{network}.{layer}.lora_{part}.weight": tensor
        for network, layers in parts.items()
        for layer, pair in layers.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def delta(down: Tensor, up: Tensor, factor: float) -> Tensor:
    return factor * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(("write", "factor"), [(kohya, ALPHA / RANK), (peft_format, 1.0)])
def test_fused_weights_are_the_formula(tiny_model_dir, tmp_path, weights, write, factor, suffix) -> None:
    parts = matrices(weights, seed=1)
    path = tmp_path / f"style.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(write(parts), path)
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, loras=(LoraSpec(path, 0.8),)))
    assert [(lora.path, lora.scale) for lora in checkpoint.loras] == [(path, 0.8)]
    for name, layers in parts.items():
        network = checkpoint.load(name, torch.float32)
        assert network.state_dict().keys() == _without(checkpoint).load(name, torch.float32).state_dict().keys()
        for layer, (down, up) in layers.items():
            expected = weights[name][layer] + delta(down, up, 0.8 * factor)
            torch.testing.assert_close(_weight(network, layer), expected)
            assert not torch.equal(_weight(network, layer), weights[name][layer])
        assert not any(p.requires_grad for p in network.parameters())


def original(layer: str) -> str:
    """A UNet layer's name in the single-file layout; with one layer per block, down block 1 begins at input block 3."""
    layer = layer.replace("down_blocks.1.attentions.0", "input_blocks.3.1")
    return layer.replace("mid_block.resnets.0.conv1", "middle_block.0.in_layers.2")


def old_processor(layer: str) -> str:
    """As the first versions of diffusers named it."""
    layer = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", layer)
    return re.sub(r"(attn\d)\.to_(\w)$", r"\1.processor.to_\2", layer)


def underscored(layer: str) -> str:
    return layer.replace(".", "_")


def bare(layer: str) -> str:
    return layer.removeprefix("text_model.")


UNET_TEXTS = {"unet": "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
ONE_TRAINER = {"unet": "unet.", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}
DOWN_UP = ("lora_down.weight", "lora_up.weight")
# whose layout: prefixes by network, the spelling of a layer, suffixes
LAYOUTS = {
    "kohya": (KOHYA, underscored, DOWN_UP),
    "kohya, original blocks": (KOHYA, lambda layer: underscored(original(layer)), DOWN_UP),
    "OneTrainer": (ONE_TRAINER, original, DOWN_UP),
    "OneTrainer, diffusers blocks": (ONE_TRAINER, str, ("lora_A.weight", "lora_B.weight")),
    "diffusers": (UNET_TEXTS, str, ("lora_A.weight", "lora_B.weight")),
    "diffusers, lora.down": (UNET_TEXTS, bare, ("lora.down.weight", "lora.up.weight")),
    "diffusers, lora_linear_layer": (UNET_TEXTS, str, ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
    "diffusers, kohya's suffixes": (UNET_TEXTS, str, DOWN_UP),
    "kohya's names, peft's suffixes": (KOHYA, underscored, ("lora_A.weight", "lora_B.weight")),
    "peft, adapters named": (UNET_TEXTS, str, ("lora_A.default.weight", "lora_B.default.weight")),
    "peft inside": (
        {k: f"{v}base_model.model." for k, v in UNET_TEXTS.items()},
        str,
        ("lora_A.weight", "lora_B.weight"),
    ),
    "ComfyUI": ({"unet": "diffusion_model."}, original, DOWN_UP),
    "single file": ({"unet": "model.diffusion_model."}, original, DOWN_UP),
    "lycoris": ({"unet": "lycoris_"}, underscored, DOWN_UP),
    "no prefix": ({"unet": ""}, str, DOWN_UP),
}


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_fused(tiny_model_dir, tmp_path, weights, layout: str, with_alpha: bool) -> None:
    prefixes, spell, suffixes = LAYOUTS[layout]
    parts = {name: layers for name, layers in matrices(weights, seed=5).items() if name in prefixes}
    tensors = {}
    for network, layers in parts.items():
        for layer, pair in layers.items():
            name = prefixes[network] + spell(layer)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in zip(suffixes, pair, strict=True)}
            if with_alpha:
                tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path / "a.safetensors", 0.8),)))
    for name, layers in parts.items():
        network = checkpoint.load(name, torch.float32)
        for layer, (down, up) in layers.items():
            expected = weights[name][layer] + delta(down, up, 0.8 * (ALPHA / RANK if with_alpha else 1))
            torch.testing.assert_close(_weight(network, layer), expected)


def test_old_attention_processors(tiny_model_dir, tmp_path, weights) -> None:
    prefixes = {"unet": "", "text_encoder": "text_encoder."}
    parts = matrices(weights, seed=6)
    attentions = {(n, layer): pair for n in prefixes for layer, pair in parts[n].items() if "attn" in layer}
    tensors = {
        f"{prefixes[network]}{old_processor(layer)}_lora.{part}.weight": tensor
        for (network, layer), pair in attentions.items()
        for part, tensor in zip(("down", "up"), pair, strict=True)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path / "a.safetensors"),)))
    networks = {name: checkpoint.load(name, torch.float32) for name in prefixes}
    assert len(attentions) == 3
    for (network, layer), (down, up) in attentions.items():
        torch.testing.assert_close(_weight(networks[network], layer), weights[network][layer] + delta(down, up, 1.0))


def test_names_of_all_layers_in_the_original_unet(tiny_checkpoint) -> None:
    names = LoraNames({name: Outline.of(tiny_checkpoint.load(name, torch.float32)) for name in LAYERS})
    unet = tiny_checkpoint.load("unet", torch.float32)
    layers = [layer for layer, module in unet.named_modules() if hasattr(module, "weight")]
    for ours, theirs in zip(unet.state_dict(), original_unet(unet), strict=True):
        if ours.endswith(".weight"):
            for name in (f"unet.{theirs}", f"lora_unet_{underscored(theirs.removesuffix('.weight'))}.weight"):
                meant = names.read(name.removesuffix(".weight") + ".diff")
                assert meant == LoraName("unet", ours.removesuffix(".weight"), "diff"), name
                layers.remove(meant.module) if meant.module in layers else None
    assert layers == []


def test_lycoris_parts_are_the_formula(tiny_model_dir, tiny_checkpoint, tmp_path) -> None:
    """LoCon with a middle (Tucker), differences of weights, biases and norms; with torch's own convolutions."""
    generator = torch.Generator().manual_seed(8)
    before = tiny_checkpoint.load("unet", torch.float32).state_dict()
    conv, linear, norm = "mid_block.resnets.0.conv1", f"{BLOCK}.ff.net.2", "conv_norm_out"
    out, inner = before[f"{conv}.weight"].shape[:2]
    down = torch.randn(3, inner, 1, 1, generator=generator)
    mid = torch.randn(5, 3, 3, 3, generator=generator)
    up = torch.randn(out, 5, 1, 1, generator=generator)
    changes = {
        f"{name}.{part}": torch.randn(before[f"{name}.{part}"].shape, generator=generator)
        for name in (linear, norm)
        for part in ("weight", "bias")
    }
    kohya_name = {name: f"lora_unet_{underscored(name)}" for name in (conv, linear, norm)}
    save_file(
        {
            f"{kohya_name[conv]}.lora_down.weight": down,
            f"{kohya_name[conv]}.lora_mid.weight": mid,
            f"{kohya_name[conv]}.lora_up.weight": up,
            f"{kohya_name[conv]}.alpha": torch.tensor(1.5),
            f"{kohya_name[linear]}.diff": changes[f"{linear}.weight"],
            f"{kohya_name[linear]}.diff_b": changes[f"{linear}.bias"],
            f"{kohya_name[norm]}.w_norm": changes[f"{norm}.weight"],
            f"{kohya_name[norm]}.b_norm": changes[f"{norm}.bias"],
        },
        tmp_path / "a.safetensors",
    )
    paths = tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path / "a.safetensors", 0.5),))
    after = Checkpoint.open(paths).load("unet", torch.float32).state_dict()
    for name, change in changes.items():
        torch.testing.assert_close(after[name], before[name] + 0.5 * change)
    picture = torch.randn(1, inner, 6, 6, generator=generator)
    in_a_row = conv2d(conv2d(conv2d(picture, down), mid, padding=1), up)
    expected = conv2d(picture, before[f"{conv}.weight"], padding=1) + 0.5 * 1.5 / 3 * in_a_row
    torch.testing.assert_close(conv2d(picture, after[f"{conv}.weight"], padding=1), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_that_peft_wrote(tiny_model_dir, tmp_path, weights) -> None:
    layers = matrices(weights, seed=9)["unet"]
    tensors = {
        f"base_model.model.{layer}.lora_{part}.weight": tensor
        for layer, pair in layers.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refuses_lora("adapter_config.json, which has its alpha, is not beside it", tiny_model_dir, tmp_path)
    own = {"mid_block.resnets.0.conv1": 3}
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({"lora_alpha": ALPHA, "use_rslora": True, "alpha_pattern": own, "bias": "none"}))
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path),)))
    assert checkpoint.files_by_component["lora"] == (settings,)
    network = checkpoint.load("unet", torch.float32)
    for layer, (down, up) in layers.items():
        factor = own.get(layer, ALPHA) / RANK**0.5
        torch.testing.assert_close(_weight(network, layer), weights["unet"][layer] + delta(down, up, factor))


def test_a_text_encoder_without_a_name(tiny_model_dir, tmp_path, weights) -> None:
    layer, (down, up) = next(iter(matrices(weights, 0)["text_encoder"].items()))
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, tmp_path / "a.safetensors")
    told = f"{layer}.lora_down.weight doesn't say whether it is of text_encoder or of text_encoder_2"
    refuses_lora(told, tiny_model_dir, tmp_path / "a.safetensors")


def test_one_part_twice(tiny_model_dir, lora) -> None:
    def double(tensors: dict[str, Tensor]) -> None:
        tensors[f"unet.{UNET_LAYERS[0]}.lora_A.weight"] = torch.zeros(4, 32)

    edit_tensors(lora, double)
    refuses_lora("has the same part of one layer twice: ", tiny_model_dir, lora)


def _without(checkpoint: Checkpoint) -> Checkpoint:
    return Checkpoint.open(tiny_paths(Path(checkpoint.paths.base_model)))


def test_blocks_numbered_as_in_the_original_unet_and_an_alpha_for_each_pair(
    tiny_model_dir, tiny_checkpoint, tmp_path, weights
) -> None:
    layers = {layer: pair for layer, pair in matrices(weights, 4)["unet"].items() if layer.startswith(BLOCK)}
    tensors = {}
    for index, (layer, (down, up)) in enumerate(layers.items()):
        # with one layer per block, down block 1 begins at input block 3
        original = layer.replace("down_blocks.1.attentions.0", "input_blocks.3.1")
        name = "lora_unet_" + original.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(1.0 + index)
    save_file(tensors, tmp_path / "a.safetensors")
    paths = tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path / "a.safetensors"),))
    network = Checkpoint.open(paths).load("unet", torch.float32)
    for index, (layer, (down, up)) in enumerate(layers.items()):
        expected = weights["unet"][layer] + delta(down, up, (1 + index) / RANK)
        torch.testing.assert_close(_weight(network, layer), expected)


def test_alpha_without_its_pair(tiny_model_dir, tmp_path, weights) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_proj_in.alpha"
    save_file(kohya(matrices(weights, 0)) | {name: torch.tensor(1.0)}, tmp_path / "a.safetensors")
    refuses_lora(
        f"is not whole: {name} is there without its lora_down and lora_up", tiny_model_dir, tmp_path / "a.safetensors"
    )


def test_alpha_in_the_metadata_of_diffusers_files(tiny_model_dir, tmp_path, weights) -> None:
    from diffusers import StableDiffusionXLPipeline

    parts = {"unet": matrices(weights, seed=2)["unet"]}
    layers = {name.removeprefix("unet."): t for name, t in peft_format(parts).items()}
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(UNET_LAYERS)}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    # The folder that diffusers wrote is enough.
    network = Checkpoint.open(tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path),))).load("unet", torch.float32)
    for layer, (down, up) in parts["unet"].items():
        expected = weights["unet"][layer] + delta(down, up, ALPHA / RANK)
        torch.testing.assert_close(_weight(network, layer), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_loras_give_what_peft_gives_unfused(tiny_model_dir, tiny_checkpoint, tmp_path, weights) -> None:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.loaders.lora_base import set_adapters_for_text_encoder

    scales = {"first": 0.7, "second": -0.4}
    files = {}
    for seed, name in enumerate(scales):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(kohya(matrices(weights, seed)), files[name])
    loras = tuple(LoraSpec(files[name], scale) for name, scale in scales.items())
    fused = Checkpoint.open(tiny_paths(tiny_model_dir, loras=loras))

    unet, text = tiny_checkpoint.load("unet", torch.float32), tiny_checkpoint.load("text_encoder_2", torch.float32)
    for name, path in files.items():
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(path), unet_config=unet.config)
        StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet, adapter_name=name)
        StableDiffusionXLPipeline.load_lora_into_text_encoder(
            state, alphas, text, prefix="text_encoder_2", adapter_name=name
        )
    unet.set_adapters(list(scales), list(scales.values()))
    set_adapters_for_text_encoder(list(scales), text, list(scales.values()))

    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    width = unet.config.cross_attention_dim
    inputs = {
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, width, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, 32, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        },
    }
    tokens = torch.arange(77)[None]
    with torch.no_grad():
        plain = tiny_checkpoint.load("unet", torch.float32)(latents, **inputs).sample
        expected = unet(latents, **inputs).sample
        got = fused.load("unet", torch.float32)(latents, **inputs).sample
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert (plain - expected).abs().max() > 0.01
        torch.testing.assert_close(
            fused.load("text_encoder_2", torch.float32)(tokens).text_embeds,
            text(tokens).text_embeds,
            atol=1e-4,
            rtol=1e-4,
        )


def test_a_scale_of_zero_changes_nothing(tiny_model_dir, tiny_checkpoint, tmp_path, weights) -> None:
    save_file(kohya(matrices(weights, 0)), tmp_path / "a.safetensors")
    paths = tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path / "a.safetensors", 0.0),))
    fused = Checkpoint.open(paths).load("unet", torch.float32).state_dict()
    for name, tensor in tiny_checkpoint.load("unet", torch.float32).state_dict().items():
        assert torch.equal(fused[name], tensor), name


def test_half_precision(tiny_model_dir, tmp_path, weights) -> None:
    parts = matrices(weights, 0)
    save_file(kohya(parts), tmp_path / "a.safetensors")
    paths = tiny_paths(tiny_model_dir, loras=(LoraSpec(tmp_path / "a.safetensors"),))
    network = Checkpoint.open(paths).load("unet", torch.float16)
    layer, (down, up) = next(iter(parts["unet"].items()))
    expected = weights["unet"][layer] + delta(down, up, ALPHA / RANK)
    assert _weight(network, layer).dtype == torch.float16
    torch.testing.assert_close(_weight(network, layer).float(), expected, atol=4e-3, rtol=4e-3)


@pytest.fixture
def lora(tmp_path, weights) -> Path:
    path = tmp_path / "style.safetensors"
    save_file(kohya(matrices(weights, 0)), path)
    return path


def refuses_lora(pattern: str, folder: Path, lora: Path) -> None:
    refuses(pattern, tiny_paths(folder, loras=(LoraSpec(lora),)))


def test_lora_of_another_architecture(tiny_model_dir, lora) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if "attn2_to_k.lora_down" in name)
        tensors[name] = torch.zeros(RANK, 768)

    edit_tensors(lora, widen)
    refuses_lora(
        "doesn't fit this model: lora_unet_ … attn2_to_k.lora_down.weight is [4, 768] for a layer of [32, 64]",
        tiny_model_dir,
        lora,
    )


def test_lora_for_layers_that_are_not_there(tiny_model_dir, tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    name = "unet.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(4, 64), name.format("B"): torch.zeros(64, 4)}, path)
    refuses_lora(
        "its unet has no layer single_transformer_blocks.0.attn.to_q (unet. … ); expected a LoRA for SDXL",
        tiny_model_dir,
        path,
    )


def test_lora_of_a_transformer_model(tiny_model_dir, tmp_path) -> None:
    path = tmp_path / "flux.safetensors"
    name = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(4, 64), name.format("B"): torch.zeros(64, 4)}, path)
    refuses_lora(
        f"is no LoRA for SDXL: it holds {name.format('A')}; expected matrices for SDXL's UNet and text encoders",
        tiny_model_dir,
        path,
    )


def test_kohya_names_of_another_model(tiny_model_dir, tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 64)}, path)
    refuses_lora("its unet has no layer double_blocks_0_img_attn_qkv (lora_unet_", tiny_model_dir, path)


def test_file_that_is_no_lora(tiny_model_dir) -> None:
    refuses_lora("is no LoRA for SDXL", tiny_model_dir, tiny_model_dir / "ip-adapter.safetensors")


def test_file_without_tensors(tiny_model_dir, tmp_path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    refuses_lora("is no LoRA for SDXL", tiny_model_dir, tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_x.dora_scale", "a DoRA"),
        ("unet.x.lora_magnitude_vector", "a DoRA"),
        ("unet.x.lora_magnitude_vector.default.weight", "a DoRA"),
        ("lora_unet_x.lokr_w1", "a LoKr"),
        ("lora_unet_x.lokr_w2_a", "a LoKr"),
        ("lora_unet_x.hada_w1_a", "a LoHa"),
        ("lora_unet_x.hada_t1", "a LoHa"),
        ("lora_unet_x.a1.weight", "a GLoRA"),
        ("lora_unet_x.on_input", "an IA3"),
        ("base_model.model.x.ia3_l", "an IA3"),
        ("lora_unet_x.oft_blocks", "an OFT"),
        ("base_model.model.x.oft_R.weight", "an OFT"),
        ("base_model.model.x.boft_R", "a BOFT"),
        ("base_model.model.x.vera_lambda_b", "a VeRA"),
        ("base_model.model.x.lora_embedding_A", "a LoRA of token embeddings"),
        ("bundle_emb.fox.string_to_param.clip_l", "a LoRA with a textual inversion embedding"),
    ],
)
def test_other_kinds(tiny_model_dir, lora, name: str, kind: str) -> None:
    edit_tensors(lora, lambda tensors: tensors.update({name: torch.zeros(4, 4)}))
    refuses_lora(f"is {kind} ({name}); expected a LoRA or LoCon", tiny_model_dir, lora)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("lora_adapter_metadata", '{"unet.use_dora": true}', "is a DoRA: it says use_dora: true"),
        ("lora_adapter_metadata", '{"unet.init_lora_weights": "pissa"}', 'it says init_lora_weights: "pissa"'),
        ("lora_adapter_metadata", '{"unet.fan_in_fan_out": true}', "it says fan_in_fan_out: true"),
        ("lora_adapter_metadata", '{"unet.lora_alpha": "4"}', "lora_alpha and alpha_pattern; expected numbers"),
        ("lora_adapter_metadata", '{"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}', "expected numbers"),
        ("lora_adapter_metadata", '{"unet.alpha_pattern": {"(a+)+b": 1}}', "has the pattern '(a+)+b'"),
        ("ss_network_args", '{"algo": "lora", "dora_wd": "True"}', "is a DoRA without its magnitudes (ss_network_args"),
    ],
)
def test_a_header_that_says_another_kind(tiny_model_dir, tmp_path, weights, key: str, value: str, told: str) -> None:
    save_file(peft_format(matrices(weights, 0)), tmp_path / "a.safetensors", metadata={key: value})
    refuses_lora(told, tiny_model_dir, tmp_path / "a.safetensors")


def test_half_a_pair(tiny_model_dir, tmp_path, weights) -> None:
    tensors = peft_format(matrices(weights, 0))
    del tensors[f"unet.{UNET_LAYERS[0]}.lora_B.weight"]
    save_file(tensors, tmp_path / "half.safetensors")
    refuses_lora(
        "is not whole: unet. … lora_A.weight is there without its lora_up",
        tiny_model_dir,
        tmp_path / "half.safetensors",
    )


def test_parts_that_are_no_matrices(tiny_model_dir, tmp_path, weights) -> None:
    tensors = peft_format(matrices(weights, 0)) | {f"unet.{UNET_LAYERS[0]}.lora_B.bias": torch.zeros(32)}
    save_file(tensors, tmp_path / "bias.safetensors")
    refuses_lora("is no LoRA for SDXL: it holds unet. … lora_B.bias", tiny_model_dir, tmp_path / "bias.safetensors")


def test_metadata_that_is_not_json(tiny_model_dir, tmp_path, weights) -> None:
    path = tmp_path / "a.safetensors"
    save_file(peft_format(matrices(weights, 0)), path, metadata={"lora_adapter_metadata": "{"})
    refuses_lora("a.safetensors: lora_adapter_metadata in its header is not a JSON object", tiny_model_dir, path)


def test_settings_that_are_not_known(tiny_model_dir, tmp_path, weights) -> None:
    path = tmp_path / "a.safetensors"
    save_file(peft_format(matrices(weights, 0)), path, metadata={"lora_adapter_metadata": '{"unet.no_such_option": 1}'})
    refuses_lora("was trained in a way that isn't read here: it says no_such_option: 1", tiny_model_dir, path)


def test_a_file_that_changed_since_it_was_checked(tiny_model_dir, lora) -> None:
    checkpoint = Checkpoint.open(tiny_paths(tiny_model_dir, loras=(LoraSpec(lora),)))
    edit_tensors(lora, lambda tensors: tensors.pop(next(name for name in tensors if name.startswith("lora_unet_"))))
    with pytest.raises(CheckpointError, match="style.safetensors changed since it was checked"):
        checkpoint.load("unet", torch.float32)


def test_cut_short(tiny_model_dir, lora) -> None:
    cut_short(lora)
    refuses_lora("style.safetensors is not a whole .safetensors file", tiny_model_dir, lora)


def test_missing(tiny_model_dir, tmp_path) -> None:
    refuses_lora(
        "--lora … no.safetensors: there is no such file or folder", tiny_model_dir, tmp_path / "no.safetensors"
    )


def test_folder_without_lora(tiny_model_dir, tmp_path) -> None:
    refuses_lora("has no pytorch_lora_weights.safetensors; give the file itself", tiny_model_dir, tmp_path)
