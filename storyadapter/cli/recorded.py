"""A run's model in its record, so that what is done with the run later finds it."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from storyadapter.checkpoint import CheckpointPaths, ControlNetSpec
from storyadapter.cli.options import ModelChoice, given_checkpoint_options, model_choice


def recorded_files(paths: CheckpointPaths) -> dict[str, Any]:
    """The model of a run as its record names it, so that an edit finds it from anywhere; nothing for the demo model."""

    def place(name: Path | str) -> str:
        return os.path.abspath(name) if os.path.exists(name) else str(name)

    given = {item.name: getattr(paths, item.name) for item in fields(paths)}
    lists = {
        "lora": [f"{place(lora.path)}:{lora.scale!r}" for lora in given.pop("loras")],
        "controlnet": [str(ControlNetSpec(Path(place(name)))) for name in given.pop("controlnets")],
    }
    names = (
        {} if paths.is_demo else {name: place(value) for name, value in given.items() if value and name != "variant"}
    )
    lists = {name: values for name, values in lists.items() if values}
    return {**names, **({"variant": paths.variant} if paths.variant else {}), **lists}


def recorded_model(args: argparse.Namespace, details: Mapping[str, Any]) -> ModelChoice:
    """The model that was typed, or else that of a run's record. Raises InputError: see `model_choice`."""
    files = details.get("files")
    if not given_checkpoint_options(args) and isinstance(files, dict):
        for name, value in files.items():
            setattr(args, name, value)
    return model_choice(args)
