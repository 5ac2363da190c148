import pytest

from storyadapter.cli.options import typed
from storyadapter.method.errors import InputError
from storyadapter.method.plan import RunPlan
from storyadapter.method.presets import PRESETS, check_preset, with_preset
from storyadapter.method.sampler import sampler_of


def plan(preset: str, **given: object) -> RunPlan:
    return RunPlan(height=64, width=64, seed=0, **with_preset(preset, given))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_sampled(name: str) -> None:
    expanded = plan(name)
    assert sampler_of(expanded.sampler_in(0)).calls == expanded.steps < 10
    assert {field: getattr(expanded, field) for field in PRESETS[name].settings} == PRESETS[name].settings


def test_no_preset_is_what_was_typed() -> None:
    assert with_preset(None, {"steps": 3}) == {"steps": 3}


@pytest.mark.parametrize(
    ("name", "given", "timestep"),
    [
        ("lcm", {}, [999, 759, 499, 259]),
        ("lcm-lora", {}, [999, 879, 759, 639, 499, 379, 259, 139]),
        ("lightning", {}, [999, 749, 499, 249]),
        ("lightning", {"steps": 2}, [999, 499]),
        ("lightning", {"timesteps": (999, 1)}, [999, 1]),
        ("lightning", {"scheduler": "lcm"}, [999, 759, 499, 259]),
        ("lightning", {"timestep_spacing": "leading"}, [751, 501, 251, 1]),
        ("dmd2", {}, [999, 749, 499, 249]),
        ("dmd2", {"steps": 2}, [999, 499]),
        ("tcd", {"scheduler": "lcm"}, [999, 759, 499, 259]),
    ],
)
def test_what_is_typed_beside_it_wins(name: str, given: dict, timestep: list[int]) -> None:
    assert sampler_of(plan(name, **given).sampler_in(0)).timestep.tolist() == timestep


def test_guidance_that_is_typed_decides_whether_an_interval_has_a_meaning() -> None:
    assert plan("balanced", scales=()).unet_rows(1) == 10
    assert plan("balanced", guidance=(7.0, 0.0), scales=(0.3,)).unet_rows(1) == 10 + 6
    assert plan("balanced", scales=(), guidance=0.0).unet_rows(1) == 6
    assert plan("balanced", scales=(0.3,), guidance=[1.0, 0.5]).unet_rows(1) == 12


def test_a_preset_that_cannot_fit_the_unet_says_so() -> None:
    for name, preset in PRESETS.items():
        check_preset(name, preset.embeds_guidance)
    check_preset(None, True)
    with pytest.raises(InputError) as caught:
        check_preset("lcm", False)
    assert typed(caught.value) == (
        "--preset lcm is for a UNet that takes the guidance as an embedding (time_cond_proj_dim), this one doesn't; "
        "give such a one with --unet, or take --preset lcm-lora with the LCM LoRA"
    )
    with pytest.raises(InputError) as caught:
        check_preset("tcd", True)
    assert typed(caught.value) == (
        "--preset tcd is for a UNet without it, but this one takes the guidance as an embedding; expected --preset lcm"
    )
