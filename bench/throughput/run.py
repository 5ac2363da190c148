"""What `bench throughput` does, once its options are checked."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from storyadapter.bench.environment import describe
from storyadapter.bench.model import BenchmarkModel
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.psnr import MIN_PSNR
from storyadapter.bench.report import Progress, report_file, write_report, writing
from storyadapter.bench.throughput import cases as tables
from storyadapter.bench.throughput import command, ladder
from storyadapter.bench.throughput.cases import PAIR, Case, StoryCase, chosen, ranges
from storyadapter.bench.throughput.inputs import CaseInputs, make_inputs
from storyadapter.bench.throughput.kernel_classes import KernelTimes, count_operations, profile_call
from storyadapter.bench.throughput.ladder import FAILED, MEASURED, NOT_RUN, WRONG, RungResult, failure
from storyadapter.bench.throughput.report import ThroughputReport, Undrawn, as_data, chart, markdown
from storyadapter.bench.throughput.rungs import BASELINES, LADDER, Rung
from storyadapter.bench.throughput.story import Draw, Drawn, as_two_stories, in_sequence, measure_story, overlapped
from storyadapter.bench.throughput.workbench import Workbench, with_compiled_vae, with_eager_vae
from storyadapter.cli.options import typed
from storyadapter.cli.printing import print_result
from storyadapter.engine.backend import default_device
from storyadapter.method.errors import InputError, RunError, UnavailableError
from storyadapter.model.grca import grca
from storyadapter.model.networks import TORCH_DTYPES, Networks
from storyadapter.model.numerics import Precision
from storyadapter.runtime.conditioning import Tokenizers

OVERLAPPED = "overlapped"
_ONE_BY_ONE = "one after the other"
_TOGETHER = "as two stories at once"
_SMALL = 128  # pixels: the demo model and the toy are measured on tiny cases


def measure(args: argparse.Namespace) -> int:
    """See `command.run`."""
    device = default_device()
    if args.smoke and device.type == "cpu":
        torch.set_num_threads(1)  # on tensors as small as the toy's, threads that wait for each other take longer
    model = _model(args, device)
    small = model.checkpoint.geometry.default_pixels <= _SMALL
    all_cases, all_stories = (tables.SMOKE_CASES, tables.SMOKE_STORIES) if small else (tables.CASES, tables.STORIES)
    if args.synthetic_controlnets:
        all_cases += (tables.SMOKE_CONTROL if small else tables.CONTROL,)
    picked = chosen(args.cases, (*all_cases, *all_stories), "--cases")
    cases = tuple(case for case in picked if isinstance(case, Case))
    stories = tuple(case for case in picked if isinstance(case, StoryCase))
    names = (*command.RUNGS, *command.BASELINES) if args.rungs is None else args.rungs
    rungs, baselines = (tuple(rung for rung in known if rung.name in names) for known in (LADDER, BASELINES))
    if OVERLAPPED not in names:
        stories = ()

    parts = sum(ladder.runs(rung, case) for rung in (*rungs, *baselines) for case in cases)
    if not parts and not stories:
        raise InputError("none of these --rungs runs any of these --cases; a story needs the rung overlapped")
    ways = {story: _ways(story, model.numerics["vae_decoder"], args.device_memory) for story in stories}
    if args.device_memory is not None:
        # as many as fit
        ways = {dataclasses.replace(story, max_frames=None): drawn for story, drawn in ways.items()}
    parts += sum(map(len, ways.values()))
    progress = Progress(parts)
    # for all cases, so that an engine built for some of them serves a later run of the others
    workbench = Workbench(model, ranges(all_cases, all_stories), progress)
    progress.tell(f"{model.label}, {model.engine.precision}, on {device}")
    environment = describe(device, args.commit)
    if args.device_memory is not None:
        environment["device memory"] = f"{args.device_memory:g} GiB; a second process holds the rest"
    rates = (_matrix_rate(model), args.gpu_price, workbench.build_seconds)
    found = ThroughputReport(environment, model.label, model.engine.precision, cases, tuple(ways), *rates)
    if cases:
        found = _climb(found, workbench, rungs, baselines)
        try:
            _write(args.out, found)
        except RunError as error:  # tried again at the end, when all of it was printed
            progress.tell(typed(error))
    for story, drawn in ways.items():
        _draw_story(found, workbench, story, drawn)
    print_result(markdown(as_data(found)))
    _write(args.out, found)
    bad = [result.rung for result in found.rungs if result.status in (WRONG, FAILED) and not result.baseline]
    bad += [story.way for story in found.drawn if story.psnr is not None and story.psnr < MIN_PSNR and story.same_vae]
    bad += [str(story) for story in found.undrawn if story.status == FAILED]
    if bad:
        progress.tell(f"wrong or failed: {', '.join(dict.fromkeys(bad))}")
    return 1 if bad else 0


def _write(out: Path | None, found: ThroughputReport) -> None:
    """Write the files, if asked for."""
    if out is None:
        return
    data = as_data(found)
    write_report(out, markdown(data), data)
    picture = report_file(out, "png")
    with writing(picture):
        chart(data).save(picture)


def _model(args: argparse.Namespace, device: torch.device) -> BenchmarkModel:
    name = "toy" if args.smoke else args.synthetic_weights
    if name == "sdxl" and device.type == "cpu":
        raise UnavailableError("--synthetic-weights sdxl takes hours on a CPU; expected a CUDA GPU, or --smoke")
    engine = EngineChoice.typed(args, "inductor").with_fast_vae()
    return BenchmarkModel.typed(args, engine, name, args.synthetic_controlnets)


def _matrix_rate(model: BenchmarkModel) -> float | None:
    if model.device.type != "cuda":
        return None
    from storyadapter.bench.kernels.roofline import measure_rates  # imports Triton

    return measure_rates(model.device, TORCH_DTYPES[model.engine.precision]).matrix_flops


def _climb(
    found: ThroughputReport, workbench: Workbench, rungs: Sequence[Rung], baselines: Sequence[Rung]
) -> ThroughputReport:
    """The ladder, and the kernels of its fastest rung."""
    model, cases = workbench.model, found.cases
    eager = workbench.eager(grca)
    inputs = make_inputs(eager, model.tokenizers(), cases, model.prediction_type)
    operations = {
        c.name: count_operations(eager, c.frames, c.references, c.height, c.width, controlled=c.controlled)
        for c in cases
    }
    pictures = ladder.Pictures(with_eager_vae(eager, model, "fp32")["vae_decoder"], model.device)
    del eager
    results = ladder.Ladder(workbench, inputs, pictures, workbench.progress).run(rungs, baselines)
    profiled = _profile(workbench, inputs, results, rungs) if model.device.type == "cuda" else None
    return dataclasses.replace(found, rungs=results, operations=operations, profiled=profiled)


def _profile(
    workbench: Workbench, inputs: dict[str, CaseInputs], results: Sequence[RungResult], rungs: Sequence[Rung]
) -> tuple[str, str, KernelTimes] | None:
    """The kernels of a step of the fastest rung on the case that all rungs ran; None where they can't be had."""
    case = next(iter(inputs))
    measured = [r for r in results if r.case == case and r.status == MEASURED and not r.baseline]
    fastest = max(measured, key=lambda result: result.rows_per_second or 0.0, default=None)
    if fastest is None:
        return None
    rung = next(rung for rung in rungs if rung.name == fastest.rung)
    workbench.progress.tell(f"kernels of {rung.name} on {case}")
    try:
        step = ladder.endless(rung, rung.prepare(workbench), inputs[case])
        for _ in range(3):  # the second may be recorded, the third is a replay
            step()
        times = profile_call(step, workbench.model.device)
    except Exception as error:  # a profiler that may not look: what was measured is still worth reporting
        workbench.progress.tell(f"    {FAILED}: {failure(error)}")
        return None
    return (case, rung.name, times) if times.kernels else None


# What it is called, how it draws, and the VAE's precision.
Way = tuple[str, Callable[[Networks, Tokenizers], Draw], Precision]


def _ways(case: StoryCase, own: Precision, device_memory: float | None) -> list[Way]:
    """How a story is drawn: one thing after the other, overlapped, and overlapped with a VAE in fp32."""
    if case.name == PAIR:
        return [(OVERLAPPED, overlapped, own), (_TOGETHER, as_two_stories, own)]
    if device_memory is not None:
        return [(OVERLAPPED, overlapped, own)]
    ways: list[Way] = [(_ONE_BY_ONE, in_sequence, own), (OVERLAPPED, overlapped, own)]
    return ways if own == "fp32" else [*ways, (OVERLAPPED, overlapped, "fp32")]


def _draw_story(found: ThroughputReport, workbench: Workbench, case: StoryCase, ways: Sequence[Way]) -> None:
    """The story in all ways; added to what was found."""
    model, progress = workbench.model, workbench.progress
    first: Drawn | None = None
    for way, draw, vae_precision in ways:
        name = f"{case.name}: {way}, VAE in {vae_precision}"
        progress.begin(name)
        try:
            networks = workbench.networks("inductor")
            if vae_precision != model.numerics["vae_decoder"]:
                started = time.perf_counter()
                networks = with_compiled_vae(networks, model, workbench.ranges, vae_precision, progress.tell)
                progress.leave_out(time.perf_counter() - started)
            other = None if way == _TOGETHER else first  # two stories draw other pictures
            result, drawn = measure_story(draw, way, networks, model.tokenizers(), case, model.prediction_type, other)
        except InputError as error:
            found.undrawn.append(Undrawn(name, NOT_RUN, typed(error)))
        except Exception as error:  # as in the ladder: what else was measured is still worth reporting
            found.undrawn.append(Undrawn(name, FAILED, failure(error)))
        else:
            first = first or drawn
            found.drawn.append(result)
            progress.done(f"{result.seconds:.1f} s, {result.rows_per_second:.2f} rows/s")
            continue
        progress.done(str(found.undrawn[-1]))
