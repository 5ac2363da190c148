"""Trains the demo model: `python -m storyadapter.demo.train all --work DIR --out DIR`, or one stage at a time.

Stages: data, judge, vae, clip, unet, export. Each leaves its result in the work folder, and a finished stage is not
done again, so a stopped run goes on by the same command. A gate that isn't met stops the run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

from storyadapter.demo import dataset
from storyadapter.demo.attention import attach
from storyadapter.demo.judge import Judge, blemish, load_judge, save_judge, trait_losses
from storyadapter.demo.loop import Budget, Log, optimize
from storyadapter.demo.networks import TINY, DemoConfig, DemoModel, build, write_model
from storyadapter.demo.rows import RowDraw
from storyadapter.demo.vocabulary import write_tokenizer
from storyadapter.method import CLIP_PIXELS, DDIM_CONFIG, NEGATIVE_PROMPT, REFERENCE_PIXELS, TEXT_TOKENS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights, next to the seed."""

    config: DemoConfig
    world: dataset.WorldSize
    judge_pictures: int
    test_pictures: int
    variants: int  # captions per picture
    judge: Budget
    vae: Budget
    clip: Budget
    unet: Budget
    floor: float = 0.95  # of every gate


FULL = Settings(
    config=DemoConfig(),
    world=dataset.WorldSize(visible=192, identities=48, views=8),
    judge_pictures=50_000,
    test_pictures=2_000,
    variants=2,
    judge=Budget(steps=4_000, batch=256, rate=2e-3, seconds=30),
    vae=Budget(steps=18_000, batch=16, rate=8e-4, seconds=160, average=0.998),
    clip=Budget(steps=14_000, batch=256, rate=1e-3, seconds=140, average=0.998),
    unet=Budget(steps=11_500, batch=512, rate=1e-3, seconds=330, average=0.999),
)
TOY = Settings(
    config=replace(TINY, pixels=128),
    world=dataset.WorldSize(visible=3, identities=4, views=2),
    judge_pictures=32,
    test_pictures=16,
    variants=2,
    judge=Budget(steps=2, batch=8, rate=1e-3),
    vae=Budget(steps=2, batch=4, rate=1e-3, average=0.9),
    clip=Budget(steps=2, batch=4, rate=1e-3, average=0.9),
    unet=Budget(steps=2, batch=4, rate=1e-3, average=0.9),
    floor=0.0,
)


class GateError(RuntimeError):
    """A stage's result isn't good enough for the next stage."""


class Training:
    """The stages over one work folder."""

    def __init__(self, settings: Settings, work: Path, seed: int = 0, device: str | None = None) -> None:
        self.settings = settings
        self.work = work
        self.seed = seed
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cudnn.benchmark = True
        work.mkdir(parents=True, exist_ok=True)
        self.log = Log(work / "log.jsonl")
        self._loaded: dict[str, tuple[Tensor, Tensor]] = {}

    # --- stages ------------------------------------------------------------------------------------------------------

    def data(self) -> None:
        """Draw all pictures (the training world, the judge's own, held-out ones for the gates), tokenize captions."""
        for name, scenes in self._scene_sets.items():
            if not (self.work / f"{name}.npy").exists():
                dataset.draw_all(scenes, self.work / f"{name}.npy")
                self.log("data", set=name, pictures=len(scenes))
        if not (self.work / "tokens.npz").exists():
            scenes = self._scene_sets["world"]
            texts = dataset.captions(scenes, self.settings.variants, self.seed)
            np.savez_compressed(self.work / "tokens.npz", tokens=self._tokenize(texts))

    def judge(self) -> None:
        """Train the judge on drawings of its own. Gate: it reads every trait off held-out drawings."""
        pictures, labels = self._load("judge")
        torch.manual_seed(self.seed)
        judge = Judge().to(self.device, memory_format=torch.channels_last).train()
        batch = self.settings.judge.batch

        def losses() -> dict[str, Tensor]:
            at = torch.randint(len(pictures), (batch,), device=self.device)
            seen = blemish(pictures[at]).contiguous(memory_format=torch.channels_last)
            with self._autocast():
                return {"traits": trait_losses(judge(seen), labels[at])}

        optimize("judge", losses, [judge], self.settings.judge, self.log)
        save_judge(judge.eval().cpu(), self.work / "judge.safetensors")
        test, truth = self._load("test")
        self._gate("judge on drawings", load_judge(self.work / "judge.safetensors", self.device).read(test), truth)

    def vae(self) -> None:
        """Train the VAE. Gate: the judge reads every trait off its reconstructions."""
        pictures, _ = self._load("world")
        vae = self._begin("vae", {"vae": self._model().vae})["vae"].to(memory_format=torch.channels_last)
        batch, unit = self.settings.vae.batch, vae.config.scaling_factor

        def losses() -> dict[str, Tensor]:
            at = torch.randint(len(pictures), (batch,), device=self.device)
            x = _signed(pictures[at]).contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(x.to(vae.dtype)).latent_dist
            error = x - vae.decode(posterior.sample()).sample.float()
            coarse = nnf.avg_pool2d(error, 4)
            mean, spread = posterior.mean.float() * unit, posterior.logvar.float() + 2 * math.log(unit)
            return {
                "pixels": error.abs().mean() + 2 * (error**2).mean() + coarse.abs().mean(),
                "edges": 0.5 * (_edges(error) + _edges(nnf.avg_pool2d(error, 2))),
                "kl": 1e-3 * (mean**2 + spread.exp() - 1 - spread).mean(),
            }

        optimize("vae", losses, [vae], self.settings.vae, self.log, self.work / "vae.resume", half=True)
        whiten(vae, self._latents(vae, pictures[:: max(1, len(pictures) // 4096)], scaled=False))
        torch.save({"vae": vae.state_dict()}, self.work / "vae.pt")
        test, truth = self._load("test")
        seen = self._redraw(vae, test, noise=0)
        error = (_signed(test) - _signed(seen)).abs().mean()
        self.log("vae", mean_absolute_error_of_255=float(error) * 127.5)
        self._gate("judge on reconstructions", self._judge().read(seen), truth)

    def clip(self) -> None:
        """Train the CLIP pair, the image side also on every trait. Gate: its embedding tells every trait."""
        pictures, labels = self._load("world")
        tokens = self._tokens()
        vae = self._trained("vae", "vae")
        redrawn = self._redrawn
        model = self._model()
        networks = {
            "image_encoder": model.image_encoder,
            "text_encoder_2": model.text_encoder_2,
            "heads": nn.Linear(self.settings.config.embedding_width, sum(map(len, dataset.TRAITS.values()))),
            "sharpness": nn.ParameterDict({"log": nn.Parameter(torch.tensor(2.3))}),
        }
        vision, text, heads, sharpness = self._begin("clip", networks).values()
        sizes = [len(values) for values in dataset.TRAITS.values()]
        batch = self.settings.clip.batch
        resize = resizer(self.device)

        def losses() -> dict[str, Tensor]:
            at = torch.randint(len(pictures), (batch,), device=self.device)
            own, spoilt = torch.rand(2, batch, 1, 1, 1, device=self.device) < 0.3
            seen = torch.where(own, pictures[at], redrawn[at]).float()
            seen = torch.where(spoilt, blemish(seen), seen)
            words = tokens[at, torch.randint(tokens.shape[1], (batch,), device=self.device)]
            image = vision(pixel_values=resize(seen)).image_embeds
            told = text(input_ids=words[:, 1]).text_embeds
            traits = trait_losses(heads(image).split(sizes, 1), labels[at])
            match = nnf.normalize(image.float()) @ nnf.normalize(told.float()).T
            match = match * sharpness["log"].float().exp().clamp(max=50)
            truth = torch.arange(batch, device=self.device)
            both = nnf.cross_entropy(match, truth) + nnf.cross_entropy(match.T, truth)
            return {"contrast": 0.1 * both, "traits": 6 * traits}

        optimize("clip", losses, networks.values(), self.settings.clip, self.log, half=True)
        torch.save({name: network.state_dict() for name, network in networks.items()}, self.work / "clip.pt")
        test, truth = self._load("test")
        for kind, seen in (("drawings", test), ("reconstructions", self._redraw(vae, test, noise=0))):
            with torch.no_grad():
                rows = [heads(e).split(sizes, 1) for e in self._embed(vision, seen).split(512)]
            read = torch.cat([torch.stack([part.argmax(1) for part in row], 1) for row in rows])
            self._gate(f"image encoder on {kind}", read.cpu(), truth)

    def unet(self) -> None:
        """Train UNet, both text encoders and the adapter together, over λ = 0 and λ from 0.3 to 1."""
        pictures, labels = self._load("world")
        vision, batch = self._trained("clip", "image_encoder"), self.settings.unet.batch
        latents = self._latents(self._trained("vae", "vae"), pictures)
        embeddings = torch.stack([self._embed(vision, pictures), self._embed(vision, self._redrawn)], 1)
        self.log("unet", latent_std=float(latents.std()), embedding_std=float(embeddings.std()))
        model = self._model()
        model.text_encoder_2.load_state_dict(self._trained("clip", "text_encoder_2").state_dict())
        names = ("unet", "text_encoder", "text_encoder_2", "ip-adapter")
        unet, text, text_2, adapter = self._begin("unet", {name: model.networks()[name] for name in names}).values()
        attach(unet, adapter)
        unet.to(memory_format=torch.channels_last)
        drawn = RowDraw(self.settings.world, batch, latents, embeddings, self._tokens(), self._dropped(), labels)
        levels = DDIMScheduler(**DDIM_CONFIG).alphas_cumprod.to(self.device)
        size = self.settings.config.pixels
        sizes = torch.tensor([size, size, 0, 0, size, size], device=self.device).repeat(batch, 1)

        def losses() -> dict[str, Tensor]:
            rows = drawn()
            step = torch.randint(1000, (len(sizes),), device=self.device)
            level = levels[step][:, None, None, None]
            noise = torch.randn_like(rows.latents)
            noisy = level.sqrt() * rows.latents + (1 - level).sqrt() * noise
            first = text(input_ids=rows.tokens[:, 0], output_hidden_states=True)
            second = text_2(input_ids=rows.tokens[:, 1], output_hidden_states=True)
            guess = unet(
                noisy.to(unet.dtype).contiguous(memory_format=torch.channels_last),
                step,
                encoder_hidden_states=torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1),
                added_cond_kwargs={"text_embeds": second.text_embeds, "time_ids": sizes},
                cross_attention_kwargs={
                    "references": adapter.tokens(rows.references.to(unet.dtype)).flatten(1, 2),
                    "reference_mask": rows.mask,
                    "reference_scale": rows.scale,
                },
            ).sample
            ratio = level / (1 - level)
            weight = ratio.clamp(max=5) / ratio  # min-SNR (arXiv 2303.09556), γ = 5
            return {"noise": (weight * (guess.float() - noise) ** 2).mean()}

        trained = dict(zip(names, (unet, text, text_2, adapter), strict=True))
        optimize("unet", losses, trained.values(), self.settings.unet, self.log, self.work / "unet.resume", half=True)
        torch.save({name: network.state_dict() for name, network in trained.items()}, self.work / "unet.pt")

    def export(self, out: Path) -> None:
        """Write the finished model in the published formats, in fp16."""
        model = self._model()
        states = {}
        for stage in ("vae", "clip", "unet"):
            states |= torch.load(self.work / f"{stage}.pt", map_location="cpu")
        for name, network in model.networks().items():
            network.load_state_dict(states[name])
        write_model(model, out)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        self.log("export", bytes=size)

    # --- what the stages share -----------------------------------------------------------------------------------

    @cached_property
    def _scene_sets(self) -> dict[str, list[dataset.Scene]]:
        kinds, held_out = dataset.split_visible()
        return {
            "world": dataset.training_scenes(self.settings.world, self.seed),
            "judge": dataset.mixed_scenes(self.settings.judge_pictures, self.seed + 1),
            "test": dataset.mixed_scenes(self.settings.test_pictures, self.seed + 2, held_out),
        }

    def _load(self, name: str) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [n, 3, 128, 128] and labels [n, traits], on the device."""
        if name not in self._loaded:
            stored = np.load(self.work / f"{name}.npy", mmap_mode="c")
            pictures = torch.empty(len(stored), 3, *stored.shape[1:3], dtype=torch.uint8, device=self.device)
            for n in range(0, len(stored), 4096):
                part = torch.from_numpy(stored[n : n + 4096]).to(self.device)
                pictures[n : n + 4096] = part.permute(0, 3, 1, 2)
            labels = torch.from_numpy(dataset.label_table(self._scene_sets[name])).to(self.device)
            self._loaded[name] = pictures, labels
        return self._loaded[name]

    @cached_property
    def _redrawn(self) -> Tensor:
        """The training pictures through the VAE, their latents disturbed a little: what generated pictures are like."""
        torch.manual_seed(self.seed)
        return self._redraw(self._trained("vae", "vae"), self._load("world")[0], noise=0.25)

    def _model(self) -> DemoModel:
        torch.manual_seed(self.seed)
        return build(self.settings.config, dataset.words())

    def _begin(self, stage: str, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Networks to train, from the stage's own result where there is one, else freshly initialized."""
        if (self.work / f"{stage}.pt").exists():
            for name, state in torch.load(self.work / f"{stage}.pt", map_location="cpu").items():
                networks[name].load_state_dict(state)
        torch.manual_seed(self.seed)
        return {name: network.to(self.device).train() for name, network in networks.items()}

    def _trained(self, stage: str, name: str) -> nn.Module:
        network = self._model().networks()[name]
        network.load_state_dict(torch.load(self.work / f"{stage}.pt", map_location="cpu")[name])
        return network.to(self.device).eval()

    def _judge(self) -> Judge:
        return load_judge(self.work / "judge.safetensors", self.device)

    def _autocast(self) -> torch.autocast:
        graphed = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=graphed, cache_enabled=False)

    def _tokens(self) -> Tensor:
        """Captions of the training pictures for both encoders: int32 [pictures, variants, 2, 77]."""
        ids = np.load(self.work / "tokens.npz")["tokens"].astype(np.int32)
        return torch.from_numpy(ids).unflatten(0, (-1, self.settings.variants)).to(self.device)

    def _dropped(self) -> Tensor:
        """What the unconditional rows say: nothing, or the published negative prompt. Int32 [2, 2, 77]."""
        return torch.from_numpy(self._tokenize(["", NEGATIVE_PROMPT]).astype(np.int32)).to(self.device)

    def _tokenize(self, texts: list[str]) -> np.ndarray:
        """Token ids of both encoders, int16 [texts, 2, 77]."""
        distinct = sorted(set(texts))
        at = {text: n for n, text in enumerate(distinct)}
        order = [at[text] for text in texts]
        both = []
        for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
            write_tokenizer(self.work / name, dataset.words(), pad)
            tokenizer = CLIPTokenizer.from_pretrained(self.work / name)
            ids = tokenizer(
                distinct, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="np"
            ).input_ids
            both.append(ids.astype(np.int16)[order])
        return np.stack(both, 1)

    @torch.no_grad()
    def _latents(self, vae: nn.Module, pictures: Tensor, scaled: bool = True) -> Tensor:
        factor = vae.config.scaling_factor if scaled else 1.0
        parts = [vae.encode(_signed(part)).latent_dist.mean * factor for part in pictures.split(512)]
        return torch.cat(parts)

    @torch.no_grad()
    def _redraw(self, vae: nn.Module, pictures: Tensor, noise: float) -> Tensor:
        """Pictures through the VAE, with up to `noise` of the latents' own spread added: uint8, same shape."""
        parts = []
        for part in pictures.split(512):
            latents = self._latents(vae, part)
            amount = noise * torch.rand(len(part), 1, 1, 1, device=self.device)
            latents = latents + amount * torch.randn_like(latents)
            with self._autocast():
                seen = vae.decode(latents / vae.config.scaling_factor).sample.float()
            parts.append((seen * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(parts)

    @torch.no_grad()
    def _embed(self, vision: nn.Module, pictures: Tensor) -> Tensor:
        resize = resizer(self.device)
        return torch.cat([vision(pixel_values=resize(part.float())).image_embeds for part in pictures.split(512)])

    def _gate(self, name: str, read: Tensor, truth: Tensor) -> None:
        right = (read == truth.cpu()).float().mean(0)
        found = dict(zip(dataset.TRAITS, map(float, right), strict=True))
        self.log("gate", what=name, **found)
        low = {trait: round(value, 3) for trait, value in found.items() if value < self.settings.floor}
        if low:
            raise GateError(f"{name}: {low} is below {self.settings.floor}")


def _signed(pictures: Tensor) -> Tensor:
    """Uint8 0 … 255 to float -1 … 1."""
    return pictures.float() / 127.5 - 1


def _edges(error: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def resizer(device: torch.device) -> Callable[[Tensor], Tensor]:
    """What the method does to a reference, as one matrix per side: 128 → 256 → CLIP's 224, bicubic, normalized."""
    side = torch.eye(128)[None, None]
    for size in (REFERENCE_PIXELS, CLIP_PIXELS):
        side = nnf.interpolate(side, size=(size, 128), mode="bicubic", antialias=True)
    matrix = side[0, 0].to(device)
    mean = torch.tensor(CLIP_MEAN, device=device)[:, None, None]
    std = torch.tensor(CLIP_STD, device=device)[:, None, None]
    return lambda pictures: ((matrix @ pictures @ matrix.T).clamp(0, 255) / 255 - mean) / std


@torch.no_grad()
def whiten(vae: nn.Module, latents: Tensor) -> None:
    """Shift and scale the latents' channels inside the VAE's own 1×1 convolutions, an exact change of variables, so
    that published SDXL's `scaling_factor` gives zero mean and unit deviation."""
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * vae.config.scaling_factor
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= spread[None, :, None, None]
    into.weight[:4] /= spread[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / spread
    into.bias[4:] -= 2 * spread.log()


STAGES = ("data", "judge", "vae", "clip", "unet", "export")
_RESULTS = {"judge": "judge.safetensors", "vae": "vae.pt", "clip": "clip.pt", "unet": "unet.pt"}


def run(stages: tuple[str, ...], settings: Settings, work: Path, out: Path, seed: int = 0, again: bool = False) -> None:
    """Run stages in order; those whose result lies in `work` already are left as they are, or trained further
    (`again`).

    Raises:
        GateError: a stage's result isn't good enough.
    """
    training = Training(settings, work, seed)
    for stage in stages:
        if stage == "export":
            training.export(out)
        elif stage == "data" or again or not (work / _RESULTS[stage]).exists():
            getattr(training, stage)()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder of pictures, checkpoints and log.jsonl")
    parser.add_argument("--out", type=Path, help="folder of the finished model (default: WORK/model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="a few steps at a tiny size: shows that everything runs")
    parser.add_argument("--unet-seconds", type=float, help="longest training of the UNet")
    parser.add_argument("--continue", dest="again", action="store_true", help="train a finished stage further")
    options = parser.parse_args()
    settings = TOY if options.toy else FULL
    if options.unet_seconds:
        settings = replace(settings, unet=replace(settings.unet, seconds=options.unet_seconds))
    stages = STAGES if options.stage == "all" else (options.stage,)
    run(stages, settings, options.work, options.out or options.work / "model", options.seed, options.again)


if __name__ == "__main__":
    main()
