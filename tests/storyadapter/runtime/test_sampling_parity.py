"""Stories sampled as their model says, against diffusers' own pipeline."""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from storyadapter import Checkpoint, RunPlan, Story
from storyadapter.api import open_checkpoint
from storyadapter.checkpoint import LoraSpec
from storyadapter.method.events import FrameFinished
from storyadapter.method.presets import PRESETS, with_preset
from storyadapter.runtime.pipeline import StoryPipeline
from tests.oracle.comparison import errors_of_frames
from tests.oracle.diffusers_ip_adapter import PUBLISHED_SCHEDULER, diffusers_story, image_to_image_story
from tests.storyadapter.checkpoint.original_layout import single_file
from tests.storyadapter.checkpoint.spoil import edit_config, tiny_paths
from tests.storyadapter.runtime.replaced import counting

ALLOWED = 0.5  # of 255, mean over a frame
PROMPTS = ("a fox in the snow", "an owl at night")
SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
Linked = Callable[..., Path]


@pytest.fixture
def linked(tiny_model_dir: Path, tmp_path: Path) -> Linked:
    """The tiny model with another scheduler: everything else is linked."""

    def link(scheduler: SchedulerMixin) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for item in tiny_model_dir.iterdir():
            if item.name != "scheduler":
                (folder / item.name).symlink_to(item)
        scheduler.save_pretrained(folder / "scheduler")
        (folder / "model_index.json").unlink()
        index = json.loads((tiny_model_dir / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return link


def draw(paths: Any, **settings: Any) -> list[list[Image.Image]]:
    """By this project, on eager."""
    plan = RunPlan(**{"height": 64, "width": 64, "seed": 3, "scales": (0.4,), "steps": 4, **settings})
    pipeline = open_checkpoint(Checkpoint.open(paths), backend="eager")
    events = pipeline.run(Story(PROMPTS, style="none"), plan)
    frames = [event.picture for event in events if isinstance(event, FrameFinished)]
    return [frames[start : start + len(PROMPTS)] for start in range(0, len(frames), len(PROMPTS))]


def draw_by_diffusers(folder: Path, **settings: Any) -> list[list[Image.Image]]:
    asked = {"scales": (0.4,), "steps": 4, "seed": 3, "height": 64, "width": 64, "scheduler": None, **settings}
    return diffusers_story(folder, folder / "image_encoder", folder / "ip-adapter.safetensors", PROMPTS, **asked)


def worst(first: list[list[Image.Image]], second: list[list[Image.Image]]) -> float:
    assert len(first) == len(second)
    return max(max(errors_of_frames(ours, theirs)) for ours, theirs in zip(first, second, strict=True))


# as SDXL's own scheduler_config.json has it, from which model cards derive theirs
CARD = SDXL | dict(clip_sample=False, set_alpha_to_one=False)
TRAILING = CARD | dict(timestep_spacing="trailing")
CARDS: dict[str, dict[str, Any]] = {
    "lcm-lora": dict(scheduler=(LCMScheduler, CARD), steps=8, guidance=1.0),
    "lightning": dict(scheduler=(EulerDiscreteScheduler, TRAILING), steps=4, guidance=0.0),
    "hyper": dict(scheduler=(DDIMScheduler, TRAILING), steps=4, guidance=0.0),
    "hyper-cfg": dict(scheduler=(DDIMScheduler, TRAILING), steps=8, guidance=5.0),
    "tcd": dict(scheduler=(TCDScheduler, CARD), steps=4, guidance=0.0, eta=0.3),
    "dmd2": dict(scheduler=(LCMScheduler, CARD), steps=4, guidance=0.0, timesteps=(999, 749, 499, 249)),
    "turbo": dict(scheduler=(EulerAncestralDiscreteScheduler, TRAILING), steps=4, guidance=0.0),
}


@pytest.fixture(scope="module")
def lora(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 on every query projection."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in checkpoint.load("unet", torch.float32).named_modules():
        if name.endswith("to_q"):
            shapes = {"lora_A": (2, module.in_features), "lora_B": (module.out_features, 2)}
            tensors |= {
                f"unet.{name}.{part}.weight": torch.randn(shape, generator=generator) / 8
                for part, shape in shapes.items()
            }
    path = tmp_path_factory.mktemp("lora") / "few-steps.safetensors"
    save_file(tensors, path)
    return path


# others have tests of their own
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("lcm", "balanced", "fast")])
def test_a_preset_is_what_its_model_card_says(tiny_model_dir: Path, lora: Path, name: str) -> None:
    card = dict(CARDS[name])
    kind, config = card.pop("scheduler")

    def fuse(pipeline: StableDiffusionXLPipeline) -> None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        pipeline.fuse_lora()

    known = inspect.signature(kind).parameters
    scheduler = kind(**{key: value for key, value in config.items() if key in known})
    theirs = draw_by_diffusers(tiny_model_dir, scheduler=scheduler, prepare=fuse, **card)
    paths = tiny_paths(tiny_model_dir, loras=(LoraSpec(lora),))
    settings = {"steps": 50, **with_preset(name, {})}
    assert worst(draw(paths, **settings), theirs) < ALLOWED


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_iterations_that_start_from_the_one_before(tiny_model_dir: Path, scheduler: str) -> None:
    """By diffusers' image-to-image pipeline, given the latents of the frames of the iteration before."""
    own = PUBLISHED_SCHEDULER if scheduler == "ddim" else EulerDiscreteScheduler(**SDXL, timestep_spacing="leading")
    theirs = image_to_image_story(
        *(tiny_model_dir, tiny_model_dir / "image_encoder", tiny_model_dir / "ip-adapter.safetensors", PROMPTS),
        scheduler=own,
        scales=(0.3, 0.5),
        steps=6,
        strength=0.5,
        seed=3,
        height=64,
        width=64,
    )
    ours = draw(tiny_paths(tiny_model_dir), scheduler=scheduler, scales=(0.3, 0.5), steps=6, strength=0.5)
    assert worst(ours, theirs) < ALLOWED
    assert worst(draw(tiny_paths(tiny_model_dir), scheduler=scheduler, scales=(0.3, 0.5), steps=6)[1:], theirs[1:]) > 5


@pytest.fixture(scope="module")
def lcm_unet(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's UNet, taking the guidance as an embedding 256 wide, as latent-consistency/lcm-sdxl does."""
    plain = checkpoint.load("unet", torch.float32)
    unet = UNet2DConditionModel.from_config(plain.config, time_cond_proj_dim=256)
    weights = {**plain.state_dict(), "time_embedding.cond_proj.weight": unet.state_dict()[COND_PROJ]}
    weights[COND_PROJ] = torch.randn(weights[COND_PROJ].shape, generator=torch.manual_seed(1)) / 4
    unet.load_state_dict(weights)
    folder = tmp_path_factory.mktemp("lcm")
    unet.save_pretrained(folder / "unet")
    return folder / "unet"


COND_PROJ = "time_embedding.cond_proj.weight"
PUBLISHED_FAST = dict(steps=4, guidance=8.0, scales=(0.3, 0.4, 0.5))


@pytest.fixture(scope="module")
def fast(tiny_model_dir: Path, lcm_unet: Path) -> list[list[Image.Image]]:
    """The published fast mode by diffusers: `LCMScheduler.from_config` of the checkpoint's own scheduler."""
    own = EulerDiscreteScheduler.from_pretrained(tiny_model_dir, subfolder="scheduler")

    def replace_unet(pipeline: StableDiffusionXLPipeline) -> None:
        pipeline.register_modules(unet=UNet2DConditionModel.from_pretrained(lcm_unet))

    scheduler = LCMScheduler.from_config(own.config)
    return draw_by_diffusers(tiny_model_dir, scheduler=scheduler, prepare=replace_unet, **PUBLISHED_FAST)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_published_fast_mode(
    tiny_model_dir: Path, lcm_unet: Path, fast: list[list[Image.Image]], form: str
) -> None:
    unet = lcm_unet if form == "folder" else lcm_unet / "diffusion_pytorch_model.safetensors"
    settings = with_preset("lcm", {"scales": PUBLISHED_FAST["scales"]})
    ours = draw(tiny_paths(tiny_model_dir, unet=unet), **settings)
    assert worst(ours, fast) < ALLOWED


@pytest.mark.parametrize("mistake", ["no embedding", "guidance 5", "other time steps"])
def test_a_mistake_in_the_fast_mode_is_seen(
    tiny_model_dir: Path, lcm_unet: Path, fast: list[list[Image.Image]], tmp_path: Path, mistake: str
) -> None:
    settings, unet = with_preset("lcm", {"scales": PUBLISHED_FAST["scales"]}), lcm_unet
    if mistake == "no embedding":
        tensors = load_file(lcm_unet / "diffusion_pytorch_model.safetensors")
        unet = tmp_path / "unet.safetensors"
        save_file(tensors | {COND_PROJ: torch.zeros_like(tensors[COND_PROJ])}, unet)
    elif mistake == "guidance 5":
        settings["guidance"] = 5.0
    else:
        settings |= {"timesteps": (751, 501, 251, 1), "steps": 4}
    ours = draw(tiny_paths(tiny_model_dir, unet=unet), **settings)
    errors = [max(errors_of_frames(one, other)) for one, other in zip(ours, fast, strict=True)]
    assert min(errors) > 10 * ALLOWED, errors


def test_no_unconditional_rows_with_an_embedded_guidance(tiny_model_dir: Path, lcm_unet: Path) -> None:
    opened = Checkpoint.open(tiny_paths(tiny_model_dir, unet=lcm_unet))
    assert opened.sampling.embeds_guidance and opened.geometry.guidance_embedding == 256
    plan = RunPlan(height=64, width=64, seed=0, **with_preset("lcm", {})).for_model(opened.sampling)
    assert not plan.guided and plan.unet_rows(100) == 100 * 11 * 4
    pipeline = open_checkpoint(opened, backend="eager")
    networks, counts = counting(pipeline.networks, "denoiser")
    counted = StoryPipeline(networks, opened.load_tokenizers())
    list(counted.run(Story(PROMPTS), replace(plan, scales=(0.4,), embeds_guidance=False)))
    assert counts["denoiser rows"] == plan.unet_rows(2) * 2 // 11


V_MODEL = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


def test_what_a_v_prediction_model_says_of_itself_is_read(linked: Linked) -> None:
    """The default sampler on a model of `scheduler_config.json`, whose class is another."""
    folder = linked(EulerDiscreteScheduler(**SDXL, **V_MODEL))
    theirs = draw_by_diffusers(
        folder, scheduler=DDIMScheduler(**SDXL, **V_MODEL, clip_sample=False, set_alpha_to_one=False)
    )
    assert worst(draw(tiny_paths(folder)), theirs) < ALLOWED
    typed = draw(tiny_paths(folder), prediction_type="epsilon", zero_terminal_snr=False)
    assert worst(typed, theirs) > 10 * ALLOWED


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    "own",
    [
        EulerDiscreteScheduler(**SDXL, timestep_spacing="trailing"),
        EulerAncestralDiscreteScheduler(**SDXL, timestep_spacing="trailing"),
        EulerDiscreteScheduler(**SDXL, **V_MODEL),
    ],
    ids=["trailing", "ancestral", "v"],
)
def test_the_scheduler_that_the_model_comes_with(linked: Linked, own: SchedulerMixin, steps: int) -> None:
    folder = linked(own)
    theirs = draw_by_diffusers(folder, steps=steps, guidance=1.0)
    assert worst(draw(tiny_paths(folder), scheduler="checkpoint", steps=steps, guidance=1.0), theirs) < ALLOWED


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_few_steps_that_trail(tiny_model_dir: Path, steps: int) -> None:
    own = EulerDiscreteScheduler(**SDXL, timestep_spacing="trailing")
    theirs = draw_by_diffusers(tiny_model_dir, scheduler=own, steps=steps, guidance=0.0)
    ours = draw(tiny_paths(tiny_model_dir), scheduler="euler", timestep_spacing="trailing", steps=steps, guidance=0.0)
    assert worst(ours, theirs) < ALLOWED


def test_time_steps_that_are_given(tiny_model_dir: Path) -> None:
    own, timesteps = EulerDiscreteScheduler(**SDXL), (999, 749, 499, 249)
    theirs = draw_by_diffusers(tiny_model_dir, scheduler=own, timesteps=timesteps)
    assert worst(draw(tiny_paths(tiny_model_dir), scheduler="euler", timesteps=timesteps, steps=50), theirs) < ALLOWED
    assert worst(draw(tiny_paths(tiny_model_dir), scheduler="euler"), theirs) > 10 * ALLOWED


def test_a_vae_with_another_factor_of_its_own(linked: Linked, tiny_model_dir: Path) -> None:
    folder = linked(EulerDiscreteScheduler(**SDXL, timestep_spacing="leading"))
    (folder / "vae").unlink()
    shutil.copytree(tiny_model_dir / "vae", folder / "vae")
    edit_config(folder / "vae" / "config.json", scaling_factor=0.2)
    theirs = draw_by_diffusers(folder)
    assert worst(draw(tiny_paths(folder), scheduler="euler"), theirs) < ALLOWED
    assert worst(draw(tiny_paths(tiny_model_dir), scheduler="euler"), theirs) > ALLOWED


def test_a_vae_file_without_a_configuration(tiny_model_dir: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_file(checkpoint.load("vae", torch.float32).state_dict(), tmp_path / "vae.safetensors")
    ours = draw(tiny_paths(tiny_model_dir, vae=tmp_path / "vae.safetensors"))
    assert worst(ours, draw_by_diffusers(tiny_model_dir, scheduler=PUBLISHED_SCHEDULER)) < ALLOWED


def test_a_single_file_with_markers(tiny_model_dir: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    names = ("unet", "text_encoder", "text_encoder_2", "vae")
    tensors = single_file(*(checkpoint.load(name, torch.float32) for name in names))
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    paths = tiny_paths(tiny_model_dir, base_model=tmp_path / "v.safetensors", base_config=tiny_model_dir)
    own = DDIMScheduler(**SDXL, **V_MODEL, clip_sample=False, set_alpha_to_one=False)
    assert worst(draw(paths), draw_by_diffusers(tiny_model_dir, scheduler=own)) < ALLOWED
