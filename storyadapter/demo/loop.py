"""One training loop for every stage: AdamW, warm-up and cosine decay, moving average, one CUDA graph per step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: whichever of `steps` and `seconds` ends first (the decay follows the nearer end)."""

    steps: int
    batch: int
    rate: float
    seconds: float = math.inf
    average: float = 0.0  # decay of the moving average of the weights; 0: the last weights are kept


class Log:
    """Writes each line to the terminal and as JSON to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, stage: str, **values: float | int | str) -> None:
        shown = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{stage}: {shown}", flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")


def optimize(
    stage: str,
    losses: Callable[[], dict[str, Tensor]],
    modules: Iterable[nn.Module],
    budget: Budget,
    log: Log,
    checkpoint: Path | None = None,
    half: bool = False,
    save_every: float = 60,
) -> None:
    """Train `modules` on the sum of `losses()`, which draws its own batch on the device.

    On CUDA the whole step (batch, forward, backward, update) is one captured graph.

    Args:
        stage: name in the log.
        losses: named scalar losses that are added up.
        modules: networks with the weights to train.
        budget: length, learning rate, averaging.
        log: where losses go.
        checkpoint: file for a stopped run to go on from; it is removed at the end.
        save_every: seconds between checkpoints, at the least.
        half: the networks compute in bf16, from fp32 weights that only the update sees.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    modules = list(modules)
    used = [p for module in modules for p in module.parameters() if p.requires_grad]
    weights = [p.detach().clone() for p in used]
    if half:
        for module in modules:
            module.bfloat16()
    device = used[0].device
    graphed = device.type == "cuda"
    rate = torch.tensor(0.0, device=device)
    for p, weight in zip(used, weights, strict=True):
        p.grad = torch.zeros_like(p)
        weight.grad = torch.zeros_like(weight)
    gradients = [p.grad for p in used]
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.01},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.99),
        fused=graphed,
        capturable=graphed,
    )
    averages = [weight.clone() for weight in weights] if budget.average else []
    decay = torch.tensor(1.0, device=device)  # the graph is warmed up without touching the averages

    def step() -> dict[str, Tensor]:
        torch._foreach_zero_(gradients)
        parts = losses()
        torch.stack([part.float() for part in parts.values()]).sum().backward()
        torch._foreach_copy_([weight.grad for weight in weights], gradients)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_copy_([p.data for p in used], weights)
        if averages:
            moves = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(moves, 1 - decay)
            torch._foreach_add_(averages, moves)
        return {name: part.detach() for name, part in parts.items()}

    start, spent = 0, 0.0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        start, spent = state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, kept in zip([*weights, *averages], [*state["weights"], *state["averages"]], strict=True):
            p.copy_(kept)
        torch._foreach_copy_([p.data for p in used], weights)
    run = _captured(step) if graphed else step
    done = start
    began, saved, logged = time.monotonic() - spent, time.monotonic(), time.monotonic()
    for n in range(start, budget.steps):
        progress = max(n / budget.steps, (time.monotonic() - began) / budget.seconds)
        if progress >= 1:
            break
        rate.fill_(budget.rate * min((n + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * progress)))
        decay.fill_(min(budget.average, (1 + n) / (10 + n)))
        parts = run()
        done = n + 1
        if n % 200 == 199 or n + 1 == budget.steps:
            values = {name: float(part) for name, part in parts.items()}
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(f"{stage}: loss at step {n + 1} is not finite: {values}")
            if time.monotonic() - logged > 10 or n == 199 or n + 1 == budget.steps:
                log(stage, step=n + 1, seconds=round(time.monotonic() - began, 1), **values)
                logged = time.monotonic()
            if checkpoint and time.monotonic() - saved >= save_every:
                _save(checkpoint, n + 1, time.monotonic() - began, optimizer, weights, averages)
                saved = time.monotonic()
    for module in modules:
        module.float()
    for p, final in zip(used, averages or weights, strict=True):
        p.data.copy_(final)
        p.grad = None
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    log(stage, finished=done, seconds=round(time.monotonic() - began, 1))


def _captured(step: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # with a learning rate of 0
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay


def _save(
    path: Path,
    step: int,
    seconds: float,
    optimizer: torch.optim.Optimizer,
    weights: list[Tensor],
    averages: list[Tensor],
) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "optimizer": optimizer.state_dict(),
        "weights": weights,
        "averages": averages,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
