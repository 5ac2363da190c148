"""What a checkpoint's files say of how it is sampled: the scheduler's configuration, marker tensors, metadata."""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from storyadapter.checkpoint.paths import LoraSpec, read_config
from storyadapter.checkpoint.tensor_files import read_headers, read_metadata
from storyadapter.method.errors import CheckpointError, Field, Text
from storyadapter.method.model_sampling import ModelSampling

# Marker tensors of single files whose UNet is preconditioned otherwise (arXiv 2206.00364): no time steps of SDXL's.
_FOREIGN_MARKERS: Final = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_FOREIGN_CLASSES: Final = ("EDM", "FlowMatch")  # beginnings of the names of diffusers' schedulers for such UNets
# what metadata calls a prediction type, in lower case
_PREDICTIONS: Final = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}


def read_sampling(folder: Path, file: Path | None, loras: Collection[LoraSpec]) -> tuple[ModelSampling, list[Text]]:
    """What a model says of its own sampling, and what is to be told of it, one line each.

    Marker tensors and metadata of a single file come before the configuration in its configuration folder: these lie
    with the weights.

    Args:
        folder: a diffusers folder: of the model, or of the configurations of a single file.
        file: the single file, if it is one.
        loras: for whose UNet they were trained is told where it isn't this one.

    Raises:
        CheckpointError: the configuration is corrupt, or the UNet isn't sampled as SDXL's.
    """
    configured = _read_configuration(folder)
    marked = _read_file(file) if file else ModelSampling()
    notices: list[Text] = []
    found, said = marked.prediction_type, configured.prediction_type
    if found and said and found != said:
        notices.append(f"{marked.source} says {found}, {configured.source} says {said}; taken from the former")
    elif not found and not said:
        assumed = f"{file or folder} doesn't say what its UNet predicts: epsilon is assumed ("
        notices.append((assumed, Field("prediction_type"), ")"))
    facts = marked if found else configured
    if marked.zero_terminal_snr:
        facts = replace(facts, zero_terminal_snr=True)
    for lora in loras:
        trained = _prediction_in(read_metadata(lora.path))
        if trained and trained != (facts.prediction_type or "epsilon"):
            predicts = facts.prediction_type or "epsilon"
            notices.append(f"{lora.path} was trained on a UNet with {trained} prediction, this one has {predicts}")
    return replace(facts, scheduler=configured.scheduler), notices


def _read_configuration(folder: Path) -> ModelSampling:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return ModelSampling()
    config = read_config(path)
    name, prediction = config.get("_class_name"), config.get("prediction_type")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: _class_name is {name!r}", expected="the class of a diffusers scheduler")
    if (index := folder / "model_index.json").exists():  # diffusers' pipelines take the class that this names
        named = read_config(index).get("scheduler")
        if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
            config["_class_name"] = named[1]
    if name.startswith(_FOREIGN_CLASSES):
        raise CheckpointError(
            f"{path}: {name}, for a UNet that isn't trained on SDXL's noise levels", expected="an SDXL base model"
        )
    if prediction is not None and not isinstance(prediction, str):
        raise CheckpointError(f"{path}: prediction_type is {prediction!r}", expected="a word such as 'epsilon'")
    starts_from_noise = config.get("rescale_betas_zero_snr")
    if starts_from_noise is not None and not isinstance(starts_from_noise, bool):
        raise CheckpointError(f"{path}: rescale_betas_zero_snr is {starts_from_noise!r}", expected="true or false")
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds a value that is no finite number", expected="a configuration") from error
    # diffusers' classes predict epsilon where their configuration doesn't say otherwise
    return ModelSampling(prediction or "epsilon", starts_from_noise, str(path), text)


def _read_file(path: Path) -> ModelSampling:
    names, metadata = read_headers(path).keys(), read_metadata(path)
    if foreign := [name for name in _FOREIGN_MARKERS if name in names]:
        raise CheckpointError(
            f"{path} has {foreign[0]}: a UNet that isn't trained on SDXL's noise levels", expected="an SDXL base model"
        )
    if "v_pred" in names:
        return ModelSampling("v_prediction", "ztsnr" in names, f"the marker v_pred in {path}")
    prediction = _prediction_in(metadata)
    starts_from_noise = "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    return ModelSampling(prediction, starts_from_noise or None, f"the metadata of {path}" if prediction else "")


def _prediction_in(metadata: Mapping[str, str]) -> str | None:
    """What a `.safetensors` header says (modelspec's key, or those of sd-scripts); None: nothing that is known."""
    for key, value in metadata.items():
        if key.lower().rpartition(".")[2] == "prediction_type":
            return _PREDICTIONS.get(value.strip().lower())
        if key == "ss_v_parameterization" and value.lower() in ("true", "false"):
            return "v_prediction" if value.lower() == "true" else "epsilon"
    return None
