"""What `bench throughput` does, once its options are checked."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from storyadapter.bench.environment import describe
from storyadapter.bench.model import BenchmarkModel
from storyadapter.bench.options import EngineChoice
from storyadapter.bench.report import Progress, report_file, write_report, writing
from storyadapter.bench.throughput import cases as tables
from storyadapter.bench.throughput import command, ladder
from storyadapter.bench.throughput.cases import PAIR, Case, StoryCase, chosen, ranges
from storyadapter.bench.throughput.inputs import CaseInputs, make_inputs
from storyadapter.bench.throughput.kernel_classes import count_operations, profile_call
from storyadapter.bench.throughput.ladder import FAILED, MEASURED, NOT_RUN, WRONG, failure
from storyadapter.bench.throughput.report import Profiled, ThroughputReport, Undrawn, as_data, chart, markdown
from storyadapter.bench.throughput.rungs import BASELINES, FP8, LADDER, Rung
from storyadapter.bench.throughput.story import Draw, Drawn, as_two_stories, in_sequence, measure_story, overlapped
from storyadapter.bench.throughput.workbench import Workbench, with_compiled_vae, with_eager_vae
from storyadapter.cli.options import typed
from storyadapter.cli.printing import print_result
from storyadapter.engine.backend import default_device
from storyadapter.engine.backends import find_backend
from storyadapter.method.errors import InputError, RunError, UnavailableError
from storyadapter.model.grca import grca
from storyadapter.model.networks import TORCH_DTYPES, Networks
from storyadapter.model.numerics import NUMBER_FORMATS, Numerics, Precision, Quantization
from storyadapter.runtime.conditioning import Tokenizers
from storyadapter.runtime.psnr import MIN_PSNR

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
    number_format = args.precision if args.precision in NUMBER_FORMATS else None
    rungs = (*rungs, FP8) if number_format else rungs
    if OVERLAPPED not in names:
        stories = ()

    parts = sum(ladder.runs(rung, case) for rung in (*rungs, *baselines) for case in cases)
    if not parts and not stories:
        raise InputError("none of these --rungs runs any of these --cases; a story needs the rung overlapped")
    own = model.numerics["vae_decoder"]
    ways = {story: _ways(story, own, few=args.device_memory is not None, fp8=bool(number_format)) for story in stories}
    if args.device_memory is not None:
        # as many as fit
        ways = {dataclasses.replace(story, max_frames=None): drawn for story, drawn in ways.items()}
    parts += sum(map(len, ways.values()))
    progress = Progress(parts)
    precision = model.engine.precision + (f" and {number_format}" if number_format else "")
    progress.tell(f"{model.label}, {precision}, on {device}")
    environment, quantized = describe(device, args.commit), None
    if number_format:
        find_backend("inductor").check(Numerics.of(model.engine.precision, Quantization(number_format)))
        quantized, environment["scales"] = model.calibrated({"denoiser": number_format}, progress.tell)
    # for all cases, so that an engine built for some of them serves a later run of the others
    workbench = Workbench(model, ranges(all_cases, all_stories), progress, quantized)
    if args.device_memory is not None:
        environment["device memory"] = f"{args.device_memory:g} GiB; a second process holds the rest"
    rates = (_matrix_rate(model), args.gpu_price, workbench.build_seconds)
    found = ThroughputReport(environment, model.label, precision, cases, tuple(ways), *rates)
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
    alike = [story for story in found.drawn if story.same_vae and not story.number_format]
    bad += [story.way for story in alike if story.psnr is not None and story.psnr < MIN_PSNR]
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
    """The ladder, and the kernels of its fastest rung and of a quantized one."""
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
    profiled = []
    if model.device.type == "cuda":
        case = next(iter(inputs))  # that all rungs ran
        measured = [r for r in results if r.case == case and r.status == MEASURED and not r.baseline]
        formats = dict.fromkeys(result.number_format for result in measured)
        for number_format in reversed(formats):  # the last is in memory, stories begin with the first
            alike = (result for result in measured if result.number_format == number_format)
            fastest = max(alike, key=lambda result: result.rows_per_second or 0.0)
            rung = next(rung for rung in rungs if rung.name == fastest.rung)
            profiled += _profile(workbench, inputs, case, rung)
    return dataclasses.replace(found, rungs=results, operations=operations, profiled=profiled)


def _profile(workbench: Workbench, inputs: dict[str, CaseInputs], case: str, rung: Rung) -> list[Profiled]:
    """The kernels of a step of a rung; none where they can't be had."""
    workbench.progress.tell(f"kernels of {rung.name} on {case}")
    try:
        step = ladder.endless(rung, rung.prepare(workbench), inputs[case])
        for _ in range(3):  # the second may be recorded, the third is a replay
            step()
        times = profile_call(step, workbench.model.device)
    except Exception as error:  # a profiler that may not look: what was measured is still worth reporting
        workbench.progress.tell(f"    {FAILED}: {failure(error)}")
        return []
    return [(case, rung.name, times)] if times.kernels else []


class Way(NamedTuple):
    """How a story is drawn."""

    name: str
    prepare: Callable[[Networks, Tokenizers], Draw]
    vae: Precision
    quantized: bool = False


def _ways(case: StoryCase, own: Precision, *, few: bool, fp8: bool) -> list[Way]:
    """One thing after the other, overlapped, and overlapped with a VAE in fp32; if `few`, overlapped alone; if `fp8`,
    so in half precision and in fp8."""
    once = Way(OVERLAPPED, overlapped, own)
    if case.name == PAIR:
        return [once, Way(_TOGETHER, as_two_stories, own)]
    if fp8:
        return [once, once._replace(name=f"{OVERLAPPED}, {FP8.name}", quantized=True)]
    if few:
        return [once]
    ways = [Way(_ONE_BY_ONE, in_sequence, own), once]
    return ways if own == "fp32" else [*ways, once._replace(vae="fp32")]


def _draw_story(found: ThroughputReport, workbench: Workbench, case: StoryCase, ways: Sequence[Way]) -> None:
    """The story in all ways; added to what was found."""
    model, progress = workbench.model, workbench.progress
    first: Drawn | None = None
    for way, draw, vae_precision, quantized in ways:
        name = f"{case.name}: {way}, VAE in {vae_precision}"
        progress.begin(name)
        networks = None  # those of the way before: their memory is free for what is loaded now
        try:
            networks = workbench.networks("inductor", quantized=quantized)
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
