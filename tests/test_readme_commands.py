"""The README's commands, typed in order in an empty folder as somebody would who reads nothing else."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from storyadapter.demo.training.networks import TINY, write_random_model
from storyadapter.method.constants import NEGATIVE_PROMPT, STYLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# what isn't typed here: an environment of its own has test_fresh_environment.py, and there is no hub
_ELSEWHERE = ("make ", "python3 -m venv", "pip install", "hf download")
_READY_WITHIN = 120  # seconds


def commands() -> list[str]:
    """Every command of the README's blocks, lines that go on joined, comments taken off."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = re.sub(r"\n {2,}", " ", blocks).splitlines()
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines if line.strip()]


def model_files(folder: Path, model: Path) -> None:
    """Tiny files in the layout that the README's two downloads leave: variants alone, as `--include` asks for."""
    shutil.copytree(model, folder / "sdxl", ignore=shutil.ignore_patterns("image_encoder", "ip-adapter*"))
    for path in (folder / "sdxl").glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    shutil.copytree(model / "image_encoder", folder / "sdxl_models" / "image_encoder")
    shutil.copy(model / "ip-adapter.safetensors", folder / "sdxl_models" / "ip-adapter_sdxl.safetensors")


def is_ready() -> bool:
    """Whether a server answers where the README's does."""
    try:
        return httpx.get("http://127.0.0.1:8000/readyz").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def served(command: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """The server, once it is ready; it ends by SIGTERM."""
    with (folder / "server.txt").open("w") as told:
        words = ["bash", "-c", command]
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=told, stderr=told)
        try:
            began = time.monotonic()
            while not is_ready():
                assert process.poll() is None and time.monotonic() - began < _READY_WITHIN, (
                    folder / "server.txt"
                ).read_text()
                time.sleep(0.5)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "server.txt").read_text()


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_every_command_works_as_it_stands_in_order(tmp_path: Path) -> None:
    (tale,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "tale.yaml").write_text(tale, encoding="utf-8")
    # whole words are tokens, as to SDXL's tokenizers: letter by letter the texts would fill several chunks
    texts = " ".join([tale, *commands(), *map(" ".join, STYLES.values()), NEGATIVE_PROMPT])
    words = sorted(set(re.findall("[a-z]+", texts.lower())))
    write_random_model(tmp_path / "tiny", config=TINY, words=words)
    model_files(tmp_path / "models", tmp_path / "tiny")
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    typed = [command for command in commands() if not command.startswith(_ELSEWHERE)]
    (variable,) = [command for command in typed if command.startswith("model=(")]

    def type_in(command: str) -> str:
        script = f"set -o pipefail\n{variable}\n{command}"
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    server = next(index for index, command in enumerate(typed) if command.startswith("storyadapter-trt serve"))
    for command in typed[:server]:
        type_in(command)
    with served(f"{variable}\nexec {typed[server]}", tmp_path, environment):
        (request,) = [type_in(command) for command in typed[server + 1 :]]
    assert '"state"' in request
    for name in ("tale", "tale-edited", "tale-2"):
        assert (tmp_path / name / "contact-sheet.png").is_file() and (tmp_path / name / "frames" / "001.png").is_file()
    assert (tmp_path / "tale" / "book.html").is_file()
