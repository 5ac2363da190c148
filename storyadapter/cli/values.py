"""How the values of options are typed: numbers, lists, ranges; each function is an argparse type."""

import argparse
import re
from collections.abc import Callable
from typing import Final, TypeVar

from storyadapter.engine.backends import AUTO
from storyadapter.model.contract import Range

Number = TypeVar("Number", int, float)


def pixel_range(text: str) -> Range:
    """ "1024" or "768:1024"."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of pixels such as 1024, or a range such as 768:1024"
        )
    return Range(low, high)


def decimal(text: str) -> float:
    """ "7.5"."""
    try:
        return float(text)
    except ValueError:
        comma = f": it is written with a point, {text.replace(',', '.')}" if re.fullmatch(r"-?\d+,\d+", text) else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 7.5{comma}") from None


def not_negative(text: str) -> int:
    """ "0", "7"."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a frame's number such as 0 or 7")
    return int(text)


def frames_or_auto(text: str) -> int | None:
    """A number, or None for "auto"."""
    try:
        return None if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of frames such as 8, or {AUTO}") from None


def each(text: str, kind: Callable[[str], Number], refusal: str) -> tuple[Number, ...]:
    """A list of numbers with commas between them; `refusal`: what is said of another text."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} {refusal}") from None


def scales_list(text: str) -> tuple[float, ...]:
    """ "0.3,0.4,0.5"."""
    return each(text, float, "is not a list of numbers such as 0.3,0.4,0.5") if text.strip() else ()


def numbers(text: str) -> tuple[float, ...]:
    """ "5" or "7,5,5"; of two "7.0,5.0", as "7,5" may be meant as one."""
    if re.fullmatch(r"[^,]*|-?\d+,\d+", text):
        return (decimal(text),)
    return each(text, float, "is not a number such as 5, or a list such as 7,5,5")


def whole_numbers(text: str) -> tuple[int, ...]:
    """ "50" or "999,749,499,249"."""
    return each(text, int, "is no whole number such as 50, nor a list such as 9,5,5")


def shares(text: str) -> tuple[float, float]:
    """ "0.1:0.6"."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two shares of the steps such as 0.1:0.6") from None
    return low, high


# how options of a plan are read whose type doesn't say it
PLAN_VALUES: Final = {
    "steps": whole_numbers,
    "timesteps": whole_numbers,
    "timestep_spacing": str,
    "prediction_type": str,
    "eta": decimal,
    "guidance": numbers,
    "guidance_interval": shares,
}


def positive(text: str) -> int:
    """A number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
