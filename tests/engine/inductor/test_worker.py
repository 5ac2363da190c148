"""The process that compiles."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import torch

from storyadapter import Checkpoint
from storyadapter.engine.inductor.compilation import BuildRequest
from storyadapter.model.contract import Range
from storyadapter.model.numerics import Numerics


def test_a_process_that_has_done_its_work_ends_in_order(checkpoint: Checkpoint, tmp_path: Path) -> None:
    letters = {"F": Range(1, 2)}
    request = BuildRequest(checkpoint, (), Numerics("fp32"), letters, torch.device("cpu"), tmp_path)
    command = [sys.executable, "-m", "storyadapter.engine.inductor.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as worker:
        assert worker.stdin and worker.stdout
        worker.stdin.write(pickle.dumps(request))
        worker.stdin.flush()  # and not closed: then it would be ended, as the program that asked were gone
        messages = [json.loads(line) for line in worker.stdout]
        assert worker.wait() == 0 and messages[-1] == {"built": {}}
