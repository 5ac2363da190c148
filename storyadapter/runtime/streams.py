"""The streams of a GPU beside the current one, and the way there.

PyTorch's streams are 32 that are handed out in turn, and what libraries keep per stream (cuBLAS: 32 MiB on a Hopper
GPU) is never given back. So a process decodes on one stream for all its stories, and CUDA graphs, which keep using the
scratch memory of the stream on which they were captured, wherever they are replayed, are captured on another one.
"""

from functools import cache

import torch


def decoding_stream(device: torch.device) -> torch.cuda.Stream:
    """For what goes on beside the UNet's work; always the same one of a GPU."""
    return _decoding_stream(torch.cuda.current_device() if device.index is None else device.index)


def capture_stream() -> torch.cuda.Stream:
    """Of the current GPU, for the warm-up and the capture of graphs; never the one of `decoding_stream`."""
    while (stream := torch.cuda.Stream()) == _decoding_stream(torch.cuda.current_device()):
        pass
    return stream


@cache
def _decoding_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; from the host without waiting for the device."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
