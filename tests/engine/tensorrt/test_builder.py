"""Real builds with TensorRT-RTX, without a GPU: every network, both half precisions, two architectures at once."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from storyadapter.checkpoint import Checkpoint
from storyadapter.engine.opening import build_engine
from storyadapter.engine.store import EngineStore
from storyadapter.engine.tensorrt import engine_name
from storyadapter.engine.tensorrt.builder import build_request, profiles_of, run_worker
from storyadapter.engine.tensorrt.library import Library
from storyadapter.engine.tensorrt.options import BuildOptions
from storyadapter.engine.tensorrt.worker import NetworkRequest, parse_layers
from storyadapter.export.onnx_export import export_compared, export_network
from storyadapter.export.verify import TOLERANCE
from storyadapter.method.errors import EngineBuildError, InputError
from storyadapter.model.contract import NetworkSpec, ShapeRanges, TensorSpec, network_specs, size_of
from storyadapter.model.modules import VaeDecoder
from storyadapter.model.numerics import NumberFormat, Numerics, Precision
from tests.engine.tensorrt.building import (
    LETTERS,
    OPTIONS,
    RANGES,
    TARGETS,
    Built,
    bound_tensors,
    built_size,
    layer_block_spec,
    small_onnx,
)
from tests.engine.worker_processes import worker_processes
from tests.export import quantized

pytest.importorskip("tensorrt_rtx")

DTYPES = {"fp16": "Half", "bf16": "BFloat16"}
HALF: tuple[Precision, ...] = ("fp16", "bf16")
SMALL = NetworkSpec("small", (TensorSpec("x", ("B", 8)),), (TensorSpec("y", ("B", 8)),))


@pytest.mark.parametrize("precision", HALF)
def test_every_network_is_built_with_the_contracts_inputs_and_outputs(
    built: Callable[[Precision], Built], precision: Precision
) -> None:
    build = built(precision)
    geometry = build.checkpoint.geometry
    more = {"control_embedding_0", "control_projection_0", "controlnet_0"}
    assert (more & network_specs(geometry).keys() == more) == (geometry.guidance_embedding > 0) == (precision == "bf16")
    latent_sizes = [(height // 8, width // 8) for height, width in OPTIONS.resolutions]
    for name, spec in network_specs(geometry).items():
        found = {tensor.name: tensor for tensor in bound_tensors(build.text(name))}
        assert found.keys() == {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        profiles = profiles_of(spec, LETTERS, latent_sizes)
        for tensor in (*spec.inputs, *spec.outputs):
            seen = found[tensor.name]
            own = {"float32": "Float", "int32": "Int32"} | {name: DTYPES[precision] for name in ("float16", "bfloat16")}
            assert seen.is_input == (tensor in spec.inputs)
            assert seen.dtype == own[tensor.dtype_name(precision)]
            assert seen.shape == tuple(map(built_size, tensor.shape))
            if not seen.is_input:
                continue
            assert len(seen.profiles) == len(profiles)
            for (least, _, most), letters in zip(seen.profiles, profiles, strict=True):
                for bound, shape in (("minimum", least), ("maximum", most)):
                    values = {letter: getattr(allowed, bound) for letter, allowed in letters.items()}
                    assert shape == tuple(size_of(dim, values) for dim in tensor.shape)


@pytest.mark.parametrize("precision", HALF)
def test_a_store_entry_holds_engine_layers_and_log_of_every_network(
    built: Callable[[Precision], Built], precision: Precision
) -> None:
    build = built(precision)
    names = set(network_specs(build.checkpoint.geometry))
    files = {f"{name}.{kind}" for name in names for kind in ("engine", "layers", "log")}
    assert set(build.engine.files) == files
    details = build.engine.details
    errors = details["relative_error_against_eager"]
    assert errors.keys() == names
    # a small network's may be none at all, where both round its sums to the same halves
    assert {name: error for name, error in errors.items() if error >= TOLERANCE[precision]} == {}
    assert errors["denoiser"] > 0
    assert details["builds"].keys() == names
    for name, report in details["builds"].items():
        layers = parse_layers(build.text(name))
        assert report["engine_bytes"] == build.engine.files[engine_name(name)]
        assert report["layers"] == len(layers)
        assert report["fused_attentions"] == sum(layer.is_fused_attention for layer in layers)
        assert report["peak_memory_bytes"] > 100 << 20
        assert 0 < report["parse_seconds"] < report["seconds"]
    assert build.identity.architecture == "sm89+sm120"
    assert build.identity.backend_version.startswith("tensorrt-rtx ")


def test_the_vaes_scaling_factor_is_not_rounded(built: Callable[[Precision], Built]) -> None:
    """As a constant in bf16 it is 0.3 % off, and so is every picture."""
    errors = built("bf16").engine.details["relative_error_against_eager"]
    assert errors["vae_decoder"] < 1e-4


def test_a_guidance_and_residuals_are_computed_as_by_eager(built: Callable[[Precision], Built]) -> None:
    """A file in bf16 is compared as its fp32 twin: nothing of it is rounded."""
    errors = built("bf16").engine.details["relative_error_against_eager"]
    for network in ("control_embedding_0", "control_projection_0", "controlnet_0", "denoiser"):
        assert 0 < errors[network] < 1e-5


@pytest.mark.parametrize("precision", HALF)
def test_every_attention_of_the_denoiser_is_in_the_layer_list(
    built: Callable[[Precision], Built], precision: Precision
) -> None:
    """By the names of the ONNX nodes: none of the operator's calls was lost on the way."""
    build = built(precision)
    nodes = {node for layer in parse_layers(build.text("denoiser")) for node in layer.nodes}
    blocks = sum(width.layers for width in build.checkpoint.geometry.widths)
    text = {node for node in nodes if "GlobalReferenceCrossAttention/Attention" in node}
    references = {node for node in nodes if "GlobalReferenceCrossAttention/Softmax" in node}
    own = {node for node in nodes if node.startswith("node_scaled_dot_product_attention")}
    assert len(text) == len(references) == len(own) == blocks


def test_progress_grows_and_stages_are_told(built: Callable[[Precision], Built]) -> None:
    build = built("fp16")
    denoiser = [fraction for network, fraction in build.fractions if network == "denoiser"]
    assert len(denoiser) >= 2
    assert denoiser == sorted(denoiser)
    assert denoiser[0] > 0 and denoiser[-1] <= 1
    stages = [what for network, what in build.stages if network == "denoiser"]
    assert stages[:2] == ["exporting to ONNX", "comparing with eager"]
    assert stages[2].startswith("building the engine for sm89, sm120 with tensorrt-rtx ")


def test_the_same_build_again_takes_what_is_there(built: Callable[[Precision], Built]) -> None:
    build = built("fp16")

    def never(network: str, what: str) -> None:
        raise AssertionError(f"{network}: {what}")

    started = time.perf_counter()
    again = build_engine(
        build.checkpoint, build.identity, RANGES, options=OPTIONS, engine_dir=build.store.root, on_stage=never
    )
    assert again.key == build.engine.key
    assert time.perf_counter() - started < 2


def test_a_run_finds_the_engine_by_its_own_architecture(built: Callable[[Precision], Built]) -> None:
    """It asks for one of the two architectures, and for nothing of how the engine was tuned."""
    build = built("fp16")
    for target in TARGETS:
        asked = replace(build.identity, architecture=target, tuning=())
        assert build.store.find(asked, RANGES, "build it").key == build.engine.key


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "sm90"}, "architecture is sm89+sm120 in the store, sm90 asked for"),
        ({"backend_version": "tensorrt 10.14.1"}, "backend version is tensorrt-rtx"),
        ({"numerics": Numerics("bf16")}, "precision is fp16 in the store, bf16 asked for"),
        ({"numerics": Numerics.of("fp16", vae_decoder="fp32")}, "VAE precision is fp16 in the store, fp32 asked for"),
    ],
)
def test_what_doesnt_fit_is_told_by_name_with_the_command(
    built: Callable[[Precision], Built], changes: dict[str, Any], told: str
) -> None:
    build = built("fp16")
    with pytest.raises(InputError) as caught:
        build.store.find(replace(build.identity, **changes), RANGES, "storyadapter-trt build --it")
    assert told in str(caught.value)
    assert str(caught.value).endswith("build it: storyadapter-trt build --it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        (replace(RANGES, max_references=7), "max references is 6, 7 asked for"),
        (replace(RANGES, max_frames=5), "max frames is 4, 5 asked for"),
        (replace(RANGES, width=replace(RANGES.width, maximum=160)), "width is 64..128, 64..160 asked for"),
    ],
)
def test_ranges_that_dont_fit_are_told_by_name(
    built: Callable[[Precision], Built], ranges: ShapeRanges, told: str
) -> None:
    build = built("fp16")
    with pytest.raises(InputError) as caught:
        build.store.find(replace(build.identity, architecture="sm89"), ranges, "storyadapter-trt build --it")
    assert told in str(caught.value)
    assert str(caught.value).endswith("build it: storyadapter-trt build --it")


@pytest.mark.parametrize("channels", [640, 1280])
def test_a_full_size_layer_block_is_built_with_every_attention_fused(
    layer_block_onnx: Callable[[int], Path], rtx: Library, tmp_path: Path, channels: int
) -> None:
    """SDXL's head size of 64: self-attention, text attention and reference attention are one kernel each."""
    request = block_request(channels, layer_block_onnx(channels), tmp_path, rtx)
    report = run_worker("block", request, lambda fraction: None)
    layers = parse_layers(Path(request.layers).read_text())
    assert report.layers == len(layers) > 10
    assert report.fused_attentions == 3
    assert report.engine_bytes == Path(request.engine).stat().st_size > channels * channels * 16


@pytest.mark.parametrize(("form", "targets"), [("fp8", TARGETS), ("int8", ("sm80", "sm86")), ("int8", TARGETS)])
def test_quantized_products_are_built_as_such(
    form: NumberFormat, targets: tuple[str, ...], rtx: Library, tmp_path: Path
) -> None:
    spec, letters, module = quantized.SPEC, quantized.LETTERS, quantized.Products(torch.float16, form).eval()
    path, _ = export_compared(spec, module, letters, "fp16", tmp_path)
    request = build_request(spec, path, tmp_path, letters, "fp16", rtx, targets, BuildOptions())
    report = run_worker("products", request, lambda fraction: None)
    products = [layer for layer in parse_layers(Path(request.layers).read_text()) if layer.is_quantized_product]
    assert report.quantized_products == len(products) == 3
    assert {layer.type for layer in products} == {"gemm", "correlation"}


def block_request(channels: int, onnx: Path, folder: Path, library: Library) -> NetworkRequest:
    return build_request(layer_block_spec(channels), onnx, folder, LETTERS, "fp16", library, TARGETS, BuildOptions())


def test_ctrl_c_ends_the_build_at_once(layer_block_onnx: Callable[[int], Path], rtx: Library, tmp_path: Path) -> None:
    request = block_request(640, layer_block_onnx(640), tmp_path, rtx)
    seen: list[psutil.Process] = []

    def interrupt(fraction: float) -> None:
        seen.extend(worker_processes())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker("block", request, interrupt)
    started = time.perf_counter()
    assert seen
    assert not any(process.is_running() for process in seen)
    assert time.perf_counter() - started < 1
    assert not Path(request.engine).exists()


def test_a_build_killed_for_want_of_memory_is_one_line(
    layer_block_onnx: Callable[[int], Path], rtx: Library, tmp_path: Path
) -> None:
    request = block_request(640, layer_block_onnx(640), tmp_path, rtx)

    def kill(fraction: float) -> None:
        for process in worker_processes():
            process.kill()

    with pytest.raises(EngineBuildError, match="^block: the build was killed, most likely for want of memory; .*$"):
        run_worker("block", request, kill)


def test_no_build_outlives_the_program_that_asked(
    layer_block_onnx: Callable[[int], Path], rtx: Library, tmp_path: Path
) -> None:
    request = block_request(640, layer_block_onnx(640), tmp_path, rtx)
    (tmp_path / "request").write_bytes(pickle.dumps(request))
    program = (
        "import sys, pathlib, pickle\n"
        "from storyadapter.engine.tensorrt.builder import run_worker\n"
        "request = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "run_worker('block', request, lambda fraction: print('building', flush=True))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "request")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout and parent.stdout.readline() == "building\n"
        workers = psutil.Process(parent.pid).children()
        assert workers
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_a_program_killed_while_it_builds_leaves_the_store_usable(
    built: Callable[[Precision], Built], tmp_path: Path
) -> None:
    words = ["--backend", "tensorrt", "--target", "sm89", "--engine-dir", str(tmp_path / "store"), "--json-log"]
    code = "import sys; from storyadapter.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "build", *words]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout
        for line in program.stdout:
            if '"text": "building the engine' in line:
                break
        os.kill(program.pid, signal.SIGKILL)
    store = EngineStore(tmp_path / "store")
    left = [path for path in store.root.iterdir() if path.name.endswith(".building")]
    assert len(left) == 1 and any(left[0].iterdir())
    assert store.scan() == ([], [])
    identity = built("fp16").identity
    engine = store.build(identity, RANGES, lambda folder: {}, lambda message: None)
    assert store.scan() == ([engine], [])
    assert not left[0].exists()


def refusal(request: NetworkRequest) -> str:
    """What the parser says of a small network's one node."""
    with pytest.raises(EngineBuildError) as caught:
        run_worker("small", request, lambda fraction: None)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("small: tensorrt_rtx refused: node 'culprit' (")
    assert text.endswith("; another version of it may take this, or another backend: see doctor")
    assert not Path(request.engine).exists()
    return text


def test_an_unknown_operator_is_told_with_the_node(rtx: Library, tmp_path: Path) -> None:
    assert " (NoSuchOperator): " in refusal(small_request("NoSuchOperator", rtx, tmp_path))


@pytest.mark.parametrize(
    ("op_type", "shape", "words"),
    [("Add", (8,), "ElementWiseOperation SUM"), ("MatMul", (8, 8), "IMatrixMultiplyLayer")],
)
def test_types_that_differ_are_told_with_the_node(
    rtx: Library, tmp_path: Path, op_type: str, shape: tuple[int, ...], words: str
) -> None:
    """The network is strongly typed: nothing is cast on the way."""
    text = refusal(small_request(op_type, rtx, tmp_path, np.ones(shape, np.float32)))
    assert f" ({op_type}): " in text
    assert re.search(rf"culprit: {words} must have same input types\..*Half.*Float", text)
    same = small_request(op_type, rtx, tmp_path, np.ones(shape, np.float16))
    assert run_worker("small", same, lambda fraction: None).engine_bytes > 0


def test_a_network_that_isnt_the_contracts_is_refused_before_it_is_built(rtx: Library, tmp_path: Path) -> None:
    request = small_request("Relu", rtx, tmp_path)
    other = replace(request, inputs=(replace(request.inputs[0], dtype="BF16"),))
    with pytest.raises(EngineBuildError, match=r"the parsed network's inputs are \[\('x', \(-1, 8\), 'HALF'\)\]"):
        run_worker("small", other, lambda fraction: None)
    assert run_worker("small", request, lambda fraction: None).engine_bytes > 0


def test_a_full_disk_is_an_os_error(rtx: Library, tmp_path: Path) -> None:
    """The store tells it in one line, with what to do."""
    request = replace(small_request("Relu", rtx, tmp_path), engine="/dev/full")
    with pytest.raises(OSError) as caught:
        run_worker("small", request, lambda fraction: None)
    assert caught.value.errno == errno.ENOSPC


def test_a_missing_library_is_the_builders_early_end(rtx: Library, tmp_path: Path) -> None:
    request = replace(small_request("Relu", rtx, tmp_path), module="no_such_tensorrt")
    with pytest.raises(EngineBuildError, match=r"^small: no_such_tensorrt's builder ended early \(exit code 1\): .*$"):
        run_worker("small", request, lambda fraction: None)


def small_request(op_type: str, library: Library, folder: Path, other: np.ndarray | None = None) -> NetworkRequest:
    return build_request(
        SMALL, small_onnx(folder, op_type, other), folder, LETTERS, "fp16", library, ("sm89",), BuildOptions()
    )


def test_options_reach_the_builder(layer_block_onnx: Callable[[int], Path], rtx: Library, tmp_path: Path) -> None:
    """As the options of the command line, and read back from TensorRT's own configuration."""
    code = (
        "import importlib, json, pickle, sys\n"
        "from storyadapter.engine.tensorrt.worker import _configure\n"
        "request = pickle.load(sys.stdin.buffer)\n"
        "trt = importlib.import_module(request.module)\n"
        "config = trt.Builder(trt.Logger()).create_builder_config()\n"
        "def values():\n"
        "    workspace = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)\n"
        "    count = config.num_compute_capabilities\n"
        "    targets = [config.get_compute_capability(index).name for index in range(count)]\n"
        "    return config.builder_optimization_level, workspace, targets\n"
        "before = values()\n"
        "_configure(trt, config, request)\n"
        "print(json.dumps([before, values()]))\n"
    )

    def configured(options: BuildOptions) -> list[list[Any]]:
        request = build_request(
            layer_block_spec(640), layer_block_onnx(640), tmp_path, LETTERS, "fp16", rtx, TARGETS, options
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, input=pickle.dumps(request), capture_output=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    (level, workspace, targets), plain = configured(BuildOptions())
    assert plain == [level, workspace, ["SM89", "SM120"]] and targets == []
    assert (level, workspace) != (1, 48 << 20)
    assert configured(BuildOptions(1, 48))[1] == [1, 48 << 20, ["SM89", "SM120"]]


def test_what_the_options_do(layer_block_onnx: Callable[[int], Path], rtx: Library, tmp_path: Path) -> None:
    """Another architecture gives an engine of another size (two of them as large as the larger one, give or take what
    alignment adds), and little workspace another order of the layers. A level gives the same: so `BuildOptions` takes
    none for TensorRT-RTX."""
    request = block_request(640, layer_block_onnx(640), tmp_path, rtx)

    def build(**changes: Any) -> tuple[int, str]:
        report = run_worker("block", replace(request, **changes), lambda fraction: None)
        return report.engine_bytes, Path(request.layers).read_text()

    one = {"targets": ("sm89",)}
    size, layers = build(**one)
    assert build(targets=("sm120",))[0] != size <= build()[0]
    assert build(**one, workspace_bytes=1 << 30) == (size, layers)
    assert build(**one, workspace_bytes=1 << 20)[1] != layers
    assert build(**one, optimization_level=0) == build(**one, optimization_level=5) == (size, layers)
    assert not rtx.has_levels


def test_a_vae_that_asks_for_fp32_is_built_in_fp32(demo_checkpoint: Checkpoint, rtx: Library, tmp_path: Path) -> None:
    """Its attention has no fp32 kernel: it is taken apart instead of ending the build."""
    spec = network_specs(demo_checkpoint.geometry)["vae_decoder"]
    module = VaeDecoder(demo_checkpoint.load("vae", torch.float32)).eval()
    path = export_network(spec, module, LETTERS, "fp32", tmp_path)
    request = build_request(spec, path, tmp_path, LETTERS, "fp32", rtx, ("sm89",), BuildOptions())
    report = run_worker(spec.name, request, lambda fraction: None)
    assert report.fused_attentions == 0
    tensors = bound_tensors(Path(request.layers).read_text())
    assert [tensor.dtype for tensor in tensors] == ["Float", "Float"]
