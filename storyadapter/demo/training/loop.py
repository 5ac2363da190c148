"""One training loop for every stage: AdamW, warm-up and cosine decay, moving average, one CUDA graph per step."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from storyadapter.method.errors import RunError

Step = Callable[[], dict[str, Tensor]]  # named scalar losses
Log = Callable[..., None]  # called with the stage's name and values by name


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: whichever of `steps` and `seconds` ends first (the decay follows the nearer end)."""

    steps: int
    batch: int
    rate: float
    seconds: float = math.inf
    average: float = 0.0  # decay of the moving average of the weights; 0: the last weights are kept


def optimize(stage: str, losses: Step, networks: Iterable[nn.Module], budget: Budget, log: Log, half: bool) -> None:
    """Train `networks` on the sum of `losses()`, which draws its own batch on the device.

    On CUDA the whole step (batch, forward, backward, update) is one captured graph. With `half`, the networks compute
    in bf16, from fp32 weights that only the update sees.

    Raises:
        RunError: a loss is not finite.
    """
    trained = nn.ModuleList(networks).train()
    used: list[Tensor] = [p for p in trained.parameters() if p.requires_grad]
    weights = [p.detach().clone().requires_grad_() for p in used]
    if half:
        trained.bfloat16()
    for p, weight in zip(used, weights, strict=True):
        p.grad, weight.grad = torch.zeros_like(p), torch.zeros_like(weight)
    gradients = [p.grad for p in used if p.grad is not None]
    on_cuda = used[0].is_cuda
    rate = torch.tensor(0.0, device=used[0].device)  # a tensor, so that the graph sees it change
    matrices, vectors = [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=on_cuda, capturable=on_cuda)
    averages = EMAModel(weights, decay=budget.average, foreach=True)

    def step() -> dict[str, Tensor]:
        torch._foreach_zero_(gradients)
        parts = losses()
        torch.stack([part.float() for part in parts.values()]).sum().backward()
        with torch.no_grad():
            torch._foreach_copy_([weight.grad for weight in weights if weight.grad is not None], gradients)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            torch._foreach_copy_(used, weights)
        return {name: part.detach() for name, part in parts.items()}

    run = _captured(step) if on_cuda else step
    began, logged, done = time.monotonic(), -math.inf, 0
    while (progress := max(done / budget.steps, (time.monotonic() - began) / budget.seconds)) < 1:
        rate.fill_(budget.rate * min((done + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * progress)))
        parts = run()
        averages.step(weights)
        done += 1
        if done % 200 and done < budget.steps:
            continue
        values = {name: float(part) for name, part in parts.items()}
        now = time.monotonic()
        if not all(map(math.isfinite, values.values())):
            raise RunError(f"{stage}: loss at step {done} is not finite: {values}")
        if now - logged > 10 or done == budget.steps:
            log(stage, step=done, seconds=round(now - began, 1), **values)
            logged = now
    trained.float().eval()
    averages.copy_to(used)
    trained.zero_grad()
    log(stage, finished=done, seconds=round(time.monotonic() - began, 1))


def _captured(step: Step) -> Step:
    """The step as one CUDA graph; it is warmed up with a learning rate of 0."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay
