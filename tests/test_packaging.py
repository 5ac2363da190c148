"""Every mapped package imports from an editable and from a wheel install, and importing stays cheap."""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("storyadapter", "storyadapter.kernels", "storyadapter.export", "storyadapter.engine", "storyadapter.bench")
HEAVY = ("torch", "diffusers", "transformers", "onnx", "triton", "numpy", "rich")


LIGHT = (
    "storyadapter.method.story",
    "storyadapter.method.plan",
    "storyadapter.model.contract",
    "storyadapter.method.constants",
)


def run_python(code: str, **options: object) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in tracked.decode().split("\0"):
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_mapped_packages_import_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # isolated from the editable install: its import hook must not be what finds them
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, {str(tmp_path)!r})
import importlib
for name in {PACKAGES}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
"""
    run_python(code, cwd=tmp_path)


def test_a_wheel_holds_data_files_and_nothing_else_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"storyadapter"}
    for name in ("py.typed", "demo/story.yaml", "kernels/tiles.json", "cli/events.schema.json"):
        assert f"storyadapter/{name}" in names


def test_a_wheel_holds_the_demo_model_without_its_training(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    demo = tmp_path / "storyadapter" / "demo"
    assert (demo / "model" / "ip-adapter.safetensors").is_file() and not (demo / "training").exists()
    # what isn't in the wheel must not come from the editable install either
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, {str(tmp_path)!r})
import importlib
for name in {sorted(path.stem for path in demo.glob("[!_]*.py"))}:
    importlib.import_module(f"storyadapter.demo.{{name}}")
from storyadapter.__main__ import main
sys.exit(main("bench quality --stories 2 --frames 2 --seeds 1 --iterations 1 --steps 1".split()) not in (0, 1))
"""
    table = run_python(code, cwd=tmp_path)
    assert "| iteration | consistency | fidelity |" in table


@pytest.mark.parametrize("installed", ["wheel", "editable"])
def test_a_strict_type_checker_accepts_the_documented_example(wheel: Path, installed: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (tmp_path / "example.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    (tmp_path / "wrong.py").write_text("import storyadapter\n\nstoryadapter.RunPlan(step=3)\n")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    home = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    if installed == "wheel":
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(home)
    else:
        editable = [*("--no-deps", "--no-build-isolation", "--config-settings", "editable_mode=strict"), "--editable"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--target",
            home,
            *editable,
            wheel.parent / "source",
        ]
        subprocess.run(command, check=True, capture_output=True)
    # without PyTorch and the like, whose types take a minute to read; here they only pass through
    checker = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]
    for name, verdict in (("example.py", "Success"), ("wrong.py", 'Unexpected keyword argument "step" for "RunPlan"')):
        done = subprocess.run([*checker, name], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert verdict in done.stdout, done.stdout + done.stderr


def test_mapped_packages_import_from_the_editable_install(tmp_path: Path) -> None:
    code = f"""
import importlib
for name in {PACKAGES}:
    print(importlib.import_module(name).__file__)
"""
    files = run_python(code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(ROOT) for file in files)


def test_importing_the_packages_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import importlib, sys
for name in {(*PACKAGES, *LIGHT)}:
    importlib.import_module(name)
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code, cwd=tmp_path).strip() == "[]"
