"""Weights from a `.safetensors` file straight to a GPU."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import torch
from torch import Tensor

from storyadapter.method.errors import CheckpointError

_CHUNK: Final = 32 << 20  # bytes
_THREADS: Final = 4
_AHEAD: Final = 16  # tensors
_DTYPES: Final = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}


def read_to_gpu(path: Path, wanted: Callable[[str], bool], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of a file whose header was found to be whole, on a GPU, each in memory of its own.

    Several threads read chunks of the file into pinned memory, from which they are copied to the GPU beside that. A
    copy from a mapped file is done on one core, page by page, and the GPU waits for it. Few are read ahead of what the
    caller has taken, so that it can convert them one by one.

    Raises:
        CheckpointError: the file is shorter than its header says, or a tensor is of a type that PyTorch hasn't.
        OSError: it can't be read.
    """
    buffers: SimpleQueue[tuple[Tensor, torch.cuda.Event]] = SimpleQueue()
    for _ in range(_THREADS):
        buffers.put((torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))
    stream = torch.cuda.current_stream(device)

    def copy(file: int, target: Tensor, offset: int) -> None:
        buffer, passed = buffers.get()
        try:
            passed.synchronize()
            part, done = buffer.numpy().data[: len(target)], 0
            while done < len(target):
                count = os.preadv(file, [part[done:]], offset + done)
                if not count:
                    raise CheckpointError(f"{path} became shorter while it was read; fetch it again")
                done += count
            with torch.cuda.stream(stream):
                target.copy_(buffer[: len(target)], non_blocking=True)
                passed.record()
        finally:
            buffers.put((buffer, passed))

    coming: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_THREADS, "weights") as pool:

        def arrived() -> tuple[str, Tensor]:
            name, tensor, copies = coming.popleft()
            for copied in copies:
                copied.result()
            return name, tensor

        size = int.from_bytes(file.read(8), "little")
        for name, entry in json.loads(file.read(size)).items():
            if name == "__metadata__" or not wanted(name):
                continue
            if (dtype := _DTYPES.get(entry["dtype"])) is None:
                raise CheckpointError(f"{path}: {name} is of type {entry['dtype']}", expected="fp32, fp16 or bf16")
            start, end = entry["data_offsets"]
            target = torch.empty(end - start, dtype=torch.uint8, device=device)
            copies = [
                pool.submit(copy, file.fileno(), target[at : at + _CHUNK], 8 + size + start + at)
                for at in range(0, end - start, _CHUNK)
            ]
            coming.append((name, target.view(dtype).view(entry["shape"]), copies))
            if len(coming) > _AHEAD:
                yield arrived()
        while coming:
            yield arrived()
