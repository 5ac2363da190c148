"""What a run with an engine imports: what it needs, and nothing that takes longer than the rest of its start."""

import subprocess
import sys
from pathlib import Path

import pytest

LARGE = ("diffusers", "transformers", "accelerate", "torch._dynamo", "torch._inductor", "sympy", "scipy", "triton")
PROGRAM = f"""
import sys
from storyadapter.__main__ import main
code = main(sys.argv[1:])
print([name for name in {LARGE} if name in sys.modules])
sys.exit(code)
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_a_run_of_a_model_that_was_seen_before(
    backend: str, tiny_model: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    engines = request.getfixturevalue("tiny_engine_dir" if backend == "onnxruntime" else "tiny_inductor_dir")
    found = []
    for number in range(2):
        words = ["run", *tiny_model, "--backend", backend, "--precision", "fp32", "--engine-dir", str(engines)]
        words += ["--prompt", "a fox", "an owl", "--style", "none", "--steps", "2", "--iterations", "1", "--quiet"]
        words += ["--seed", "1", "--max-frames", "2", "--out", str(tmp_path / str(number))]
        command = [sys.executable, "-c", PROGRAM, *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    # a package for a CPU calls the reference's operator, which PyTorch wraps in its compiler at the first call
    spared = LARGE if backend == "onnxruntime" else LARGE[:3]
    assert not [name for name in spared if f"'{name}'" in found[1]], found
