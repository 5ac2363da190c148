"""From a typed name to the files of one network: hub names, variants, shards, configuration files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storyadapter.method.errors import CheckpointError, Field

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<inner>/.+)?", re.ASCII)


def find(field: str, name: Path | str) -> Path:
    """The file or folder that `name` stands for: a path, or "owner/name[/path inside]" in the Hugging Face cache.

    Args:
        field: of `CheckpointPaths`, for messages.
        name: what was asked for.

    Raises:
        CheckpointError: neither is there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    hub_name = _HUB_NAME.fullmatch(str(name))
    if hub_name is None:
        raise CheckpointError(Field(field), f" {name}: there is no such file or folder")
    snapshot = _cached_snapshot(hub_name["repo"])
    if snapshot is None:
        raise CheckpointError(
            Field(field),
            f" {name}: there is no such file or folder, and no model of that name in the local Hugging Face cache",
            advice=f"give a path, or fetch it first: hf download {hub_name['repo']}",
        )
    inner = snapshot / (hub_name["inner"] or "").lstrip("/")
    if not inner.exists():
        raise CheckpointError(
            Field(field),
            f" {name}: {hub_name['repo']} is in the local Hugging Face cache, but without "
            f"{hub_name['inner'].lstrip('/')}",
            advice=f"fetch it first: hf download {hub_name['repo']}",
        )
    return inner


def _cached_snapshot(repo: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable, or something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", expected="the folder of a model, which has one") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the file is corrupt, fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a JSON {type(config).__name__}", expected="an object with settings")
    return config


# The stems under which diffusers and transformers save weights, each for .safetensors and for pickles.
DIFFUSERS_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS_STEMS = ("model", "pytorch_model")


def weight_files(folder: Path, stems: tuple[str, str], variant: str | None) -> tuple[Path, ...]:
    """The files that hold one network's weights; of a sharded network the index comes first.

    Files of the variant asked for come first, then plain files, then those of the only variant there is;
    `.safetensors` comes before `.bin` each time.

    Raises:
        CheckpointError: there are no weights, several variants and none asked for, or the index is corrupt.
    """
    for candidate in ([variant] if variant else []) + [None]:
        if files := _files_of_variant(folder, stems, candidate):
            return files
    variants = sorted(set(_variants(folder, stems)))
    if len(variants) == 1:
        return _files_of_variant(folder, stems, variants[0])
    if variants:
        raise CheckpointError(
            f"{folder} has weights of the variants {', '.join(variants)} only",
            advice=("say which one with ", Field("variant")),
        )
    raise CheckpointError(f"{folder} has no weights", expected=f"{stems[0]}.safetensors or {stems[1]}.bin")


def _files_of_variant(folder: Path, stems: tuple[str, str], variant: str | None) -> tuple[Path, ...]:
    infix = f".{variant}" if variant else ""
    for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
        whole = folder / f"{stem}{infix}.{suffix}"
        if whole.exists():
            return (whole,)
        index = folder / f"{stem}.{suffix}.index{infix}.json"
        if index.exists():
            return (index, *_shards(index))
    return ()


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_config(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; the file is corrupt, fetch it again")
    shards = {name: index.parent / name for name in sorted(set(names.values()))}
    for name, shard in shards.items():
        if shard.parent != index.parent:
            raise CheckpointError(f"{index} names {name!r}", expected="files beside it")
        if not shard.exists():
            raise CheckpointError(f"{shard} is missing; {index.name} lists {len(shards)} shards")
    return tuple(shards.values())


def _variants(folder: Path, stems: tuple[str, str]) -> Iterator[str]:
    for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
        # A shard is no variant; its index is.
        whole = re.compile(rf"{re.escape(stem)}\.((?!.*-\d{{5}}-of-\d{{5}})[\w-]+)\.{suffix}")
        index = re.compile(rf"{re.escape(stem)}\.{suffix}\.index\.([\w-]+)\.json")
        for path in folder.glob("*"):
            if match := whole.fullmatch(path.name) or index.fullmatch(path.name):
                yield match[1]
