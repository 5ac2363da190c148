"""`--device`: which GPU a command sees, or none. Imports PyTorch only to tell that there is no such GPU."""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from storyadapter.method.errors import Field, UnavailableError

_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"  # read by CUDA when it is first used, here and in processes that are started


def device_name(text: str) -> str:
    """ "cpu", "cuda" or "cuda:1"."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device such as cuda:1 or cpu")
    return text


@contextmanager
def only_device(name: str | None) -> Iterator[None]:
    """Inside, this process and those that it starts see no GPU but the one that is named; all for None.

    So every backend, compiler and graph has it as the current one. It is to be entered before CUDA is used.

    Raises:
        UnavailableError: there is no such GPU.
    """
    if name is None:
        yield
        return
    before = os.environ.get(_VISIBLE)
    os.environ[_VISIBLE] = "" if name == "cpu" else _visible(int(name.partition(":")[2] or 0), before)
    try:
        if name != "cpu":
            _check(name)
        yield
    finally:
        os.environ.pop(_VISIBLE)
        if before is not None:
            os.environ[_VISIBLE] = before


def _visible(index: int, before: str | None) -> str:
    """The name of a GPU as the system counts them; `cuda:1` is the second of those that were visible."""
    if before is None:
        return str(index)
    names = [name for name in before.split(",") if name.strip()]
    return names[index] if index < len(names) else ""


def _check(name: str) -> None:
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this PyTorch is a CPU build)"
        raise UnavailableError(
            Field("device"), f" is {name}: there is no such GPU here{built}", advice="see storyadapter-trt doctor"
        )
