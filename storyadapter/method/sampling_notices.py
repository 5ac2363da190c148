"""What is to be told where a plan samples a model otherwise than its files say."""

from storyadapter.method.constants import CHECKPOINT_SCHEDULER, DDIM_CONFIG, SAMPLERS, TRAINED_STEPS
from storyadapter.method.errors import Field, Text
from storyadapter.method.model_sampling import ModelSampling
from storyadapter.method.noise_schedule import default_spacing
from storyadapter.method.plan import RunPlan


def sampling_notices(plan: RunPlan, model: ModelSampling) -> list[Text]:
    """Where a plan as typed contradicts what the model says of itself, and where the model's own scheduler would draw
    other pictures; one line each."""
    notices: list[Text] = []
    facts = ("prediction_type", "zero_terminal_snr")
    for name in facts:
        typed, said = getattr(plan, name), getattr(model, name)
        if typed is not None and said is not None and typed != said:
            words = str(typed).lower() if isinstance(typed, bool) else typed
            told = str(said).lower() if isinstance(said, bool) else said
            notices.append((Field(name), f" is {words}, but {model.source} says {told}; drawn as typed"))
    if model.embeds_guidance and SAMPLERS.get(plan.scheduler) not in TRAINED_STEPS:
        takes = "the UNet takes the guidance as an embedding, as those of LCM do: "
        notices.append(
            (takes, Field("scheduler"), f" {plan.scheduler} may not suit it; ", Field("preset"), " lcm does")
        )
    if plan.scheduler == CHECKPOINT_SCHEDULER or not model.scheduler:
        return notices
    own, name = model.configuration, SAMPLERS[plan.scheduler]
    class_name = str(own.get("_class_name"))
    differences = []
    if class_name in TRAINED_STEPS and name != class_name:
        differences.append(f"is {class_name}, for few steps")
    elif name not in TRAINED_STEPS and not plan.timesteps and class_name not in TRAINED_STEPS:
        spacing = own.get("timestep_spacing", default_spacing(class_name))
        from_noise = model.zero_terminal_snr if plan.zero_terminal_snr is None else plan.zero_terminal_snr
        taken = plan.timestep_spacing or ("trailing" if from_noise else "leading")
        if spacing != taken and not plan.zero_terminal_snr:  # where that was typed, the model says little of itself
            differences.append(f"takes {spacing} time steps, not {taken} ones")
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        if own.get(key, DDIM_CONFIG[key]) != DDIM_CONFIG[key]:
            differences.append(f"has {key} {own[key]}, not {DDIM_CONFIG[key]}")
    if differences:
        what = (
            f"the model's own scheduler {', '.join(differences)}: ",
            Field("scheduler"),
            f" {plan.scheduler} draws ",
        )
        notices.append((what, "other pictures; to sample it as it says, ", Field("scheduler"), " checkpoint"))
    return notices
