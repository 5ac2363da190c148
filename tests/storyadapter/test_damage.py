"""Bits that flip and bytes that become zero, anywhere in any file that is read: told in a line, repaired, or read as
what is there now and recorded as that; never a traceback, and of engines and runs no picture but the right one.

Each kind of file at a few places; at others, and more, with `PLACES=200 pytest …`.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from storyadapter.checkpoint import Checkpoint, LoraSpec
from storyadapter.engine.identity import model_weights
from storyadapter.engine.opening import open_networks
from storyadapter.engine.store import EngineStore, StoredEngine
from storyadapter.method.errors import EngineMismatchError, InputError, StoryAdapterError
from storyadapter.method.events import FrameFinished
from storyadapter.method.plan import RunPlan
from storyadapter.method.sampler import sampler_of
from storyadapter.method.story import Story
from storyadapter.model.numerics import Numerics
from storyadapter.output.frame_files import read_picture
from storyadapter.output.run_folder import RunFolder
from storyadapter.quantization.recipe import INT8
from storyadapter.quantization.scales import RECIPE_NAME, SCALES_NAME, Scales
from storyadapter.serve.queue import StoryQueue

PLACES = int(os.environ.get("PLACES", "8"))
RANDOM = random.Random(PLACES)
SECONDS_AT_MOST = 10


@contextmanager
def damaged(path: Path) -> Iterator[bool]:
    """Inside, the file has a bit that flipped, or up to 4 KiB of zeroes; gives whether it is another file then."""
    right = path.read_bytes()
    wrong, place = bytearray(right), RANDOM.randrange(len(right))
    if RANDOM.random() < 0.5:
        wrong[place] ^= 1 << RANDOM.randrange(8)
    else:
        end = min(len(right), place + RANDOM.choice((1, 16, 4096)))
        wrong[place:end] = bytes(end - place)
    path.write_bytes(wrong)
    started = time.monotonic()
    try:
        yield wrong != right
        assert time.monotonic() - started < SECONDS_AT_MOST
    finally:
        path.write_bytes(right)


# Engines


@pytest.fixture(scope="module")
def engine(tiny_engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredEngine:
    store = EngineStore(tmp_path_factory.mktemp("damaged") / "engines")
    shutil.copytree(tiny_engine_dir, store.root)
    ((found,), _) = store.scan()
    return found


def test_damage_of_an_engines_files_is_found(engine: StoredEngine) -> None:
    store = EngineStore(engine.folder.parent)
    for name in [*engine.files, "manifest.json"]:
        for _ in range(PLACES):
            with damaged(engine.folder / name) as differs:
                engines, warnings = store.scan()
                assert len(engines) + len(warnings) == 1
                if engines and engines[0].damage() is None:  # white space of the manifest, at most
                    assert not differs or (name == "manifest.json" and engines == [engine])
    assert store.scan() == ([engine], []) and engine.damage() is None


def test_a_damaged_engine_is_not_opened(engine: StoredEngine, checkpoint: Checkpoint) -> None:
    (name,) = (name for name in engine.files if name == "vae_decoder.onnx.data")
    asked = {"backend": "onnxruntime", "numerics": engine.identity.numerics, "engine_dir": engine.folder.parent}
    with open(engine.folder / name, "r+b") as file:
        right = file.read(1)
        file.seek(0)
        file.write(bytes([right[0] ^ 64]))
    try:
        told = f"^the engine in {engine.folder} is damaged: {name} isn't what was built; build it again: type this$"
        with pytest.raises(EngineMismatchError, match=told):
            open_networks(checkpoint, **asked, build_command="type this")
    finally:
        with open(engine.folder / name, "r+b") as file:
            file.write(right)


# A run's folder

FRAMES, SCALES = 3, (None, 0.3, 0.5)


def picture(iteration: int, frame: int) -> Image.Image:
    image = Image.linear_gradient("L").resize((40, 32)).convert("RGB")
    ImageDraw.Draw(image).rectangle((frame, iteration, frame + 8, iteration + 8), (60 * frame, 60 * iteration, 200))
    return image


def draw(path: Path, iterations: int = len(SCALES), frames: int = FRAMES) -> list[list[bytes]]:
    """Begin a run, or go on with it, as the runtime does; the pictures of all iterations when it is finished."""
    options = {"frames": FRAMES, "scales": SCALES, "resume": True}
    identity = {"scales": SCALES}
    RunFolder.check(path, identity, **options)
    with RunFolder.open(path, identity, **options) as folder:
        for iteration in range(folder.finished_iterations(), iterations):
            folder.begin_iteration(iteration, [2, 1])
            for frame in range(FRAMES if iteration + 1 < iterations else frames):
                key = f"job {iteration}-{frame}"
                if folder.find(iteration, frame, key) is None:
                    folder.save(
                        FrameFinished(iteration, frame, SCALES[iteration], picture(iteration, frame), key)
                    ).result()
            if iteration + 1 < iterations or frames == FRAMES:
                folder.finish_iteration(iteration, {"denoise": 1.5}, [2, 1])
        if iterations < len(SCALES) or frames < FRAMES:
            return []
        folder.finish({}, ["a", "b", "c"], "Cats")
        rows = [[read_picture(folder.frame_path(i, n)) for n in range(FRAMES)] for i in range(len(SCALES))]
    copies = [read_picture(path / "frames" / f"{n:03d}.png") for n in range(FRAMES)]
    sheet = read_picture(path / "contact-sheet.png")
    return [[image.tobytes() for image in row] for row in (*rows, copies, [sheet])]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> list[list[bytes]]:
    return draw(tmp_path_factory.mktemp("run") / "out")


@pytest.mark.parametrize("whole", [True, False])
def test_a_damaged_run_is_refused_or_drawn_as_it_should_be(
    tmp_path: Path, right: list[list[bytes]], whole: bool
) -> None:
    begun = tmp_path / "begun"
    draw(begun) if whole else draw(begun, 2, 1)
    kinds = [
        *("story.json", "iteration-00/frame-001.png", "iteration-01/frame-000.png", ".thumbnails/iteration-00.png"),
        *(("frames/000.png", "contact-sheet.png", "story.gif") if whole else ()),
    ]
    for name in kinds:
        for number in range(PLACES):
            out = tmp_path / f"{name.replace('/', '-')}-{number}"
            shutil.copytree(begun, out)
            with damaged(begun / name):
                shutil.copyfile(begun / name, out / name)
            try:
                assert draw(out) == right, name
            except InputError as error:
                assert name == "story.json" and "\n" not in str(error)


# A user's own files


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the VAE as a pickle, text encoder 1 as one from before PyTorch 1.6, and a LoRA beside them."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(tiny_model_dir, folder)
    for part, name, as_zip in (("vae", "diffusion_pytorch_model", True), ("text_encoder", "model", False)):
        weights = folder / part / f"{name}.safetensors"
        pickle = weights.with_name("pytorch_model.bin") if part == "text_encoder" else weights.with_suffix(".bin")
        torch.save(load_file(weights), pickle, _use_new_zipfile_serialization=as_zip)
        weights.unlink()
    (folder / "image_encoder" / "preprocessor_config.json").write_text(
        '{"crop_size": 224, "image_std": [0.5, 0.5, 0.5]}'
    )
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")[f"{layer[5:]}.weight"].shape[0]
    lora = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    save_file({**lora, f"{layer}.alpha": torch.tensor(2.0)}, folder / "lora.safetensors", {"ss_network_args": "{}"})
    return folder


def opened(folder: Path) -> Checkpoint:
    """The model, with all that is read of it."""
    return Checkpoint.open(
        base_model=folder,
        image_encoder=folder / "image_encoder",
        ip_adapter=folder / "ip-adapter.safetensors",
        loras=(LoraSpec(folder / "lora.safetensors"),),
    )


PARTS = [
    *(
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "image_encoder/config.json",
        "image_encoder/preprocessor_config.json",
        "scheduler/scheduler_config.json",
    ),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer_config.json"),
    "tokenizer/special_tokens_map.json",
    *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "ip-adapter.safetensors"),
    *("text_encoder/pytorch_model.bin", "image_encoder/model.safetensors", "lora.safetensors"),
]


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_model_is_refused_or_read_as_what_it_is_now(model: Path, name: str) -> None:
    before = model_weights(opened(model)).key
    for _ in range(PLACES):
        with damaged(model / name) as differs:
            try:
                found = opened(model)
                part = name.split("/")[0] if "/" in name else "unet"
                if part in ("unet", "vae", "text_encoder", "image_encoder"):
                    found.load_tensors(part, torch.float32)
                found.load_ip_adapter(torch.float32)
                assert all(len(row) == 77 for row in found.load_tokenizers()[0].padded(["a fox", ""], 77))
                sampler_of(PLAN.for_model(found.sampling).sampler_in(0))
            except StoryAdapterError as error:
                assert "\n" not in str(error)
            else:
                read = any(path == model / name for paths in found.files_by_component.values() for path in paths)
                read = read or name == "lora.safetensors"
                assert (model_weights(found).key != before) == (differs and read)


PLAN = RunPlan(seed=0, height=64, width=64, steps=4, scheduler="checkpoint")
STORIES = {
    "yaml": "title: A day\nstyle: comic\ncharacters: {Fox: a red fox}\nprompts:\n  - Fox wakes up\n  - Fox eats\n",
    "json": '{"title": "A day", "characters": {"Fox": "a small red fox"}, "prompts": ["Fox wakes", "Fox eats"]}',
    "txt": "a fox wakes up\na fox meets an owl\n",
    "csv": 'prompt;negative;seed\n"a fox; red";people;7\nan owl;;8\n',
    "md": "# A day\n\n1. **A fox** wakes up\n2. the fox eats\n   a fish\n",
}


@pytest.mark.parametrize("suffix", STORIES)
def test_a_damaged_story_is_refused_or_read_as_what_it_is_now(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tale.{suffix}"
    path.write_text(STORIES[suffix])
    for _ in range(5 * PLACES):
        with damaged(path):
            try:
                assert list(Story.from_file(path).final_prompts("none"))
            except StoryAdapterError as error:
                assert "\n" not in str(error)


def test_weights_that_changed_under_the_system_are_not_recorded_as_what_they_were(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes are remembered by size and times: here a wrong one is, as if the disk had changed the bytes since."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = model_weights(opened(model)).key
    memory = tmp_path / "storyadapter-trt" / "fingerprints.json"
    entries = json.loads(memory.read_text())
    entries["files"][str((model / "ip-adapter.safetensors").resolve())]["blake3"] = "0" * 64
    memory.write_text(json.dumps(entries))
    told = (
        "^ip-adapter.safetensors isn't what it was when it was hashed, though its size and times are the same; "
        "type the same command again if it is to be used as it is now$"
    )
    with pytest.raises(InputError, match=told):
        open_networks(opened(model), backend="eager", numerics=Numerics("fp32"))
    assert model_weights(opened(model)).key == key
    open_networks(opened(model), backend="eager", numerics=Numerics("fp32"))


# What the program keeps for itself


def test_damaged_scales_are_told(tmp_path: Path) -> None:
    right = Scales(INT8, "model", {"conv": 0.25, "to_q": 0.5}, {"to_q": (1.0, 0.125)})
    right.save(tmp_path)
    for name in (RECIPE_NAME, SCALES_NAME):
        for _ in range(5 * PLACES):
            with damaged(tmp_path / name):
                try:
                    assert Scales.load(tmp_path, "model") == right
                except InputError as error:
                    assert "\n" not in str(error)


def test_a_damaged_queue_of_stories_is_told_or_read(tmp_path: Path) -> None:
    right = tmp_path / "right.sqlite"
    queue = StoryQueue(right)
    for number in range(20):
        queue.add("", "batch", {"prompts": [f"a fox {number}"]}, None, {"seed": number})
    queue.close()
    for _ in range(5 * PLACES):
        path = tmp_path / "queue.sqlite"
        with damaged(right):
            shutil.copyfile(right, path)
        try:
            queue = StoryQueue(path)
            assert len(queue.stories("")) <= 20
            queue.next()
            queue.close()
        except InputError as error:
            assert "\n" not in str(error) and f"{path} can't be read: " in str(error)
        for each in tmp_path.glob("queue.sqlite*"):
            each.unlink()
