"""Errors compared by what the command line prints of them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from storyadapter.cli.options import typed
from storyadapter.method.errors import StoryAdapterError


@contextmanager
def raises_typed(kind: type[StoryAdapterError], match: str) -> Iterator[pytest.ExceptionInfo]:
    """Expect an error whose line, with the options to type, `match` is found in."""
    with pytest.raises(kind) as caught:
        yield caught
    assert re.search(match, typed(caught.value)), typed(caught.value)
