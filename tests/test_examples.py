"""What lies in `examples/` runs as it stands."""

import importlib.util
import json
import subprocess
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path

from fastapi.testclient import TestClient
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def python(*words: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script_draws_its_rounds(tmp_path: Path) -> None:
    python(str(EXAMPLES / "draw_story.py"), "out", "--steps", "2", folder=tmp_path)
    names = [f"round-{iteration}-frame-{frame}.png" for iteration in range(3) for frame in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_the_cells_of_the_notebook_run_in_order(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "story.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(cells).replace("steps=20", "steps=2")
    python("-c", f"{code}\nassert len(frames) == 6 and sheet.size == (2 * width, 3 * height)", folder=tmp_path)


def test_the_service_answers_with_pictures_as_they_are_drawn() -> None:
    spec = importlib.util.spec_from_file_location("service", EXAMPLES / "service.py")
    assert spec is not None and spec.loader is not None
    service = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(service)
    with TestClient(service.app) as client:
        asked = {"prompts": ["a red fox", "an owl"], "steps": 2, "scales": [0.4]}
        lines = [json.loads(line) for line in client.post("/stories", json=asked).text.splitlines()]
        refused = client.post("/stories", json={**asked, "steps": 0})
    assert [(line["round"], line["frame"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({Image.open(BytesIO(b64decode(line["png"]))).tobytes() for line in lines}) == 4
    assert refused.status_code == 422 and "steps" in refused.json()["detail"]
