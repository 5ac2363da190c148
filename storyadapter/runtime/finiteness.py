"""Which network's output was not finite first, once a frame came out so, and the error that says it."""

import torch

from storyadapter.method.errors import RunError, Text
from storyadapter.model.contract import DECODERS, control_embedding_name, control_projection_name
from storyadapter.model.networks import Networks
from storyadapter.model.numerics import finer_precision
from storyadapter.runtime.conditioning import Tokenizers, encode_texts, project_texts
from storyadapter.runtime.control import embed_control
from storyadapter.runtime.jobs import Task
from storyadapter.runtime.reference_bank import project

_TITLES = {
    "text_encoder": "text encoder 1",
    "text_encoder_2": "text encoder 2",
    "text_projection": "the UNet's text projection",
    "image_encoder": "the image encoder",
    "reference_projection": "the IP-Adapter",
    "denoiser": "the UNet",
    "vae_decoder": "the VAE",
    "reference_decoder": "the reference VAE",
}
_ENCODERS = {"text_encoder": ("text_embedding",), "text_encoder_2": ("text_embedding_2", "pooled_text")}


def first_not_finite(networks: Networks, tokenizers: Tokenizers, task: Task, network: str) -> str:
    """The first network, in the order of the computation, that gave this frame values that aren't finite.

    What comes before the UNet is computed again.

    Args:
        network: in whose output they were seen.
    """
    if network != "denoiser":
        return network
    try:
        with torch.inference_mode():
            for group, index in task.texts:
                inputs = encode_texts(networks, tokenizers, group)
                for name, outputs in _ENCODERS.items():
                    if not all(inputs[output][index].isfinite().all() for output in outputs):
                        return name
                row = project_texts(networks, inputs)[index]
                if not all(value.isfinite().all() for value in (*row.kv.values(), row.added_embedding)):
                    return "text_projection"
                for number, of_control in enumerate(row.controls):
                    if not all(v.isfinite().all() for v in (*of_control.kv.values(), of_control.added_embedding)):
                        return control_projection_name(number)
            for number, picture in enumerate(task.control):
                if picture is not None and not embed_control(networks, number, picture).isfinite().all():
                    return control_embedding_name(number)
            if task.references is not None and task.job.scale is not None:
                if not task.references.embeddings.isfinite().all():
                    return "image_encoder"
                bank = project(networks, task.references.embeddings, task.job.scale)
                if not all(value.isfinite().all() for value in bank.kv.values()):
                    return "reference_projection"
    except torch.OutOfMemoryError:
        pass  # then it stays with what was seen
    return network


def not_finite_error(networks: Networks, task: Task, network: str) -> RunError:
    """The error of a frame for which this network gave values that aren't finite; of a VAE, in fp32 as well."""
    precision = networks.numerics[network]
    tried = f" in {precision}"
    if network in DECODERS and networks.load_fp32 and precision != "fp32":
        precision, tried = "fp32", f"{tried}, nor in fp32"
    found: Text
    advice: Text
    title = _TITLES.get(network, "the ControlNet")
    if network == "denoiser" and task.job.control:  # in one step; which of them was first can't be told afterwards
        title += ", or the ControlNet,"
    where = f"iteration {task.iteration}, frame {task.frame}: {title} gave values that are not finite"
    if networks.explain_not_finite:
        found, advice = networks.explain_not_finite(network, precision)
    else:
        found, advice = "", finer_precision(network, precision)
    return RunError(where, tried, found, advice=advice)
