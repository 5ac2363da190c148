"""Distils the demo model into an LCM-LoRA: `python -m storyadapter.demo.training.lcm_lora --work DIR --out FILE`.

Latent consistency distillation (arXiv 2310.04378, algorithm 1; as LoRA arXiv 2311.05556): at a noisy latent the student
shall predict the same picture as at the latent one DDIM step of the guided teacher further on. Guidance, negative
prompt and empty references of unconditional rows are the method's and become part of the LoRA, which is drawn without
unconditional rows. References and λ of the rows are those of the UNet's own training.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import LCMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from storyadapter.demo.shipped import MODEL
from storyadapter.demo.training import dataset
from storyadapter.demo.training.batched import BatchedMethod, input_ids
from storyadapter.demo.training.loop import Budget, optimize
from storyadapter.demo.training.pictures import embeddings_of, latents_of, redrawn
from storyadapter.demo.training.rows import SLOTS, RowDraw, Rows
from storyadapter.method.constants import DDIM_CONFIG, GUIDANCE, NEGATIVE_PROMPT, TRAIN_STEPS


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights; the defaults are for a GPU, on which networks compute in bf16."""

    world: dataset.WorldSize = dataset.WorldSize(visible=192, identities=24, views=8)
    budget: Budget = Budget(steps=40_000, batch=512, rate=1e-3, seconds=180, average=0.995)
    rank: int = 8
    numbers: int = 180_000  # of the file, at most
    grid: int = 50  # DDIM steps of the teacher, which are the time steps that a student may be asked for
    seed: int = 0


# for a machine without a GPU, in fp32: those of the LoRA that ships
SMALL = Settings(
    dataset.WorldSize(visible=48, identities=4, views=4),
    Budget(steps=40_000, batch=32, rate=1e-3, seconds=900, average=0.95),
)
TOY = Settings(dataset.WorldSize(3, 4, 2), Budget(steps=2, batch=4, rate=1e-3, average=0.9), rank=2, seed=1)


class LowRank(nn.Module):
    """What a LoRA adds to every linear layer and convolution of a network: up · down, at first nothing."""

    def __init__(self, network: nn.Module, rank: int) -> None:
        super().__init__()
        layers = {n: part for n, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
        self.names = tuple(layers)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            weight = layer.weight
            size = min(rank, weight.shape[0], weight.shape[1])
            self.down.append(torch.randn(size, *weight.shape[1:]) / weight[0].numel() ** 0.5)
            self.up.append(torch.zeros(weight.shape[0], size, *(1 for _ in weight.shape[2:])))

    def added_to(self, network: nn.Module) -> dict[str, Tensor]:
        """The weights of the network's layers with what is added to them, by name."""
        changed = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            weight = network.get_parameter(f"{name}.weight")
            changed[f"{name}.weight"] = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
        return changed

    @torch.no_grad()
    def tensors(self, network: nn.Module, numbers: int) -> dict[str, Tensor]:
        """As a LoRA file of diffusers has them, in fp16, with at most so many numbers.

        Kept are the singular components of what is added that change their layer most, in proportion to its weight,
        for each number that they take.
        """
        parts, ranked = {}, []
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            weight = network.get_parameter(f"{name}.weight").detach().float().cpu()
            both = [side.detach().float().cpu() for side in (up, down)]
            u, s, v = torch.linalg.svd(both[0].flatten(1) @ both[1].flatten(1), full_matrices=False)
            parts[name] = u * s.sqrt(), s.sqrt()[:, None] * v, down.shape[1:], up.shape[2:]
            size = len(u) + v.shape[1]
            ranked += [(float((s[n] / weight.norm()) ** 2 / size), size, name) for n in range(len(down))]
        count: Counter[str] = Counter()
        for _, size, name in sorted(ranked, reverse=True):
            if size <= numbers:
                numbers -= size
                count[name] += 1
        found = {}
        for name, kept in count.items():
            up, down, inner, outer = parts[name]
            found[f"unet.{name}.lora_A.weight"] = down[:kept].reshape(kept, *inner).half().contiguous()
            found[f"unet.{name}.lora_B.weight"] = up[:, :kept].reshape(-1, kept, *outer).half().contiguous()
        return found


class Distillation:
    """The loss of a batch, over the networks of a demo model; `method` holds them."""

    def __init__(self, method: BatchedMethod, lora: LowRank, rows_of: RowDraw, negative: Tensor, grid: int) -> None:
        """`negative`: its tokens for both encoders, int32 [2, 77]."""
        self.method, self.lora, self.rows_of = method, lora, rows_of
        device, batch, unet = method.device, rows_of.batch, method.unet
        side = 8 * unet.config.sample_size
        self.sizes = torch.tensor([side, side, 0, 0, side, side], device=device).repeat(batch, 1)
        self.schedule = LCMScheduler(**DDIM_CONFIG)
        self.signal = self.schedule.alphas_cumprod.to(device).sqrt()
        self.spread = (1 - self.schedule.alphas_cumprod.to(device)).sqrt()
        self.times = torch.arange(1, grid + 1, device=device) * (TRAIN_STEPS // grid) - 1
        with torch.no_grad():
            hidden, pooled = self._texts(negative[None])
            nothing = method.adapter.tokens(
                torch.zeros(1, SLOTS, method.adapter.embedding_width, device=device, dtype=unet.dtype)
            )
        self.free = hidden.expand(batch, -1, -1), pooled.expand(batch, -1), nothing.expand(batch, -1, -1, -1)

    def __call__(self) -> dict[str, Tensor]:
        rows, device = self.rows_of(), self.method.device
        index = torch.randint(len(self.times), (self.rows_of.batch,), device=device)
        late = self.times[index]
        early = torch.where(index > 0, self.times[index - 1], 0)
        x = self._mix(rows.latents, torch.randn_like(rows.latents), late)
        with torch.no_grad():
            told = *self._texts(rows.tokens), self.method.adapter.tokens(rows.references.to(self.method.unet.dtype))
            teacher: dict[str, Tensor] = {}  # its own weights
            both = [torch.cat(pair) for pair in zip(self.free, told, strict=True)]
            plain, guided = self._noise(teacher, torch.cat([x, x]), torch.cat([late, late]), both, rows, 2).chunk(2)
            noise = plain + GUIDANCE * (guided - plain)
            before = self._mix(self._picture(x, noise, late), noise, early)
        changed = self.lora.added_to(self.method.unet)
        with torch.no_grad():
            kept = {name: weight.detach() for name, weight in changed.items()}
            target = self._consistent(before, early, self._noise(kept, before, early, told, rows))
        guess = self._consistent(x, late, self._noise(changed, x, late, told, rows))
        return {"consistency": (((guess - target) ** 2 + 1e-6).sqrt() - 1e-3).mean()}  # pseudo-Huber

    def _texts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int32 [n, 2, 77] → hidden states [n, 77, E], pooled text [n, D]."""
        first, second = self.method.encoders
        one = first(input_ids=tokens[:, 0], output_hidden_states=True)
        two = second(input_ids=tokens[:, 1], output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds

    def _noise(
        self,
        weights: dict[str, Tensor],
        x: Tensor,
        step: Tensor,
        told: list[Tensor] | tuple,
        rows: Rows,
        times: int = 1,
    ) -> Tensor:
        """The UNet's prediction with these weights in place of its own, [n, 4, h, w] fp32; `times` the batch's rows."""
        unet, (hidden, pooled, references) = self.method.unet, told
        keywords = {
            "encoder_hidden_states": hidden.to(unet.dtype),
            "added_cond_kwargs": {"text_embeds": pooled.to(unet.dtype), "time_ids": self.sizes.repeat(times, 1)},
            "cross_attention_kwargs": {
                "references": references.flatten(1, 2),
                "reference_mask": rows.mask.repeat(times, 1, 1, 1),
                "reference_scale": rows.scale.repeat(times, 1, 1),
            },
        }
        pictures = x.to(unet.dtype).contiguous(memory_format=torch.channels_last)
        return functional_call(unet, weights, (pictures, step), keywords).sample.float()

    def _mix(self, picture: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        return self._at(self.signal, step) * picture + self._at(self.spread, step) * noise

    def _picture(self, x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        return (x - self._at(self.spread, step) * noise) / self._at(self.signal, step)

    def _consistent(self, x: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """The predicted picture, which at step 0 is x itself."""
        skip, out = self.schedule.get_scalings_for_boundary_condition_discrete(step[:, None, None, None].float())
        return skip * x + out * self._picture(x, noise, step)

    @staticmethod
    def _at(values: Tensor, step: Tensor) -> Tensor:
        return values[step][:, None, None, None]


def train(settings: Settings, model: Path, work: Path, out: Path) -> None:
    """Draw the training pictures (once per work folder), distil, and write the LoRA.

    Raises:
        RunError: a loss is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    work.mkdir(parents=True, exist_ok=True)

    def log(stage: str, **values: float | int | str) -> None:
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        line = f"{stage:6}  " + "  ".join(shown)
        print(line, flush=True)
        with (work / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    command = " ".join(("python -m storyadapter.demo.training.lcm_lora", *sys.argv[1:]))
    log("run", command=command, torch=torch.__version__, device=where)
    scenes = dataset.training_scenes(settings.world, settings.seed)
    drawings = work / f"world-{len(scenes)}.npy"
    if not drawings.exists():
        dataset.draw_all(scenes, drawings)
        log("data", pictures=len(scenes))
    torch.manual_seed(settings.seed)
    method = BatchedMethod(model, str(device))
    for network in (method.unet, method.vae, method.vision, method.adapter, *method.encoders):
        network.requires_grad_(False)
    pictures = torch.from_numpy(np.load(drawings)).to(device).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(dataset.label_table(scenes)).to(device)
    latents = latents_of(method.vae, pictures)
    again = redrawn(method.vae, latents, noise=0.25)  # as for the UNet's own training
    embeddings = torch.stack([embeddings_of(method.vision, part) for part in (pictures, again)], 1)
    texts = [*dataset.captions(scenes, 2, settings.seed), NEGATIVE_PROMPT]
    tokens = torch.stack([input_ids(tokenizer, texts) for tokenizer in method.tokenizers], 1).to(device)
    captions, negative = tokens[:-1].unflatten(0, (-1, 2)), tokens[-1]
    lora = LowRank(method.unet, settings.rank).to(device)
    log("data", parameters=sum(p.numel() for p in lora.parameters()))
    half = device.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    nn.Module.to(method.unet, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.adapter.to(dtype)
    rows_of = RowDraw(
        settings.world,
        settings.budget.batch,
        latents,
        embeddings,
        captions,
        tokens[-1:].repeat(2, 1, 1),
        labels,
        free=0,
    )
    losses = Distillation(method, lora, rows_of, negative, settings.grid)
    torch.manual_seed(settings.seed)
    optimize("lcm", losses, [lora], settings.budget, log, half)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora.tensors(method.unet, settings.numbers), out, metadata={"format": "pt", "license": "MIT"})
    log("export", bytes=out.stat().st_size)


def main() -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of pictures and log.txt")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a demo model (default: the shipped one)")
    parser.add_argument("--out", type=Path, help="the file (default: WORK/lcm-lora.safetensors)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--small", action="store_true", help="few pictures and small batches, for a machine without a GPU"
    )
    size.add_argument("--toy", action="store_true", help="a few steps at a tiny size: shows that everything runs")
    parser.add_argument("--seconds", type=float, help="longest training")
    options = parser.parse_args()
    settings = TOY if options.toy else SMALL if options.small else Settings()
    if options.seconds:
        settings = replace(settings, budget=replace(settings.budget, seconds=options.seconds))
    train(settings, options.model, options.work, options.out or options.work / "lcm-lora.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
