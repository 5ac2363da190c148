"""The benchmarks' options cost nothing before one of them runs."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["kernels.command", "quality", "parity", "throughput.command", "compare", "soak"])
def test_adding_the_options_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import argparse, sys; from storyadapter.bench.{module} import add_arguments;"
        "add_arguments(argparse.ArgumentParser());"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
