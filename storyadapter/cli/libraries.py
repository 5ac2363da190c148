"""What other libraries print: their logs, warnings and bars, routed in one place for all commands."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_OWN: Final = "storyadapter"
# Read by the libraries when they are imported, here and in the processes that build engines. What a user has set stays.
_SILENCE: Final = {
    "DIFFUSERS_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "critical",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
}
# whose handlers are their own, and the variable by which a user asks for what they print
_LOGGERS: Final = {
    "diffusers": "DIFFUSERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "torch": "TORCH_LOGS",
    "transformers": "TRANSFORMERS_VERBOSITY",
}


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Inside, other libraries print nothing: no warnings, logs or bars. Their errors are exceptions all the same."""
    added = {name: value for name, value in _SILENCE.items() if name not in os.environ}
    levels = {name: logging.getLogger(name).level for name, variable in _LOGGERS.items() if variable in added}
    nowhere = logging.NullHandler()  # or Python prints what has no handler
    os.environ.update(added)
    for name in levels:  # those that are imported already
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(nowhere)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(nowhere)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def own_warnings(tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, what this program logs as a warning is told, such as that a cache can't be written."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger(_OWN).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(_OWN).removeHandler(handler)
