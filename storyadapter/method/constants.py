"""The constants of the published method, each in this one place. Imports nothing heavy.

Source: Story-Adapter (arXiv 2410.06244), its public implementation, and IP-Adapter for SDXL (arXiv 2308.06721).
"""

from types import MappingProxyType
from typing import Final

TEXT_TOKENS: Final = 77  # T of a prompt that is read in one chunk
CHUNK_TOKENS: Final = 75  # of a prompt in each chunk, between a start and an end token
MAX_PROMPT_CHUNKS: Final = 16
TOKENS_PER_IMAGE: Final = 4  # of the IP-Adapter's image projection; R = 4·N
REFERENCE_PIXELS: Final = 256  # every reference picture is resized to this square before CLIP sees it
CLIP_PIXELS: Final = 224
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)  # of its training pictures, by channel
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
LATENT_CHANNELS: Final = 4
PIXEL_MULTIPLE: Final = 32  # latents must be multiples of 4 for the UNet's two down-samplings

ITERATIONS: Final = 10  # after the text-only one
FIRST_SCALE: Final = 0.3  # λ of iteration 1
LAST_SCALE: Final = 0.5  # λ of the last iteration
MAX_SCALE: Final = 2.0

STEPS: Final = 50
GUIDANCE: Final = 5.0  # what reaches the published sampler; the 7.5 of its signature is never passed on
SCHEDULER: Final = "ddim"
NEGATIVE_PROMPT: Final = "monochrome, lowres, bad anatomy, worst quality, low quality"

# name of each sampler -> the diffusers scheduler whose update it is
SAMPLERS: Final = MappingProxyType(
    {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler_a": "EulerAncestralDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        "lcm": "LCMScheduler",
        "tcd": "TCDScheduler",
    }
)
CHECKPOINT_SCHEDULER: Final = "checkpoint"  # the name of that which the model comes with
TRAINED_STEPS: Final = ("LCMScheduler", "TCDScheduler")  # these choose among the steps of their distillation
ETA: Final = 0.3  # share of fresh noise in the steps of `tcd`, as its authors document it
# The most steps of each over the noise schedule below, which has 1000 time steps: with its offset of 1, ddim finds 999,
# and dpmpp_2m more than 998 with one noise level twice; lcm and tcd choose among 50.
MAX_STEPS: Final = MappingProxyType(
    {"ddim": 999, "euler": 1000, "euler_a": 1000, "dpmpp_2m": 998, "lcm": 50, "tcd": 50, CHECKPOINT_SCHEDULER: 1000}
)
PREDICTION_TYPES: Final = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS: Final = ("leading", "linspace", "trailing")

TRAIN_STEPS: Final = 1000  # time steps of the noise schedule
# The published sampler's settings, used instead of the checkpoint's own scheduler.
DDIM_CONFIG: Final = MappingProxyType(
    {
        "num_train_timesteps": TRAIN_STEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
    }
)

# style -> (text before the prompt, text after the prompt)
STYLES: Final = MappingProxyType(
    {
        "comic": (
            "best quality, high quality, comic ",
            " . graphic illustration, comic art, graphic novel art, vibrant, highly detailed",
        ),
        "film": (
            "best quality, high quality, cinematic film still, ",
            " . shallow depth of field, vignette, highly detailed, high budget, bokeh, cinemascope, moody, epic, "
            "gorgeous, film grain, grainy",
        ),
        "realistic": ("best quality, high quality, ", ""),
        "none": ("", ""),
    }
)


def reference_scales(iterations: int = ITERATIONS) -> tuple[float, ...]:
    """λ of each iteration after the text-only one: `linspace(0.3, 0.5, iterations)`, as published.

    A single iteration gets 0.3, as `linspace(0.3, 0.5, 1)` gives.
    """
    if iterations < 2:
        return (FIRST_SCALE,) * iterations
    step = (LAST_SCALE - FIRST_SCALE) / (iterations - 1)
    return tuple(round(FIRST_SCALE + step * i, 10) for i in range(iterations))
