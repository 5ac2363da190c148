"""The published fast mode at full size: `python -m storyadapter.bench.lcm_story --out FILE`.

A whole story with a UNet that takes the guidance as an embedding, 4 steps of LCM at guidance 8, random weights, with
every frame written to a folder that keeps those of the last iteration. Beside it the published way on the same device,
for a few frames: one frame after the other, attention with its scores in memory, all pictures of the story through CLIP
for every frame, the VAE in fp32.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from storyadapter.bench.environment import describe, watch
from storyadapter.bench.model import BenchmarkModel, Opened
from storyadapter.bench.options import EngineChoice, add_count, add_engine_options, add_report_options, check_least
from storyadapter.bench.report import check_out, give_report, opening, table
from storyadapter.bench.synthetic import MODELS
from storyadapter.bench.throughput.inputs import SEED, prompts
from storyadapter.bench.throughput.published import install, materialized, reference_tokens
from storyadapter.bench.timing import measure_run
from storyadapter.cli.main import Parser, run_program
from storyadapter.engine.backend import default_device
from storyadapter.method import constants
from storyadapter.method.events import Event, FrameFinished, IterationFinished, RunFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.presets import PRESETS
from storyadapter.method.sampler import build_sampler, scale_input, step, timestep_at
from storyadapter.method.story import Story
from storyadapter.model.contract import Range, ShapeRanges
from storyadapter.model.networks import TORCH_DTYPES
from storyadapter.output.run_folder import RunFolder
from storyadapter.runtime.denoising import guidance_embedding
from storyadapter.runtime.pictures import clip_pixels, to_picture

_PRESET: Final = PRESETS["lcm"].settings
_TIMED: Final = 5  # frames of the published way


def build_parser() -> Parser:
    """The command's options."""
    parser = Parser(prog="python -m storyadapter.bench.lcm_story", description=__doc__)
    models = tuple(name for name in MODELS if name.endswith("-lcm"))
    parser.add_argument("--synthetic-weights", choices=models, default="sdxl-lcm", help="sizes (default: %(default)s)")
    add_count(parser, "--frames", 100, "of the story", "N")
    add_count(parser, "--iterations", constants.ITERATIONS, "after the first", "K")
    add_count(parser, "--max-frames", 16, "frames drawn together", "F")
    add_engine_options(parser, backend="that draws; its engine is built first", default="inductor")
    parser.add_argument(
        "--vae-precision", choices=("fp32", "fp16", "bf16"), help="of the VAE (default: that of the other networks)"
    )
    add_report_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print and write. Raises EngineBuildError: the engine can't be built."""
    check_least(args, frames=1, iterations=1, max_frames=1)
    check_out(args.out)
    engine = EngineChoice.typed(args)
    engine = replace(engine, vae=args.vae_precision or engine.precision)
    model = BenchmarkModel.synthetic(args.synthetic_weights, engine, default_device())
    own = Range(model.checkpoint.geometry.default_pixels, model.checkpoint.geometry.default_pixels)
    ranges = ShapeRanges(args.max_frames, max(args.frames, 2), own, own)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    opened = model.open(ranges, tell)
    story, build_seconds = _draw(model, opened, args, tell), opened.build_seconds
    del opened
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    published = _published(model, args.frames, tell)
    projected = args.frames * (published["first"] + args.iterations * published["later"])
    data = {
        "kind": "lcm_story",
        "version": 1,
        "environment": describe(model.device, args.commit),
        "model": model.label,
        "numerics": str(model.numerics),
        "frames": args.frames,
        "iterations": args.iterations,
        "max_frames": args.max_frames,
        "build_seconds": build_seconds,
        "story": story,
        "published": published | {"projected_seconds": projected, "frames_timed": _TIMED},
    }
    give_report(args.out, _page(data), data)
    return 0


def _draw(model: BenchmarkModel, opened: Opened, args: argparse.Namespace, tell: Callable[[str], None]) -> Any:
    """The story, after one of the same frames with one iteration, which records graphs and measures memory."""
    pipeline = model.pipeline(opened.networks)
    plan = model.plan(iterations=args.iterations, seed=SEED, max_frames=args.max_frames, **_PRESET)
    text = Story(tuple(prompts(args.frames)), style="none")

    def draw(plan: RunPlan, folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {"iterations": [], "finished": 0}
        began, scales = time.perf_counter(), (None, *plan.scales)
        with RunFolder.open(folder, {}, frames=args.frames, scales=scales, keep="last") as store:
            follow(pipeline.run(text, plan, store=store), found, began)
        return found

    def follow(events: Iterable[Event], found: dict[str, Any], began: float) -> None:
        for event in events:
            match event:
                case FrameFinished():
                    found["finished"] += 1
                case IterationFinished():
                    found["iterations"].append(time.perf_counter() - began)
                case RunFinished():
                    found["stages"] = dict(event.seconds)

    with tempfile.TemporaryDirectory() as folder:
        tell("warming up")
        draw(replace(plan, scales=plan.scales[-1:]), Path(folder, "warm-up"))
        tell("drawing the story")
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with watch(model.device) as load:
            found, seconds = measure_run(partial(draw, plan, Path(folder, "story")), model.device)
    tell(f"{seconds:.1f} s")
    rows = pipeline.decided(plan).unet_rows(args.frames)
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    more = {"seconds": seconds, "unet_rows": rows, "rows_per_second": rows / seconds, "peak_bytes": peak}
    return found | more | {"load": load.as_data()}


def _published(model: BenchmarkModel, frames: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a frame of the published way, by stage: of iteration 0 (`first`) and of the later ones."""
    tell("the published way")
    device, dtype, checkpoint = model.device, TORCH_DTYPES[model.engine.precision], model.checkpoint
    geometry = checkpoint.geometry
    side, square = geometry.sample_size, constants.REFERENCE_PIXELS
    unet, adapter = checkpoint.load("unet", dtype), checkpoint.load_ip_adapter(dtype)
    vae, vision = checkpoint.load("vae", torch.float32), checkpoint.load("image_encoder", dtype)
    encoders = checkpoint.load("text_encoder", dtype), checkpoint.load("text_encoder_2", dtype)
    tokenizers = model.tokenizers()
    sampler = build_sampler("lcm", _PRESET["steps"], prediction_type=model.prediction_type)
    coefficients = sampler.coefficients(device)
    generator = torch.Generator().manual_seed(SEED)
    pictures = [
        to_picture(torch.randint(256, (square, square, 3), generator=generator, dtype=torch.uint8))
        for _ in range(frames)  # which are made smaller once per iteration
    ]
    condition = guidance_embedding(torch.tensor([_PRESET["guidance"]]), geometry.guidance_embedding).to(device, dtype)
    sizes = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], device=device, dtype=dtype)
    spent: dict[str, list[float]] = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        with torch.inference_mode():
            result, seconds = measure_run(call, device)
        spent.setdefault(stage, []).append(seconds)
        return result

    def text() -> tuple[Tensor, Tensor]:
        ids = [one.to(device) for one in tokenizers.input_ids(["a fox is reading a book"])]
        first, second = (encoder(one, output_hidden_states=True) for encoder, one in zip(encoders, ids, strict=True))
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def references() -> Tensor:
        pixels = torch.stack([clip_pixels(picture) for picture in pictures]).to(device, dtype)
        return reference_tokens(adapter, vision(pixels).image_embeds).unsqueeze(0)

    def denoise(hidden: Tensor, pooled: Tensor) -> Tensor:
        x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(SEED)).to(device)
        for call in range(sampler.calls):
            at = torch.full((1,), call, dtype=torch.int64, device=device)
            latents = scale_input(coefficients, at, x).to(dtype)
            added = {"text_embeds": pooled, "time_ids": sizes}
            times = timestep_at(coefficients, at)[0]
            out = unet(latents, times, hidden, timestep_cond=condition, added_cond_kwargs=added, return_dict=False)[0]
            x, _ = step(coefficients, at, x, out, None, torch.randn_like(x))
        return x

    def decode(x: Tensor) -> Any:
        image = vae.decode(x / vae.config.scaling_factor).sample
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    for frame in range(_TIMED + 1):
        if frame == 1:  # the first warms up
            spent.clear()
        hidden, pooled = timed("text", text)
        tokens = timed("references", references)
        nothing = torch.zeros_like(tokens[:, : constants.TOKENS_PER_IMAGE])
        for stage, seen, scale in (("denoise, iteration 0", nothing, 0.0), ("denoise", tokens, constants.LAST_SCALE)):
            install(unet, adapter, materialized, scale)
            rows = torch.cat((hidden, seen), dim=1)
            x = timed(stage, partial(denoise, rows, pooled))
        timed("decode", partial(decode, x))
    stages = {stage: statistics.median(values) for stage, values in spent.items()}
    both = stages["text"] + stages["decode"]
    return {
        "stages": stages,
        "first": both + stages["denoise, iteration 0"],
        "later": both + stages["references"] + stages["denoise"],
    }


def _page(data: dict[str, Any]) -> str:
    story, published = data["story"], data["published"]
    facts = {name: data[name] for name in ("model", "numerics", "frames", "iterations", "max_frames")}
    lines = opening("The published fast mode, a whole story", data["environment"] | facts)
    lines += [
        f"**{story['seconds']:.1f} s** for {story['finished']} frames in all iterations, "
        f"{story['rows_per_second']:.1f} rows a second, {story['seconds'] / data['frames']:.2f} s per frame of the "
        f"story, at most {story['peak_bytes'] / 2**30:.1f} GiB. The engine was built before, in "
        f"{data['build_seconds']:.0f} s.",
        "",
        "Seconds by stage; stages overlap, so that their sum is more than the whole:",
        "",
        *table(("stage", "seconds"), [(name, f"{value:.1f}") for name, value in story["stages"].items()]),
        "",
        f"The published way on the same device, median of {published['frames_timed']} frames with {data['frames']} "
        f"references, one frame after the other: {published['later']:.2f} s per frame and iteration, "
        f"{published['first']:.2f} s in iteration 0; projected for the story: "
        f"**{published['projected_seconds']:.0f} s**.",
        "",
        *table(("stage", "seconds"), [(name, f"{value:.3f}") for name, value in published["stages"].items()]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_program(build_parser()))
