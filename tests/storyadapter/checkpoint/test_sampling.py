"""What a checkpoint says of how it is sampled, and what is told of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from storyadapter.checkpoint import Checkpoint, LoraSpec
from storyadapter.checkpoint.sampling import read_sampling
from storyadapter.cli.options import option
from storyadapter.method.errors import CheckpointError, spelled
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.method.plan import RunPlan
from storyadapter.method.sampling_notices import sampling_notices
from tests.storyadapter.checkpoint.spoil import edit_config, refuses, tiny_paths

CONFIG = Path("scheduler", "scheduler_config.json")


def file_with(path: Path, *markers: str, **metadata: str) -> Path:
    keys = {name.replace("__", "."): value for name, value in metadata.items()}
    save_file({name: torch.zeros(0) for name in ("model", *markers)}, path, metadata=keys)
    return path


def told(plan: RunPlan, model: ModelSampling) -> list[str]:
    return [spelled(notice, option) for notice in sampling_notices(plan, model)]


def plan(**typed: Any) -> RunPlan:
    return RunPlan(**{"height": 64, "width": 64, "seed": 0, **typed})


def test_a_folder_says_it_in_the_configuration_of_its_scheduler(model_dir: Path) -> None:
    edit_config(model_dir / CONFIG, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    checkpoint = Checkpoint.open(tiny_paths(model_dir))
    sampling = checkpoint.sampling
    assert (sampling.prediction_type, sampling.zero_terminal_snr) == ("v_prediction", True)
    assert sampling.source == str(model_dir / CONFIG)
    assert sampling.configuration["_class_name"] == "EulerDiscreteScheduler"
    assert checkpoint.notices == ()


def test_the_class_is_that_of_the_index_as_for_diffusers(model_dir: Path) -> None:
    edit_config(model_dir / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert Checkpoint.open(tiny_paths(model_dir)).sampling.configuration["_class_name"] == "DDIMScheduler"


def test_what_no_file_says_is_told(model_dir: Path) -> None:
    (model_dir / CONFIG).unlink()
    (notice,) = Checkpoint.open(tiny_paths(model_dir)).notices
    assert spelled(notice, option) == (
        f"{model_dir} doesn't say what its UNet predicts: epsilon is assumed (--prediction-type)"
    )


@pytest.mark.parametrize(
    ("markers", "metadata", "prediction", "starts_from_noise"),
    [
        ((), {}, None, None),
        (("v_pred",), {}, "v_prediction", False),
        (("v_pred", "ztsnr"), {}, "v_prediction", True),
        ((), {"modelspec__prediction_type": "v"}, "v_prediction", None),
        ((), {"modelspec__prediction_type": "epsilon"}, "epsilon", None),
        ((), {"modelspec__sai_model_spec__prediction_type": "V"}, "v_prediction", None),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ((), {"ss_v_parameterization": "False"}, "epsilon", None),
        ((), {"modelspec__prediction_type": "something"}, None, None),
    ],
)
def test_a_single_file_says_it_in_markers_or_metadata(
    tmp_path: Path, markers: tuple[str, ...], metadata: dict[str, str], prediction: str | None, starts_from_noise: Any
) -> None:
    found, notices = read_sampling(tmp_path, file_with(tmp_path / "a.safetensors", *markers, **metadata), [])
    assert (found.prediction_type, found.zero_terminal_snr) == (prediction, starts_from_noise)
    assert bool(notices) == (prediction is None)


def test_the_file_goes_before_the_folder_of_its_configuration(model_dir: Path, tmp_path: Path) -> None:
    file = file_with(tmp_path / "a.safetensors", "v_pred")
    found, (notice,) = read_sampling(model_dir, file, [])
    assert found.prediction_type == "v_prediction"
    said = model_dir / CONFIG
    assert notice == f"the marker v_pred in {file} says v_prediction, {said} says epsilon; taken from the former"


def test_a_lora_of_another_kind_of_unet_is_told(model_dir: Path, tmp_path: Path) -> None:
    lora = file_with(tmp_path / "l.safetensors", modelspec__prediction_type="v")
    _, (notice,) = read_sampling(model_dir, None, [LoraSpec(lora)])
    assert notice == f"{lora} was trained on a UNet with v_prediction prediction, this one has epsilon"


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_another_preconditioning_is_refused(tmp_path: Path, marker: str) -> None:
    with pytest.raises(CheckpointError, match=f"has {marker}: a UNet that isn't trained on SDXL's noise levels"):
        read_sampling(tmp_path, file_with(tmp_path / "a.safetensors", marker), [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler, for a UNet that isn't trained on SDXL's noise"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler, for a UNet that isn't"),
        ({"_class_name": 3}, "_class_name is 3; expected the class of a diffusers scheduler"),
        ({"prediction_type": 3}, "prediction_type is 3; expected a word such as 'epsilon'"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'; expected true or false"),
        ({"beta_start": float("inf")}, "holds a value that is no finite number; expected a configuration"),
    ],
)
def test_a_configuration_that_cannot_be_served(model_dir: Path, changes: dict, reason: str) -> None:
    edit_config(model_dir / CONFIG, **changes)
    refuses(f"{CONFIG} … {reason}", tiny_paths(model_dir))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["_class_name", "prediction_type", "rescale_betas_zero_snr", "beta_start", "x"]),
        st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=3),
    )
)
def test_any_configuration_is_read_or_refused_in_one_line(tmp_path: Path, config: dict) -> None:
    import json

    (tmp_path / "scheduler").mkdir(exist_ok=True)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    try:
        read_sampling(tmp_path, None, [])
    except CheckpointError as error:
        assert "\n" not in str(error)


TRAILING = '{"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}'


def test_a_contradiction_is_said() -> None:
    model = ModelSampling("v_prediction", True, "a.json")
    assert told(plan(), model) == []
    assert told(plan(prediction_type="epsilon", zero_terminal_snr=False), model) == [
        "--prediction-type is epsilon, but a.json says v_prediction; drawn as typed",
        "--zero-terminal-snr is false, but a.json says true; drawn as typed",
    ]


def test_a_unet_of_lcm_with_another_sampler_is_told() -> None:
    model = ModelSampling("epsilon", embeds_guidance=True)
    assert told(plan(scheduler="lcm"), model) == []
    assert told(plan(), model) == [
        "the UNet takes the guidance as an embedding, as those of LCM do: --scheduler ddim may not suit it; "
        "--preset lcm does"
    ]


def test_where_the_model_would_draw_otherwise_is_said() -> None:
    model = ModelSampling("epsilon", None, "a.json", TRAILING)
    assert told(plan(), model) == [
        "the model's own scheduler takes trailing time steps, not leading ones: --scheduler ddim draws other pictures; "
        "to sample it as it says, --scheduler checkpoint"
    ]
    for typed in (
        {"timestep_spacing": "trailing"},
        {"scheduler": "checkpoint"},
        {"timesteps": (999, 499)},
        {"scheduler": "lcm"},
    ):
        assert told(plan(**typed), model) == []
    unsaid = ModelSampling(scheduler='{"_class_name": "EulerDiscreteScheduler", "beta_end": 0.02}')
    (notice,) = told(plan(), unsaid)
    assert "takes linspace time steps, not leading ones, has beta_end 0.02, not 0.012: " in notice
    (notice,) = told(plan(), ModelSampling(scheduler='{"_class_name": "LCMScheduler"}'))
    assert "own scheduler is LCMScheduler, for few steps: --scheduler ddim draws other pictures" in notice
