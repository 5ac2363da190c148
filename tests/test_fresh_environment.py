"""What `pip install .` alone gives a user: the backend that needs PyTorch and a compiler, and nothing of ONNX."""

import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.fresh_environment
@pytest.mark.timeout(900)
def test_without_extras_the_compiled_backend_builds_and_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(source)], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(source)]
    subprocess.run(install, check=True)
    absent = "import importlib.util as u; print(*filter(u.find_spec, ('onnx', 'onnxruntime', 'onnxscript')))"
    assert subprocess.run([python, "-c", absent], capture_output=True, text=True, check=True).stdout.strip() == ""
    model = [
        *("--base-model", str(tiny_model_dir), "--image-encoder", str(tiny_model_dir / "image_encoder")),
        *("--ip-adapter", str(tiny_model_dir / "ip-adapter.safetensors"), "--backend", "inductor"),
        *("--precision", "fp32", "--max-frames", "2", "--engine-dir", str(tmp_path / "engines")),
    ]
    # without a style: its words would fill a second chunk by the tiny model's tokenizers
    story = ["--prompt", "a fox", "an owl", "--style", "none", "--steps", "2", "--iterations", "1"]
    story += ["--out", str(tmp_path / "out")]
    for words in (["build", *model], ["run", *model, *story]):
        done = subprocess.run([python, "-m", "storyadapter", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "contact-sheet.png").is_file()
