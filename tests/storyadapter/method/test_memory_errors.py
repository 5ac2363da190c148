"""Lack of memory by whatever exception libraries have for it."""

import errno

import pytest

from storyadapter.method.memory_errors import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried …"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_it_is_seen_behind_other_errors_too(error: Exception) -> None:
    assert is_out_of_memory(error)
    try:
        raise ValueError("no such thing") from error
    except ValueError as other:
        assert is_out_of_memory(other)


@pytest.mark.parametrize("error", [RuntimeError("a shape"), OSError(errno.ENOSPC, "No space left"), ImportError()])
def test_others_are_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
