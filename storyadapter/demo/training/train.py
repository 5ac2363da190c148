"""Trains the demo model: `python -m storyadapter.demo.training.train all --work DIR --out DIR`, or only some stages.

Stages: data, judge, vae, clip, unet, export. Each leaves its result in the work folder, and a finished stage is not
done again, so a stopped run goes on by the same command. A gate that isn't met stops the run before the next stage;
the same command then trains that stage further. WORK/log.txt tells how the weights came about.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from storyadapter.checkpoint.tokenizer_files import load_tokenizer
from storyadapter.demo.held_out import split_visible
from storyadapter.demo.judge import Judge
from storyadapter.demo.training import dataset
from storyadapter.demo.training.attention import attach
from storyadapter.demo.training.judge import blemish, save_judge, trait_losses
from storyadapter.demo.training.loop import Budget, Step, optimize
from storyadapter.demo.training.networks import TINY, DemoConfig, build, write_model
from storyadapter.demo.training.pictures import embeddings_of, latents_of, redrawn, resizer, signed
from storyadapter.demo.training.rows import RowDraw
from storyadapter.demo.training.tokenizer import write_tokenizer
from storyadapter.demo.vocabulary import TRAITS
from storyadapter.method.constants import DDIM_CONFIG, NEGATIVE_PROMPT
from storyadapter.method.errors import InputError, RunError, StoryAdapterError
from storyadapter.runtime.conditioning import Tokenizers

TRAINED = {
    "judge": ("judge",),
    "vae": ("vae",),
    "clip": ("image_encoder", "text_encoder_2", "heads", "sharpness"),
    "unet": ("unet", "text_encoder", "text_encoder_2", "ip-adapter"),
}
STAGES = ("data", *TRAINED, "export")
TRAIT_SIZES = [len(values) for values in TRAITS.values()]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights; the defaults are those of the model that ships."""

    config: DemoConfig = DemoConfig()
    world: dataset.WorldSize = dataset.WorldSize(visible=192, identities=48, views=8)
    judge_pictures: int = 50_000
    test_pictures: int = 2_000
    judge: Budget = Budget(steps=4_000, batch=256, rate=2e-3, seconds=30)
    vae: Budget = Budget(steps=18_000, batch=16, rate=8e-4, seconds=160, average=0.998)
    clip: Budget = Budget(steps=20_000, batch=256, rate=1e-3, seconds=190, average=0.998)
    unet: Budget = Budget(steps=11_500, batch=512, rate=1e-3, seconds=270, average=0.999)
    floor: float = 0.95  # of every gate
    seed: int = 0  # of pictures, initial weights and batches


_TOY = Budget(steps=2, batch=4, rate=1e-3, average=0.9)
TOY = Settings(replace(TINY, pixels=128), dataset.WorldSize(3, 4, 2), 32, 16, _TOY, _TOY, _TOY, _TOY, floor=0, seed=1)


class Training:
    """The stages over one work folder. Each takes the networks as the stages before it left them."""

    def __init__(self, settings: Settings, work: Path, out: Path) -> None:
        self.settings, self.work, self.out = settings, work, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bf16 = torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda", cache_enabled=False)
        torch.backends.cudnn.benchmark = True
        work.mkdir(parents=True, exist_ok=True)
        self.sets: dict[str, tuple[Tensor, Tensor]] = {}  # pictures uint8 [n, 3, 128, 128], labels [n, traits]
        torch.manual_seed(settings.seed)
        self.model = build(settings.config, dataset.words())
        heads = nn.Linear(settings.config.embedding_width, sum(TRAIT_SIZES))
        sharpness = nn.ParameterDict({"log": nn.Parameter(torch.tensor(2.3))})
        helpers = {"heads": heads, "sharpness": sharpness, "judge": Judge()}
        self.networks: Any = nn.ModuleDict(self.model.networks() | helpers).eval()
        self.networks.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads lack it

    def run(self, stages: Sequence[str], again: bool = False) -> None:
        """Run stages in order; those that are finished are left as they are, or trained further (`again`).

        Raises:
            InputError: a stage needs one that isn't finished.
            RunError: a stage's result isn't good enough for the next, or a loss is not finite.
        """
        needed = STAGES[: STAGES.index(stages[-1]) + 1]
        for stage in [name for name in needed if name in TRAINED and name not in stages]:
            if not (self.work / f"{stage}.pt").exists():
                raise InputError(f"{stages[-1]} needs {stage}, which isn't finished in {self.work}: run it first")
        for stage in needed:
            for path in self.work.glob(f"{stage}.*pt"):  # what the stage left, see `_finish`
                for name, state in torch.load(path, map_location=self.device).items():
                    self.networks[name].load_state_dict(state)
            if stage == "data" or (stage in stages and (again or not (self.work / f"{stage}.pt").exists())):
                getattr(self, stage)()

    def log(self, stage: str, **values: float | int | str) -> None:
        """Write a line to the terminal and to log.txt, which documents the weights."""
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        line = f"{stage:6}  " + "  ".join(shown)
        print(line, flush=True)
        with (self.work / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def data(self) -> None:
        """Draw all pictures (the training world, the judge's own, held-out ones for the gates), tokenize captions."""
        settings, (_, held_out) = self.settings, split_visible()
        scene_sets = {
            "world": dataset.training_scenes(settings.world, settings.seed),
            "judge": dataset.mixed_scenes(settings.judge_pictures, settings.seed + 1),
            "test": dataset.mixed_scenes(settings.test_pictures, settings.seed + 2, held_out),
        }
        for name, scenes in scene_sets.items():
            if not (self.work / f"{name}.npy").exists():
                dataset.draw_all(scenes, self.work / f"{name}.npy")
                self.log("data", set=name, pictures=len(scenes))
            pictures = torch.from_numpy(np.load(self.work / f"{name}.npy")).to(self.device)
            labels = torch.from_numpy(dataset.label_table(scenes)).to(self.device)
            self.sets[name] = pictures.permute(0, 3, 1, 2).contiguous(), labels
        if not (self.work / "tokens.pt").exists():
            padding = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
            for name, pad in padding.items():
                write_tokenizer(self.work / name, dataset.words(), pad)
            tokenizers = Tokenizers(*(load_tokenizer(self.work / name) for name in padding))
            texts = [*dataset.captions(scene_sets["world"], 2, settings.seed), "", NEGATIVE_PROMPT]
            torch.save(torch.stack(tokenizers.input_ids(texts), 1), self.work / "tokens.pt")
        tokens = torch.load(self.work / "tokens.pt").to(self.device)  # of both encoders, int32 [texts, 2, 77]
        self.captions, self.dropped = tokens[:-2].unflatten(0, (-1, 2)), tokens[-2:]

    def judge(self) -> None:
        """Train the judge on drawings of its own. Gate: it reads every trait off held-out drawings."""
        pictures, labels = self.sets["judge"]
        judge = self.networks["judge"]

        def losses() -> dict[str, Tensor]:
            at = torch.randint(len(pictures), (self.settings.judge.batch,), device=self.device)
            seen = blemish(pictures[at]).contiguous(memory_format=torch.channels_last)
            with self._bf16:
                return {"traits": trait_losses(judge(seen), labels[at])}

        self._optimize("judge", losses, half=False)
        save_judge(judge, self.work / "judge.safetensors")
        self._finish("judge", {"judge on drawings": judge.read(self.sets["test"][0])})

    def vae(self) -> None:
        """Train the VAE. Gate: the judge reads every trait off its reconstructions."""
        pictures, _ = self.sets["world"]
        vae = self.networks["vae"]
        unit = vae.config.scaling_factor

        def losses() -> dict[str, Tensor]:
            at = torch.randint(len(pictures), (self.settings.vae.batch,), device=self.device)
            x = signed(pictures[at]).contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(x.to(vae.dtype)).latent_dist
            error = x - vae.decode(posterior.sample()).sample.float()
            coarse = nnf.avg_pool2d(error, 4)
            mean, spread = posterior.mean.float() * unit, posterior.logvar.float() + 2 * math.log(unit)
            return {
                "pixels": error.abs().mean() + 2 * (error**2).mean() + coarse.abs().mean(),
                "edges": 0.5 * (_edges(error) + _edges(nnf.avg_pool2d(error, 2))),
                "kl": 1e-3 * (mean**2 + spread.exp() - 1 - spread).mean(),
            }

        self._optimize("vae", losses)
        whiten(vae, self._latents(pictures[:: max(1, len(pictures) // 4096)]) / unit)
        test, _ = self.sets["test"]
        seen = self._redraw(test)
        self.log("vae", mean_absolute_error_of_255=float((signed(test) - signed(seen)).abs().mean()) * 127.5)
        self._finish("vae", {"judge on reconstructions": self.networks["judge"].read(seen)})

    def clip(self) -> None:
        """Train the CLIP pair, the image side also on every trait. Gate: its embedding tells every trait."""
        pictures, labels = self.sets["world"]
        redrawn, resize = self._redrawn, resizer(self.device)
        vision, text, heads, sharpness = (self.networks[name] for name in TRAINED["clip"])

        def losses() -> dict[str, Tensor]:
            at = torch.randint(len(pictures), (self.settings.clip.batch,), device=self.device)
            own, spoilt = torch.rand(2, len(at), 1, 1, 1, device=self.device) < 0.3
            seen = torch.where(own, pictures[at], redrawn[at]).float()
            seen = torch.where(spoilt, blemish(seen), seen)
            words = self.captions[at, torch.randint(2, at.shape, device=self.device)]
            image = vision(pixel_values=resize(seen)).image_embeds
            told = text(input_ids=words[:, 1]).text_embeds
            traits = trait_losses(heads(image).split(TRAIT_SIZES, 1), labels[at])
            match = nnf.normalize(image.float()) @ nnf.normalize(told.float()).T
            match = match * sharpness["log"].float().exp().clamp(max=50)
            truth = torch.arange(len(at), device=self.device)
            both = nnf.cross_entropy(match, truth) + nnf.cross_entropy(match.T, truth)
            return {"contrast": 0.1 * both, "traits": 6 * traits}

        def read(seen: Tensor) -> Tensor:
            logits = heads(self._embed(seen)).split(TRAIT_SIZES, 1)
            return torch.stack([part.argmax(1) for part in logits], 1)

        self._optimize("clip", losses)
        test, _ = self.sets["test"]
        kinds = {"drawings": test, "reconstructions": self._redraw(test)}
        self._finish("clip", {f"image encoder on {kind}": read(seen) for kind, seen in kinds.items()})

    def unet(self) -> None:
        """Train UNet, both text encoders and the adapter together, over λ = 0 and λ from 0.3 to 1."""
        pictures, labels = self.sets["world"]
        batch, size = self.settings.unet.batch, self.settings.config.pixels
        latents = self._latents(pictures)
        embeddings = torch.stack([self._embed(pictures), self._embed(self._redrawn)], 1)
        rows_of = RowDraw(self.settings.world, batch, latents, embeddings, self.captions, self.dropped, labels)
        unet, text, text_2, adapter = (self.networks[name] for name in TRAINED["unet"])
        attach(unet, adapter)
        schedule = DDIMScheduler(**DDIM_CONFIG)
        sizes = torch.tensor([size, size, 0, 0, size, size], device=self.device).repeat(batch, 1)

        def losses() -> dict[str, Tensor]:
            rows = rows_of()
            step = torch.randint(1000, (batch,), device=self.device)
            noise = torch.randn_like(rows.latents)
            noisy = schedule.add_noise(rows.latents, noise, step)
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
            snr = compute_snr(schedule, step)
            weight = snr.clamp(max=5) / snr  # min-SNR (arXiv 2303.09556), γ = 5
            return {"noise": (weight[:, None, None, None] * (guess.float() - noise) ** 2).mean()}

        self._optimize("unet", losses)
        self._finish("unet", {})

    def export(self) -> None:
        """Write the finished model in the published formats, in fp16."""
        write_model(self.model, self.out)
        self.log("export", bytes=sum(file.stat().st_size for file in self.out.rglob("*") if file.is_file()))

    @cached_property
    def _redrawn(self) -> Tensor:
        """The training pictures through the VAE, their latents disturbed a little: what generated pictures are like."""
        torch.manual_seed(self.settings.seed)
        return self._redraw(self.sets["world"][0], noise=0.25)

    def _optimize(self, stage: str, losses: Step, half: bool = True) -> None:
        torch.manual_seed(self.settings.seed)
        networks = [self.networks[name] for name in TRAINED[stage]]
        optimize(stage, losses, networks, getattr(self.settings, stage), self.log, half)

    def _finish(self, stage: str, readings: dict[str, Tensor]) -> None:
        """Keep a stage's result: as `stage.pt` if everything read off the test pictures meets the gate."""
        finished, unmet = self.work / f"{stage}.pt", self.work / f"{stage}.unmet.pt"
        torch.save({name: self.networks[name].state_dict() for name in TRAINED[stage]}, unmet)
        finished.unlink(missing_ok=True)
        low = []
        for what, read in readings.items():
            right = (read.cpu() == self.sets["test"][1].cpu()).float().mean(0)
            found = dict(zip(TRAITS, map(float, right), strict=True))
            self.log("gate", what=what, **found)
            low += [f"{what}: {trait} {part:.3f}" for trait, part in found.items() if part < self.settings.floor]
        if low:
            raise RunError(
                f"below {self.settings.floor}: {', '.join(low)}; to train {stage} further, repeat the command"
            )
        unmet.replace(finished)

    def _latents(self, pictures: Tensor) -> Tensor:
        return latents_of(self.networks["vae"], pictures)

    def _redraw(self, pictures: Tensor, noise: float = 0) -> Tensor:
        """Pictures through the VAE, see `redrawn`."""
        return redrawn(self.networks["vae"], self._latents(pictures), noise, self._bf16)

    def _embed(self, pictures: Tensor) -> Tensor:
        return embeddings_of(self.networks["image_encoder"], pictures)


def _edges(error: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Shift and scale the latents' channels inside the VAE's own 1×1 convolutions, an exact change of variables, so
    that published SDXL's `scaling_factor` gives zero mean and unit deviation."""
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * vae.config.scaling_factor
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= spread[None, :, None, None]
    into.weight[:4] /= spread[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / spread
    into.bias[4:] -= 2 * spread.log()


def main() -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE", help="{%(choices)s}")
    parser.add_argument("--work", type=Path, required=True, help="folder of pictures, checkpoints and log.txt")
    parser.add_argument("--out", type=Path, help="folder of the finished model (default: WORK/model)")
    parser.add_argument("--toy", action="store_true", help="a few steps at a tiny size: shows that everything runs")
    parser.add_argument("--unet-seconds", type=float, help="longest training of the UNet")
    parser.add_argument("--continue", dest="again", action="store_true", help="train finished stages further")
    options = parser.parse_args()
    settings = TOY if options.toy else Settings()
    if options.unet_seconds:
        settings = replace(settings, unet=replace(settings.unet, seconds=options.unet_seconds))
    training = Training(settings, options.work, options.out or options.work / "model")
    device = torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu"
    command = " ".join(("python -m storyadapter.demo.training.train", *sys.argv[1:]))
    training.log("run", command=command, torch=torch.__version__, device=device)
    try:
        training.run([stage for stage in STAGES if {stage, "all"} & {*options.stages}], options.again)
    except StoryAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
