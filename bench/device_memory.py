"""A GPU of less memory than this one has: a second process holds the rest, where no allocator of ours can reach it."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import torch

from storyadapter.method.errors import UnavailableError


@contextlib.contextmanager
def only_device_memory(left: int, device: torch.device) -> Iterator[None]:
    """Inside, at most `left` bytes of a GPU are free. To be entered before this process takes any of it.

    Raises:
        UnavailableError: no GPU, or less is free than shall be left.
    """
    if device.type != "cuda":
        raise UnavailableError(f"--device-memory is for a CUDA GPU; the device is {device}")
    command = [sys.executable, "-P", "-m", "storyadapter.bench.device_memory", str(left), str(device.index or 0)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin and holder.stdout
        try:
            answer = holder.stdout.readline().strip()
            if not answer.startswith("holding"):
                raise UnavailableError(f"--device-memory: {answer or 'the process that holds the rest ended early'}")
            yield
        finally:
            holder.stdin.close()


def _hold(left: int, index: int) -> None:
    """Take all but `left` bytes until standard input closes."""
    free, _ = torch.cuda.mem_get_info(index)
    if free < left:
        print(f"{free / 2**30:.1f} GiB are free; expected {left / 2**30:.1f} or more")
        return
    held = []
    while (more := torch.cuda.mem_get_info(index)[0] - left) >= 1 << 21:  # the driver gives pages of 2 MiB
        held.append(torch.empty(min(more, 2**30), dtype=torch.uint8, device=f"cuda:{index}"))
    print(f"holding {len(held)} pieces", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _hold(int(sys.argv[1]), int(sys.argv[2]))
