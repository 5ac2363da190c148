"""`storyadapter-trt bench compare`: what got slower between two reports of `bench throughput`."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storyadapter.bench.options import number
from storyadapter.bench.report import table
from storyadapter.cli.printing import print_result
from storyadapter.method.errors import InputError

HELP = "what got slower between two reports of throughput"
DESCRIPTION = """\
Compares two reports of bench throughput, of one device, model and set of cases. Exit code 1 if something got slower or
gives no number any more.
"""

KIND = "throughput"
# of the environment; times of different ones say nothing about the program
_SAME = ("device", "power limit", "device memory")


@dataclass(frozen=True)
class Change:
    """One thing that the earlier report measured, by its name: case and rung, or story and way."""

    name: str
    before: float  # rows per second
    after: float | None  # None where the later report has no number
    lost: str | None = None  # why it has none, if it was tried; None if it was not

    @property
    def ratio(self) -> float | None:
        return None if self.after is None else self.after / self.before

    def is_worse(self, threshold: float) -> bool:
        """Whether it is slower by more than `threshold` (0.03: three per cent), or gives no number any more."""
        return self.lost is not None if self.ratio is None else self.ratio < 1 - threshold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A.json", help="the earlier report of bench throughput --out")
    parser.add_argument("after", type=Path, metavar="B.json", help="the later one, of the same device, model and cases")
    parser.add_argument(
        "--threshold",
        type=lambda text: number(text, "a percentage such as 3", lambda value: 0 <= value < 100),
        default=3.0,
        metavar="PER_CENT",
        help="how many per cent slower is still the same (default: %(default)g; repeated runs differ by 1 to 2)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if something got slower or gives no number any more."""
    before, after = _read(args.before), _read(args.after)
    refuse_different(before, after, args.before.name, args.after.name)
    changes = compare(before, after)
    threshold = args.threshold / 100
    print_result("\n".join(table(("what", "before, rows/s", "after, rows/s", "change"), map(_row, changes))))
    worse = [change for change in changes if change.is_worse(threshold)]
    for change in worse:
        what = f"slower by {1 - change.ratio:.1%}" if change.ratio is not None else change.lost
        print_result(f"{change.name}: {what}")
    if not worse:
        print_result(f"nothing got slower by more than {args.threshold:g} %")
    return 1 if worse else 0


def refuse_different(before: dict[str, Any], after: dict[str, Any], first: str, second: str) -> None:
    """Raises InputError unless device, model, precision and the cases that both reports have are the same; `first` and
    `second` are what messages call them."""
    pairs = [(key, *(report["environment"].get(key, "not told") for report in (before, after))) for key in _SAME]
    pairs += [(key, before[key], after[key]) for key in ("model", "precision")]
    for key, one, other in pairs:
        if one != other:
            raise InputError(f"{key} is {one} in {first} and {other} in {second}; expected two reports of one {key}")
    mine, theirs = _cases(before), _cases(after)
    shared = mine.keys() & theirs.keys()
    if not shared:
        found = f"{first} has cases {', '.join(mine)}, {second} has {', '.join(theirs)}"
        raise InputError(found, expected="a common one")
    for name in sorted(shared):
        for key, value in mine[name].items():
            if (other := theirs[name].get(key)) != value:
                found = f"case {name} has {key} {value} in {first} and {other} in {second}"
                raise InputError(found, expected="the same cases")


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Everything that the earlier report measured, in its order."""
    later = _measured(after)
    refused = {f"{r['case']}: {r['rung']}": f"{r['status']}: {r['reason']}" for r in after["rungs"] if "reason" in r}
    changes = []
    for name, rate in _measured(before).items():
        # of a story that wasn't drawn, the report has a line: its name, its status, the reason
        undrawn = (line.removeprefix(f"{name}: ") for line in after["undrawn"] if line.startswith(f"{name}: "))
        lost = None if name in later else refused.get(name, next(undrawn, None))
        changes.append(Change(name, rate, later.get(name), lost))
    return changes


def _measured(report: dict[str, Any]) -> dict[str, float]:
    rungs = {f"{r['case']}: {r['rung']}": r["rows_per_second"] for r in report["rungs"] if "rows_per_second" in r}
    stories = {f"{s['case']}: {s['way']}, VAE in {s['vae_precision']}": s["rows_per_second"] for s in report["stories"]}
    return rungs | stories


def _cases(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cases = {case["name"]: case for case in (*report["cases"], *report["story_cases"])}
    # which rungs run a case, and how they are compared, changes no time
    return {name: {k: v for k, v in case.items() if k not in ("rungs", "check_steps")} for name, case in cases.items()}


def _row(change: Change) -> tuple[str, ...]:
    after, ratio = ("-", "lost" if change.lost else "not measured"), change.ratio
    if ratio is not None:
        after = (f"{change.after:.2f}", f"{ratio - 1:+.1%}")
    return change.name, f"{change.before:.2f}", *after


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except ValueError:
        raise InputError(f"{path} is not JSON; expected a report of bench throughput --out") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise InputError(f"{path} is no report of bench throughput; expected its .json file")
    return data
