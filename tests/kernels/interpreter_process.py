"""Triton's interpreter in a process of its own: it is chosen when Triton is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def interpret(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m <module>` prints, as JSON, where Triton interprets its kernels."""
    return json.loads(run_interpreted("-m", module, *arguments))


def run_interpreted(*words: str) -> str:
    """What `python <words>` prints where Triton interprets its kernels; it must end well."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
