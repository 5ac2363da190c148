"""Compilers' words in one line."""

import pytest

from storyadapter.engine.processes import first_error, last_error

CPP = """C++ compile error

Command:
g++ a.cpp -o a.o

Output:
a.cpp: In function 'void run()':
a.cpp:7:1: error: 'aoti_torch_bmm' was not declared in this scope
a.cpp:9:1: error: expected ';'
"""
ABORTED = """Loading weights: 100%
Error: aoti_torch_proxy_executor_call_function failed
Fatal Python error: Aborted

Thread 0x1 (most recent call first):
  <no Python frame>
"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (CPP, "C++ compile error: a.cpp:7:1: error: 'aoti_torch_bmm' was not declared in this scope"),
        ("\n  no such operator \n more\n", "no such operator"),
        ("", "no message"),
        ("x" * 500, "x" * 400),
    ],
)
def test_an_exception(message: str, expected: str) -> None:
    assert first_error(message) == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (ABORTED, "Error: aoti_torch_proxy_executor_call_function failed"),
        ("one\ntwo\n\n", "two"),
        ("", "no message"),
    ],
)
def test_a_process(output: str, expected: str) -> None:
    assert last_error(output) == expected
