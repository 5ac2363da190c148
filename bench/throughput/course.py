"""The course of `bench throughput`, once its options are checked."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from storyadapter.bench.environment import describe
from storyadapter.bench.kernel_classes import KernelTimes, profile_call
from storyadapter.bench.operations import count_operations
from storyadapter.bench.progress import Progress
from storyadapter.bench.subject import Subject
from storyadapter.bench.throughput import cases as tables
from storyadapter.bench.throughput.cases import Case, StoryCase, chosen, ranges
from storyadapter.bench.throughput.chart import chart
from storyadapter.bench.throughput.inputs import CaseInputs, make_inputs
from storyadapter.bench.throughput.ladder import (
    FAILED,
    MEASURED,
    NOT_RUN,
    WRONG,
    Ladder,
    Pictures,
    RungResult,
    endless,
    failure,
    runs,
)
from storyadapter.bench.throughput.page import markdown
from storyadapter.bench.throughput.report_data import Findings, as_data
from storyadapter.bench.throughput.rivals import RIVALS
from storyadapter.bench.throughput.rungs import LADDER, Rung
from storyadapter.bench.throughput.story import (
    MIN_PSNR,
    Drawn,
    StoryResult,
    draw_in_sequence,
    draw_overlapped,
    measure_story,
)
from storyadapter.bench.throughput.workbench import Workbench, with_eager_vae
from storyadapter.cli.options import model_choice
from storyadapter.conditioning import Tokenizers
from storyadapter.contract import Precision
from storyadapter.engine.backends import AUTO
from storyadapter.errors import InputError, StoryAdapterError, UnavailableError
from storyadapter.grca import grca

OVERLAPPED = "overlapped"
_ONE_BY_ONE = "one after the other"
_SMALL = 128  # pixels: the demo model and the toy are measured on tiny cases


def measure(args: argparse.Namespace) -> int:
    """See `command.run`."""
    device = _device(args.device)
    precision: Precision = args.precision if args.precision != AUTO else "fp16" if device.type == "cuda" else "fp32"
    subject = _subject(args, precision, device)
    small = subject.checkpoint.geometry.default_pixels <= _SMALL
    all_cases = tables.SMOKE_CASES if small else tables.CASES
    all_stories = tables.SMOKE_STORIES if small else tables.STORIES
    picked = chosen(args.cases, (*all_cases, *all_stories), "--cases")
    cases = tuple(case for case in picked if isinstance(case, Case))
    stories = tuple(case for case in picked if isinstance(case, StoryCase))
    names = args.rungs
    rungs = tuple(rung for rung in LADDER if names is None or rung.name in names)
    rivals = tuple(rung for rung in RIVALS if names is None or rung.name in names)
    if names is not None and OVERLAPPED not in names:
        stories = ()

    vae_precision: Precision = "fp32" if precision == "fp32" else "bf16"
    parts = sum(runs(rung, case) for rung in (*rungs, *rivals) for case in cases)
    parts += len(stories) * (2 if vae_precision == "fp32" else 3)
    progress = Progress(parts)
    found = _find(args, subject, cases, stories, (rungs, rivals), vae_precision, progress)
    data = as_data(found)
    page = markdown(data)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        _suffixed(args.out, ".md").write_text(page, encoding="utf-8")
        _suffixed(args.out, ".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        chart(data).save(_suffixed(args.out, ".png"))
    print(page)
    bad = [result.rung for result in found.rungs if result.status in (WRONG, FAILED) and not result.rival]
    bad += [story.way for story in found.drawn if story.psnr is not None and story.psnr < MIN_PSNR and story.same_vae]
    bad += [line for line in found.undrawn if f": {FAILED}: " in line]
    if bad:
        progress.tell(f"wrong or failed: {', '.join(dict.fromkeys(bad))}")
    return 1 if bad else 0


def _device(name: str) -> torch.device:
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: expected cuda, cuda:<index> or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(f"--device {name}: no CUDA device here; try --device cpu --smoke")
    return device


def _subject(args: argparse.Namespace, precision: Precision, device: torch.device) -> Subject:
    name = "toy" if args.smoke else args.synthetic_weights
    if name == "sdxl" and device.type == "cpu":
        raise UnavailableError("--synthetic-weights sdxl takes hours on a CPU; expected a CUDA GPU, or --smoke")
    if name:
        return Subject.synthetic(name, precision, device, args.engine_dir)
    return Subject.from_files(model_choice(args), precision, device, args.engine_dir)


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _find(
    args: argparse.Namespace,
    subject: Subject,
    cases: Sequence[Case],
    stories: Sequence[StoryCase],
    ways: tuple[Sequence[Rung], Sequence[Rung]],
    vae_precision: Precision,
    progress: Progress,
) -> Findings:
    device = subject.device
    workbench = Workbench(subject, ranges(tuple(cases), tuple(stories)), vae_precision, progress)
    tokenizers = subject.tokenizers()
    progress.tell(f"{subject.label}, {subject.precision}, on {device}")
    rate = None
    if device.type == "cuda":
        from storyadapter.bench.roofline import measure_rates
        from storyadapter.networks import TORCH_DTYPES

        rate = measure_rates(device, TORCH_DTYPES[subject.precision]).matrix_flops
    inputs: dict[str, CaseInputs] = {}
    operations: dict[str, int] = {}
    results: list[RungResult] = []
    profiled = None
    if cases:
        eager = workbench.eager(grca)
        inputs = make_inputs(eager, tokenizers, cases, subject.prediction_type)
        operations = {c.name: count_operations(eager, c.frames, c.references, c.height, c.width) for c in cases}
        decoder = with_eager_vae(eager, subject, "fp32").vae_decoder
        del eager
        results = Ladder(workbench, inputs, Pictures(decoder, device), progress).run(*ways)
        del decoder
        if device.type == "cuda":
            profiled = _profile(workbench, inputs, results, ways[0])
    drawn: list[StoryResult] = []
    undrawn: list[str] = []
    for story in stories:
        _draw_story(workbench, tokenizers, story, drawn, undrawn)
    return Findings(
        environment=describe(device, args.commit),
        model=subject.label,
        precision=subject.precision,
        cases=cases,
        stories=stories,
        operations=operations,
        matrix_flops=rate,
        rungs=results,
        drawn=drawn,
        undrawn=undrawn,
        build_seconds=workbench.build_seconds,
        profiled=profiled,
        gpu_price=args.gpu_price,
    )


def _profile(
    workbench: Workbench, inputs: dict[str, CaseInputs], results: Sequence[RungResult], rungs: Sequence[Rung]
) -> tuple[str, str, KernelTimes] | None:
    """The kernels of a step of the fastest rung on the case that all rungs ran."""
    case = next(iter(inputs))
    measured = [r for r in results if r.case == case and r.status == MEASURED and not r.rival]
    fastest = max(measured, key=lambda result: result.rows_per_second or 0.0, default=None)
    if fastest is None:
        return None
    rung = next(rung for rung in rungs if rung.name == fastest.rung)
    step = endless(rung, rung.prepare(workbench), inputs[case])
    for _ in range(3):  # the second may be recorded, the third is a replay
        step()
    return case, rung.name, profile_call(step, workbench.subject.device)


def _draw_story(
    workbench: Workbench, tokenizers: Tokenizers, case: StoryCase, drawn: list[StoryResult], undrawn: list[str]
) -> None:
    """The story one thing after the other, overlapped, and overlapped with a VAE in fp32; adds to both lists."""
    subject, progress, own = workbench.subject, workbench.progress, workbench.vae_precision
    ways = [(_ONE_BY_ONE, draw_in_sequence, own), (OVERLAPPED, draw_overlapped, own)]
    if own != "fp32":
        ways.append((OVERLAPPED, draw_overlapped, "fp32"))
    first: Drawn | None = None
    for way, draw, vae_precision in ways:
        name = f"{case.name}: {way}, VAE in {vae_precision}"
        progress.begin(name)
        try:
            networks = workbench.networks("inductor")
            if vae_precision != own:
                networks = with_eager_vae(networks, subject, vae_precision)
            result, pictures = measure_story(draw, way, networks, tokenizers, case, subject.prediction_type, first)
        except StoryAdapterError as error:
            undrawn.append(f"{name}: {NOT_RUN}: {error}")
        except Exception as error:  # as in the ladder: what else was measured is still worth reporting
            undrawn.append(f"{name}: {FAILED}: {failure(error)}")
        else:
            first = first or pictures
            drawn.append(result)
            progress.done(f"{result.seconds:.1f} s, {result.rows_per_second:.2f} rows/s")
            continue
        progress.done(undrawn[-1])
