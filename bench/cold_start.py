"""Where the seconds go between typing `run` and its first step: `python -m storyadapter.bench.cold_start FOLDER`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storyadapter.bench.options import add_count
from storyadapter.bench.report import opening, table
from storyadapter.cli.main import Parser, run_program
from storyadapter.method.errors import RunError

_PROMPTS = ("a", "b", "c", "d", "e", "f", "g", "h")


def build_parser() -> Parser:
    """The command's options; imports nothing heavy."""
    parser = Parser(
        prog="python -m storyadapter.bench.cold_start",
        description="Writes a model of random weights into FOLDER in the published layout, builds its engine there, "
        "draws a story in one process after the other, and prints what each says of its start. What was read a moment "
        "before is in the page cache. FOLDER takes 12 GB with --size sdxl.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="empty, or of an earlier call, whose model is used")
    parser.add_argument("--size", default="sdxl", choices=("sdxl", "toy"), help="of the model (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="as of run (default: %(default)s)")
    add_count(parser, "--pixels", 1024, "of a frame's sides", "N")
    add_count(parser, "--steps", 20, "denoising steps")
    add_count(parser, "--runs", 3, "processes that draw", "N")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Raises RunError: a command fails."""
    model, folder = args.folder / "model", args.folder.resolve()
    if not (model / "model_index.json").exists():
        write_model(args.size, model)
    own = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    words = [*("--base-model", model, "--image-encoder", model / "image_encoder"), "--ip-adapter"]
    words += [model / "ip-adapter.safetensors", "--backend", args.backend]
    words += ["--height", args.pixels, "--width", args.pixels, "--quiet"]
    _program(["build", *words, "--max-frames", len(_PROMPTS), "--max-references", 2 * len(_PROMPTS)], own)
    drawing = ["--prompt", *_PROMPTS, "--style", "none", "--steps", args.steps, "--iterations", 1, "--seed", 1]
    starts: list[dict[str, float]] = []
    for number in range(args.runs):
        out = folder / f"run-{number}"
        shutil.rmtree(out, ignore_errors=True)
        _program(["run", *words, *drawing, "--out", out], own)
        record = json.loads((out / "story.json").read_text(encoding="utf-8"))
        starts.append(record["sessions"][-1]["start"])
    parts = list(dict.fromkeys(part for start in starts for part in start))
    rows = [[part, *(f"{start.get(part, 0.0):.2f}" for start in starts)] for part in parts]
    rows.append(["together", *(f"{sum(start.values()):.1f}" for start in starts)])
    header = ["part", *(f"run {number + 1}" for number in range(len(starts)))]
    from storyadapter.bench.environment import describe  # PyTorch, which the processes above needn't wait for
    from storyadapter.engine.backend import default_device

    print("\n".join([*opening("Cold start: seconds", describe(default_device())), *table(header, rows)]))
    return 0


def write_model(size: str, folder: Path) -> None:
    """A model of seeded random weights in fp16, as diffusers and IP-Adapter save theirs."""
    import torch
    from safetensors.torch import save_file

    from storyadapter.bench.synthetic import MODELS, PREDICTION_TYPE, SyntheticCheckpoint
    from storyadapter.checkpoint.ip_adapter import cross_attentions
    from storyadapter.checkpoint.outline import Outline
    from storyadapter.demo.shipped import MODEL

    made = SyntheticCheckpoint(MODELS[size], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    places: dict[str, int] = {}
    for part in ("unet", "text_encoder", "text_encoder_2", "vae", "image_encoder"):
        network: Any = made.load(part, torch.float16)
        if part == "unet":
            places = {layer.module: layer.index for layer in cross_attentions(Outline.of(network))}
        network.cpu().save_pretrained(folder / part, max_shard_size="100GB")
    adapter = made.load_ip_adapter(torch.float16)
    tensors = {"image_proj.proj.weight": adapter.projection_weight, "image_proj.proj.bias": adapter.projection_bias}
    tensors |= {"image_proj.norm.weight": adapter.norm_weight, "image_proj.norm.bias": adapter.norm_bias}
    for layer in adapter.layers:
        own = f"ip_adapter.{places[layer.module]}"
        tensors |= {f"{own}.to_k_ip.weight": layer.to_k, f"{own}.to_v_ip.weight": layer.to_v}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "ip-adapter.safetensors")
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(MODEL / part, folder / part, dirs_exist_ok=True)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text(encoding="utf-8")) | {"prediction_type": PREDICTION_TYPE}
    scheduler.write_text(json.dumps(settings), encoding="utf-8")
    shutil.copyfile(MODEL / "model_index.json", folder / "model_index.json")  # the last: it says that all is there


def _program(words: Sequence[Any], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "storyadapter", *map(str, words)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{words[0]} failed: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(run_program(build_parser()))
