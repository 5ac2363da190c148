"""A throughput report, from its JSON data: the page in Markdown, and bars of rows per second as a picture."""

from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from storyadapter.bench.psnr import MIN_PSNR
from storyadapter.bench.report import table
from storyadapter.bench.throughput.cases import PUBLISHED

_NONE: Final = "-"


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    lines = [f"# Throughput: {data['model']}, {data['precision']}", ""]
    lines += [*table(("what", "value"), data["environment"].items()), ""]
    for backend, seconds in data["build_seconds"].items():
        lines += [f"The engine of the backend {backend} was built in {seconds:.0f} s; nothing below counts that.", ""]
    lines += _introduction(data)
    for case in data["cases"]:
        lines += _case(data, case)
    lines += _stories(data) + _references(data) + _projection(data) + _kernels(data)
    return "\n".join(lines).rstrip() + "\n"


def _introduction(data: dict[str, Any]) -> list[str]:
    if not data["rungs"]:
        return []
    rate = data["matrix_flops"]
    measured = "" if rate is None else f" Matrix products reach {rate / 1e12:.0f} TFLOP/s on this device."
    adds = dict.fromkeys((rung["rung"], rung["adds"], rung["baseline"]) for rung in data["rungs"])
    return [
        "A step is a UNet call with guidance and sampler; times are medians of single steps, the spread lies between",
        "the 10th and the 90th percentile. Every rung has the same weights, inputs and noise. It is timed only if the",
        f"pictures that it draws in a few steps agree with those of the rung below: PSNR of {MIN_PSNR:g} dB or more",
        "(the worst frame, decoded in fp32, on a GPU with TF32).",
        "",
        "TFLOP/s counts what the model asks for, however a rung computes it: by torch.utils.flop_counter on the eager",
        "denoiser, and 4 · queries · width operations per key of each global reference cross-attention." + measured,
        f"Seconds per frame are those of the UNet alone with {PUBLISHED.steps} steps and {PUBLISHED.iterations}",
        "iterations after the first. Peak memory is that of all tensors on the device; from `cached` on, the text",
        "encoders, the image encoder and the VAE are there beside the UNet.",
        "",
        *(f"- **{name}**{' (baseline)' if baseline else ''}: {text}" for name, text, baseline in adds),
        "",
    ]


def _case(data: dict[str, Any], case: dict[str, Any]) -> list[str]:
    rows = 2 * case["frames"]
    rungs = [rung for rung in data["rungs"] if rung["case"] == case["name"]]
    if not rungs:
        return []
    lines = [
        f"## {case['name']}: {case['references']} references, {case['width']}x{case['height']}, "
        f"{case['frames']} frames at once (B = {rows})",
        "",
        f"{case['operations'] / rows / 1e12:.3g} TFLOP per row; compared after {case['check_steps']} steps.",
        "",
    ]
    header = ["rung", "rows/s", "ms per step", "spread", "TFLOP/s", "of matrix rate", "peak GiB", "s/frame"]
    header += ["money/frame", "PSNR to below", "clock, power"]
    lines += table(header, [_rung(rung) for rung in rungs]) + [""]
    refused = [f"- {rung['rung']}: {rung['status']}: {rung['reason']}" for rung in rungs if "reason" in rung]
    return [*lines, *refused, *([""] if refused else [])]


def _rung(rung: dict[str, Any]) -> list[str]:
    name = f"{rung['rung']} (baseline)" if rung["baseline"] else rung["rung"]
    compared = rung.get("compared_with")
    psnr = _NONE if compared is None else f"{compared['psnr']:.1f} dB ({compared['other']})"
    if "rows_per_second" not in rung:
        return [name, rung["status"], *[_NONE] * 7, psnr, _NONE]
    return [
        name,
        f"{rung['rows_per_second']:.2f}",
        f"{rung['ms_per_call']:.2f} (B = {rung['rows']})",
        f"{rung['timing']['spread_ms']:.2f}",
        f"{rung['tflops']:.3g}",
        _cell(rung["matrix_share"], "{:.1%}"),
        _gib(rung["peak_bytes"]),
        f"{rung['seconds_per_frame']:.3g}",
        _cell(rung["money_per_frame"], "{:.5f}"),
        psnr,
        _load(rung["load"]),
    ]


def _stories(data: dict[str, Any]) -> list[str]:
    lines: list[str] = [*(f"- {line}" for line in data["undrawn"]), ""] if data["undrawn"] else []
    for case in data["story_cases"]:
        stories = [story for story in data["stories"] if story["case"] == case["name"]]
        if not stories:
            continue
        rows = stories[0]["unet_rows"]
        lines += [
            f"## Whole story: {case['frames']} frames, {case['iterations']} iterations after the first, "
            f"{case['steps']} steps, {case['width']}x{case['height']}",
            "",
            f"{rows:,} UNet rows. From prompts to pictures in memory, after a short story in the same process; seconds",
            "per frame are those of a frame with all its iterations. Where stages overlap, their seconds sum up to",
            "more than the story took.",
            "",
        ]
        stages = list(dict.fromkeys(stage for story in stories for stage in story["stages"]))
        header = ["way", "VAE", "frames at once", "s", "s/frame", "rows/s", "of the UNet's rate", *stages]
        header += ["peak GiB", "money/frame", "PSNR to the first"]
        lines += table(header, [_story(story, stages) for story in stories]) + [""]
    return lines


def _story(story: dict[str, Any], stages: list[str]) -> list[str]:
    shares = [
        f"{story['stages'][stage]:.2f} s, {story['stage_shares'][stage]:.0%}" if stage in story["stages"] else _NONE
        for stage in stages
    ]
    return [
        story["way"],
        story["vae_precision"],
        str(story["at_once"]),
        f"{story['seconds']:.2f}",
        f"{story['seconds_per_frame']:.2f}",
        f"{story['rows_per_second']:.2f}",
        _cell(story["share_of_unet_rate"], "{:.1%}"),
        *shares,
        _gib(story["peak_bytes"]),
        _cell(story["money_per_frame"], "{:.5f}"),
        _cell(story["psnr"], "{:.1f} dB"),
    ]


def _references(data: dict[str, Any]) -> list[str]:
    cost = data["cost_over_references"]
    if cost is None:
        return []
    rates = ", ".join(f"{rate:.2f} rows/s at N = {count}" for count, rate in cost["rows_per_second"].items())
    return [
        "## Cost over N",
        "",
        f"{cost['rung']}: {rates}; the rate with the most references is {cost['most_over_fewest']:.1%} of that with "
        "the fewest.",
        "",
    ]


def _projection(data: dict[str, Any]) -> list[str]:
    if not data["published_workload"]:
        return []
    lines = [
        f"## The published workload: N = {PUBLISHED.frames}, {PUBLISHED.iterations} iterations after the first, "
        f"{PUBLISHED.steps} steps",
        "",
        "Projected, not run: seconds = UNet rows / rows per second with the most references + drawn frames · what each",
        "took in the whole story above beside its UNet rows at the rate measured for them. UNet rows =",
        f"2 · {PUBLISHED.steps} steps · {PUBLISHED.frames} frames · {1 + PUBLISHED.iterations} iterations.",
        "",
    ]
    header = ("way", "VAE", "UNet rows", "rows/s", "rest per drawn frame", "time", "s/frame", "money")
    rows = [
        [
            item["way"],
            item["vae_precision"],
            f"{item['rows']:,}",
            f"{item['rows_per_second']:.2f} (N = {item['references']})",
            f"{item['rest_seconds_per_drawn_frame']:.3f} s",
            f"{item['seconds'] / 60:.1f} min",
            f"{item['seconds_per_frame']:.1f}",
            _cell(item["money"], "{:.5f}"),
        ]
        for item in data["published_workload"]
    ]
    return [*lines, *table(header, rows), ""]


def _kernels(data: dict[str, Any]) -> list[str]:
    kernels = data["kernels"]
    if kernels is None:
        return []
    total = sum(kernels["milliseconds"].values())
    (step,) = [r for r in data["rungs"] if (r["case"], r["rung"]) == (kernels["case"], kernels["rung"])]
    lines = [
        f"## Where a step's time goes: {kernels['rung']} on {kernels['case']}",
        "",
        f"{kernels['kernels']} kernels of together {total:.1f} ms, by torch.profiler, in a step of "
        f"{step['ms_per_call']:.1f} ms.",
        "",
    ]
    shares = [[name, f"{ms:.2f}", f"{ms / total:.1%}"] for name, ms in kernels["milliseconds"].items()]
    lines += table(("class", "ms", "share"), shares) + [""]
    slowest = [[f"`{k['name']}`", k["class"], f"{k['milliseconds']:.2f}"] for k in kernels["slowest"]]
    return [*lines, *table(("kernel", "class", "ms of all its launches"), slowest), ""]


def _cell(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)


def _gib(count: int | None) -> str:
    return _cell(None if count is None else count / 2**30, "{:.1f}")


def _load(load: dict[str, float]) -> str:
    return f"{load['sm_clock_mhz']:.0f} MHz, {load['watts']:.0f} W" if load else _NONE


_WIDTH: Final = 1200
_MARGIN: Final = 32
_LABELS: Final = 260  # left of the bars
_VALUES: Final = 120  # right of the longest bar
_BAR: Final = 26
_LINE: Final = 38
_HEAD: Final = 62  # above the bars of a case
_TITLE_SIZE, _TEXT_SIZE = 26, 18
_INK: Final = (32, 33, 36)
_FAINT: Final = (112, 116, 122)
_OWN: Final = (38, 98, 186)
_BASELINE: Final = (170, 174, 180)


def chart(data: dict[str, Any]) -> Image.Image:
    """A bar per rung that was measured, a group of bars per case; baselines are grey.

    Args:
        data: the report's JSON data.
    """
    groups = []
    for case in data["cases"]:
        rungs = [r for r in data["rungs"] if r["case"] == case["name"] and "rows_per_second" in r]
        if rungs:
            title = f"N = {case['references']}, {case['width']}x{case['height']}, {case['frames']} frames at once"
            groups.append((title, rungs))
    title_font, font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_TEXT_SIZE)
    height = 2 * _MARGIN + 2 * _LINE + sum(_HEAD + _LINE * len(rungs) for _, rungs in groups)
    image = Image.new("RGB", (_WIDTH, height), "white")
    drawing = ImageDraw.Draw(image)
    device = data["environment"].get("device", "")
    drawing.text((_MARGIN, _MARGIN), "UNet rows per second", _INK, title_font)
    drawing.text((_MARGIN, _MARGIN + _LINE), f"{data['model']}, {data['precision']}, {device}", _FAINT, font)
    y = _MARGIN + 2 * _LINE
    most = max((rung["rows_per_second"] for _, rungs in groups for rung in rungs), default=1.0)
    room = _WIDTH - 2 * _MARGIN - _LABELS - _VALUES
    for title, rungs in groups:
        drawing.text((_MARGIN, y + _HEAD - _LINE), title, _INK, font)
        y += _HEAD
        for rung in rungs:
            length = max(1, round(room * rung["rows_per_second"] / most))
            left = _MARGIN + _LABELS
            drawing.text((_MARGIN + 12, y), rung["rung"], _FAINT if rung["baseline"] else _INK, font)
            drawing.rectangle((left, y, left + length, y + _BAR), fill=_BASELINE if rung["baseline"] else _OWN)
            drawing.text((left + length + 10, y), f"{rung['rows_per_second']:.1f}", _INK, font)
            y += _LINE
    return image
