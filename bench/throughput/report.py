"""A throughput report: its JSON data, and from these the page in Markdown and bars of rows per second as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from storyadapter.bench.compare import KIND
from storyadapter.bench.report import opening, table
from storyadapter.bench.throughput.cases import PUBLISHED, Case, StoryCase
from storyadapter.bench.throughput.kernel_classes import KernelTimes
from storyadapter.bench.throughput.ladder import MEASURED, RungResult
from storyadapter.bench.throughput.story import StoryResult
from storyadapter.model.numerics import NumberFormat
from storyadapter.runtime.psnr import MIN_PSNR

VERSION: Final = 3  # 2 had one call's kernels and one cost over references, 1 called a baseline a rival

Profiled = tuple[str, str, KernelTimes]  # case and rung of a call whose kernels were timed, and those


@dataclass(frozen=True)
class Undrawn:
    """A whole story that wasn't drawn in some way: `status` is "failed" or "not run"."""

    name: str
    status: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.status}: {self.reason}"


@dataclass(frozen=True)
class ThroughputReport:
    """What a run of the benchmark found."""

    environment: dict[str, str]  # see `storyadapter.bench.environment.describe`
    model: str  # its label
    precision: str  # of all networks but the VAE
    cases: Sequence[Case]  # that were run
    stories: Sequence[StoryCase]
    matrix_flops: float | None  # measured rate of the device's matrix products; None on a CPU
    gpu_price: float | None  # money per hour of the device
    build_seconds: Mapping[str, float]  # by backend, of the engines that were built in this run
    operations: Mapping[str, int] = field(default_factory=dict)  # of one UNet call with all rows of a case, by its name
    rungs: Sequence[RungResult] = ()
    drawn: list[StoryResult] = field(default_factory=list)
    undrawn: list[Undrawn] = field(default_factory=list)
    profiled: Sequence[Profiled] = ()  # none on a CPU

    def highest_rate(self, case: str, number_format: NumberFormat | None) -> float | None:
        """Rows per second of the highest rung that was measured on a case: what whole stories are drawn by."""
        alike = [r for r in self.rungs if r.case == case and r.number_format == number_format]
        rates = [r.rows_per_second for r in alike if r.status == MEASURED and not r.baseline]
        return rates[-1] if rates else None

    def unet_rate(self, result: StoryResult) -> float | None:
        """The same of the case whose UNet calls a story made: as many references and frames at once, and that size."""
        wanted = next(case for case in self.stories if case.name == result.case)
        shape = (wanted.frames, result.at_once, wanted.height, wanted.width)
        plain = (case for case in self.cases if not case.controlled)
        same = (c.name for c in plain if (c.references, c.frames, c.height, c.width) == shape)
        return self.highest_rate(next(same, ""), result.number_format)

    def money(self, seconds: float) -> float | None:
        """What so many seconds of the device cost."""
        return None if self.gpu_price is None else self.gpu_price * seconds / 3600


def as_data(found: ThroughputReport) -> dict[str, Any]:
    """The report as JSON data."""
    profiled = []
    for case, rung, times in found.profiled:
        slowest = [{"name": n, "class": c, "milliseconds": ms} for n, c, ms in times.slowest]
        kernels = {"case": case, "rung": rung, "kernels": times.kernels, "milliseconds": times.milliseconds}
        profiled.append(kernels | {"slowest": slowest})
    return {
        "kind": KIND,
        "version": VERSION,
        "environment": found.environment,
        "model": found.model,
        "precision": found.precision,
        "gpu_price": found.gpu_price,
        "matrix_flops": found.matrix_flops,
        "cases": [{**asdict(case), "operations": found.operations.get(case.name)} for case in found.cases],
        "story_cases": [asdict(case) for case in found.stories],
        "rungs": [_rung(found, result) for result in found.rungs],
        "stories": [_story(found, result) for result in found.drawn],
        "undrawn": [str(story) for story in found.undrawn],
        "build_seconds": dict(found.build_seconds),
        "kernels": profiled,
        "cost_over_references": list(_cost_over_references(found)),
        "published_workload": _projection(found),
    }


def _rung(found: ThroughputReport, result: RungResult) -> dict[str, Any]:
    names = ("case", "rung", "adds", "baseline", "number_format", "status")
    data: dict[str, Any] = {name: getattr(result, name) for name in names}
    if result.reason:
        data["reason"] = result.reason
    if result.comparison is not None:
        data["compared_with"] = asdict(result.comparison)
    rate = result.rows_per_second
    if rate is None or result.timing is None:
        return data
    case = next(case for case in found.cases if case.name == result.case)
    flops = found.operations[case.name] / case.rows * rate
    per_frame = 2 * PUBLISHED.steps * (1 + PUBLISHED.iterations) / rate
    return data | {
        "rows": result.rows,
        "rows_per_second": rate,
        "ms_per_call": result.timing.median,
        "tflops": flops / 1e12,
        "matrix_share": None if found.matrix_flops is None else flops / found.matrix_flops,
        "peak_bytes": result.peak_bytes,
        "seconds_per_frame": per_frame,
        "money_per_frame": found.money(per_frame),
        "load": result.load,
        "timing": result.timing.as_data(),
    }


def _story(found: ThroughputReport, result: StoryResult) -> dict[str, Any]:
    rate = found.unet_rate(result)
    return {
        **asdict(result),
        "seconds_per_frame": result.seconds_per_frame,
        "rows_per_second": result.rows_per_second,
        "share_of_unet_rate": None if rate is None else result.rows_per_second / rate,
        "stage_shares": {name: seconds / result.seconds for name, seconds in result.stages.items()},
        "money_per_frame": found.money(result.seconds_per_frame),
    }


def _cost_over_references(found: ThroughputReport) -> Iterable[dict[str, Any]]:
    """Rows per second of the highest rung that was measured on several cases, by number of references; in half
    precision, and of a quantized denoiser."""
    references = {case.name: case.references for case in found.cases if not case.controlled}
    measured = [r for r in found.rungs if r.status == MEASURED and not r.baseline and r.case in references]
    for number_format in dict.fromkeys(result.number_format for result in measured):
        alike = [result for result in measured if result.number_format == number_format]
        for rung in reversed(list(dict.fromkeys(result.rung for result in alike))):
            rates = {references[r.case]: r.rows_per_second or 0.0 for r in alike if r.rung == rung}
            if len(rates) > 1:
                by_references = {str(count): rates[count] for count in sorted(rates)}
                share = rates[max(rates)] / rates[min(rates)]
                yield {"rung": rung, "rows_per_second": by_references, "most_over_fewest": share}
                break


def _projection(found: ThroughputReport) -> list[dict[str, Any]]:
    """The published workload's time, for each whole story: its UNet rows at the rate measured with the most
    references, and every frame's other work as long as in the story."""
    plain = (case for case in found.cases if not case.controlled)
    most = max(plain, key=lambda case: case.references, default=None)
    if most is None or (most.height, most.width) != (PUBLISHED.height, PUBLISHED.width):
        return []
    projected = []
    for result in found.drawn:
        rate, of_story = found.highest_rate(most.name, result.number_format), found.unet_rate(result)
        if rate is None or of_story is None:
            continue
        rest = max(0.0, result.seconds - result.unet_rows / of_story) / result.drawn
        seconds = PUBLISHED.unet_rows / rate + PUBLISHED.drawn * rest
        projected.append(
            {
                "way": result.way,
                "vae_precision": result.vae_precision,
                "rows": PUBLISHED.unet_rows,
                "rows_per_second": rate,
                "references": most.references,
                "drawn": PUBLISHED.drawn,
                "rest_seconds_per_drawn_frame": rest,
                "seconds": seconds,
                "seconds_per_frame": seconds / PUBLISHED.frames,
                "money": found.money(seconds),
            }
        )
    return projected


def markdown(data: dict[str, Any]) -> str:
    """The page, from the JSON data."""
    lines = opening(f"Throughput: {data['model']}, {data['precision']}", data["environment"])
    for backend, seconds in data["build_seconds"].items():
        lines += [f"The engine of the backend {backend} was built in {seconds:.0f} s; nothing below counts that.", ""]
    for part in (_ladder, _stories, _references, _workload, _kernels):
        lines += part(data)
    return "\n".join(lines).rstrip() + "\n"


def _ladder(data: dict[str, Any]) -> Iterable[str]:
    if not data["rungs"]:
        return
    rate = data["matrix_flops"]
    measured = "" if rate is None else f" Matrix products reach {rate / 1e12:.0f} TFLOP/s on this device."
    yield from (
        "A step is a UNet call with guidance and sampler; times are medians of single steps, the spread lies between",
        "the 10th and the 90th percentile. Every rung has the same weights, inputs and noise. It is timed only if the",
        f"pictures that it draws in a few steps agree with those of the rung below: PSNR of {MIN_PSNR:g} dB or more",
        "(the worst frame, decoded in fp32, on a GPU with TF32); of a quantized one that is told, and not asked for.",
        "",
        "TFLOP/s counts what the model asks for, however a rung computes it: by torch.utils.flop_counter on the eager",
        "denoiser, and 4 · queries · width operations per key of each global reference cross-attention." + measured,
        f"Seconds per frame are those of the UNet alone with {PUBLISHED.steps} steps and {PUBLISHED.iterations}",
        "iterations after the first. Peak memory is that of all tensors on the device; from `cached` on, the text",
        "encoders, the image encoder and the VAE are there beside the UNet.",
        "",
    )
    adds = dict.fromkeys((rung["rung"], rung["adds"], rung["baseline"]) for rung in data["rungs"])
    yield from (f"- **{name}**{' (baseline)' if baseline else ''}: {text}" for name, text, baseline in adds)
    yield ""
    for case in data["cases"]:
        rungs = [rung for rung in data["rungs"] if rung["case"] == case["name"]]
        if not rungs:
            continue
        rows, size = 2 * case["frames"], f"{case['width']}x{case['height']}"
        at_once = f"{case['frames']} frames at once (B = {rows})"
        compared = f"compared after {case['check_steps']} steps."
        yield from (f"## {case['name']}: {case['references']} references, {size}, {at_once}", "")
        yield from (f"{case['operations'] / rows / 1e12:.3g} TFLOP per row; {compared}", "")
        header = ["rung", "rows/s", "ms per step", "spread", "TFLOP/s", "of matrix rate", "peak GiB", "s/frame"]
        header += ["money/frame", "PSNR to below", "clock, power"]
        yield from (*table(header, map(_rung_row, rungs)), "")
        if refused := [f"- {rung['rung']}: {rung['status']}: {rung['reason']}" for rung in rungs if "reason" in rung]:
            yield from (*refused, "")


def _rung_row(rung: dict[str, Any]) -> list[str]:
    name = f"{rung['rung']} (baseline)" if rung["baseline"] else rung["rung"]
    compared, load = rung.get("compared_with"), rung.get("load")
    psnr = "-" if compared is None else f"{compared['psnr']:.1f} dB ({compared['other']})"
    if "rows_per_second" not in rung:
        return [name, rung["status"], *["-"] * 7, psnr, "-"]
    return [
        name,
        f"{rung['rows_per_second']:.2f}",
        f"{rung['ms_per_call']:.2f} (B = {rung['rows']})",
        f"{rung['timing']['spread_ms']:.2f}",
        f"{rung['tflops']:.3g}",
        _cell(rung["matrix_share"], ".1%"),
        _gib(rung["peak_bytes"]),
        f"{rung['seconds_per_frame']:.3g}",
        _cell(rung["money_per_frame"], ".5f"),
        psnr,
        f"{load['sm_clock_mhz']:.0f} MHz, {load['watts']:.0f} W" if load else "-",
    ]


def _stories(data: dict[str, Any]) -> Iterable[str]:
    if data["undrawn"]:
        yield from (*(f"- {line}" for line in data["undrawn"]), "")
    for case in data["story_cases"]:
        stories = [story for story in data["stories"] if story["case"] == case["name"]]
        if not stories:
            continue
        size, settings = f"{case['width']}x{case['height']}", f"{case['iterations']} iterations after the first"
        yield from (f"## Whole story: {case['frames']} frames, {settings}, {case['steps']} steps, {size}", "")
        yield from (
            f"{stories[0]['unet_rows']:,} UNet rows. From prompts to pictures in memory, after a short story in the "
            "same process; seconds",
            "per frame are those of a frame with all its iterations. Where stages overlap, their seconds sum up to",
            "more than the story took.",
            "",
        )
        stages = list(dict.fromkeys(stage for story in stories for stage in story["stages"]))
        header = ["way", "VAE", "frames at once", "s", "s/frame", "rows/s", "of the UNet's rate", *stages]
        header += ["peak GiB", "money/frame", "PSNR to the first"]
        yield from (*table(header, [_story_row(story, stages) for story in stories]), "")


def _story_row(story: dict[str, Any], stages: list[str]) -> list[str]:
    times, shares = story["stages"], story["stage_shares"]
    return [
        story["way"],
        story["vae_precision"],
        str(story["at_once"]),
        f"{story['seconds']:.2f}",
        f"{story['seconds_per_frame']:.2f}",
        f"{story['rows_per_second']:.2f}",
        _cell(story["share_of_unet_rate"], ".1%"),
        *(f"{times[stage]:.2f} s, {shares[stage]:.0%}" if stage in times else "-" for stage in stages),
        _gib(story["peak_bytes"]),
        _cell(story["money_per_frame"], ".5f"),
        _cell(story["psnr"], ".1f", " dB"),
    ]


def _references(data: dict[str, Any]) -> Iterable[str]:
    if not data["cost_over_references"]:
        return
    yield from ("## Cost over N", "")
    for cost in data["cost_over_references"]:
        rates = ", ".join(f"{rate:.2f} rows/s at N = {count}" for count, rate in cost["rows_per_second"].items())
        share = f"the rate with the most references is {cost['most_over_fewest']:.1%} of that with the fewest."
        yield from (f"{cost['rung']}: {rates}; {share}", "")


def _workload(data: dict[str, Any]) -> Iterable[str]:
    if not data["published_workload"]:
        return
    settings = f"{PUBLISHED.iterations} iterations after the first, {PUBLISHED.steps} steps"
    yield from (
        f"## The published workload: N = {PUBLISHED.frames}, {settings}",
        "",
        "Projected, not run: seconds = UNet rows / rows per second with the most references + drawn frames · what each",
        "took in the whole story above beside its UNet rows at the rate measured for them. UNet rows =",
        f"2 · {PUBLISHED.steps} steps · {PUBLISHED.frames} frames · {1 + PUBLISHED.iterations} iterations.",
        "",
    )
    rows = [
        [
            item["way"],
            item["vae_precision"],
            f"{item['rows']:,}",
            f"{item['rows_per_second']:.2f} (N = {item['references']})",
            f"{item['rest_seconds_per_drawn_frame']:.3f} s",
            f"{item['seconds'] / 60:.1f} min",
            f"{item['seconds_per_frame']:.1f}",
            _cell(item["money"], ".5f"),
        ]
        for item in data["published_workload"]
    ]
    header = ("way", "VAE", "UNet rows", "rows/s", "rest per drawn frame", "time", "s/frame", "money")
    yield from (*table(header, rows), "")


def _kernels(data: dict[str, Any]) -> Iterable[str]:
    for kernels in data["kernels"]:
        total = sum(kernels["milliseconds"].values())
        (step,) = [r for r in data["rungs"] if (r["case"], r["rung"]) == (kernels["case"], kernels["rung"])]
        together = f"{kernels['kernels']} kernels of together {total:.1f} ms, by torch.profiler"
        yield from (f"## Where a step's time goes: {kernels['rung']} on {kernels['case']}", "")
        yield from (f"{together}, in a step of {step['ms_per_call']:.1f} ms.", "")
        shares = [[name, f"{ms:.2f}", f"{ms / total:.1%}"] for name, ms in kernels["milliseconds"].items()]
        yield from (*table(("class", "ms", "share"), shares), "")
        slowest = [[f"`{k['name']}`", k["class"], f"{k['milliseconds']:.2f}"] for k in kernels["slowest"]]
        yield from (*table(("kernel", "class", "ms of all its launches"), slowest), "")


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _gib(count: int | None) -> str:
    return _cell(count and count / 2**30, ".1f")


_WIDTH, _MARGIN, _LABELS, _VALUES = 1200, 32, 260, 120  # the labels left of the bars, the values right of the longest
_HEAD, _LINE, _BAR = 62, 38, 26  # heights: above the bars of a case, of a bar's line, of a bar
_INK, _FAINT, _OWN, _BASELINE = (32, 33, 36), (112, 116, 122), (38, 98, 186), (170, 174, 180)


def chart(data: dict[str, Any]) -> Image.Image:
    """A bar per rung that was measured, a group of bars per case; baselines are grey.

    Args:
        data: the report's JSON data.
    """
    groups = []
    for case in data["cases"]:
        if rungs := [r for r in data["rungs"] if r["case"] == case["name"] and "rows_per_second" in r]:
            title = f"N = {case['references']}, {case['width']}x{case['height']}, {case['frames']} frames at once"
            groups.append((title, rungs))
    title_font, font = ImageFont.load_default(26), ImageFont.load_default(18)
    height = 2 * _MARGIN + 2 * _LINE + sum(_HEAD + _LINE * len(rungs) for _, rungs in groups)
    image = Image.new("RGB", (_WIDTH, height), "white")
    drawing = ImageDraw.Draw(image)
    device = data["environment"].get("device", "")
    drawing.text((_MARGIN, _MARGIN), "UNet rows per second", _INK, title_font)
    drawing.text((_MARGIN, _MARGIN + _LINE), f"{data['model']}, {data['precision']}, {device}", _FAINT, font)
    y, left = _MARGIN + 2 * _LINE, _MARGIN + _LABELS
    most = max((rung["rows_per_second"] for _, rungs in groups for rung in rungs), default=1.0)
    for title, rungs in groups:
        drawing.text((_MARGIN, y + _HEAD - _LINE), title, _INK, font)
        y += _HEAD
        for rung in rungs:
            ink, fill = (_FAINT, _BASELINE) if rung["baseline"] else (_INK, _OWN)
            right = left + max(1, round((_WIDTH - left - _VALUES - _MARGIN) * rung["rows_per_second"] / most))
            drawing.text((_MARGIN + 12, y), rung["rung"], ink, font)
            drawing.rectangle((left, y, right, y + _BAR), fill=fill)
            drawing.text((right + 10, y), f"{rung['rows_per_second']:.1f}", _INK, font)
            y += _LINE
    return image
