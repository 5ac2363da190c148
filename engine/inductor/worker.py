"""Some of a model's networks, compiled in a process of its own: `python -m storyadapter.engine.inductor.worker`.

A process, so that groups of networks are compiled at once, Ctrl-C ends a build at once wherever it is, and a crash or a
lack of memory is one line in the program that asked. Reads one pickled `BuildRequest` from standard input; writes JSON
lines to standard output: `{"network": …, "stage": …}` while it works, then `{"built": …}`, or `{"raised": …}` with a
pickled exception. Ends when standard input closes, with the compilers that it started: no build outlives its program.
It leads a process group of its own.
"""

import base64
import json
import os
import pickle
import signal
import sys
import threading
from typing import TextIO

from storyadapter.engine.inductor.compilation import BuildRequest, build_networks
from storyadapter.method.errors import StoryAdapterError


def main() -> None:
    """Serve one request."""
    # compilers print; what they print shall not be taken for messages
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        request: BuildRequest = pickle.load(sys.stdin.buffer)  # opens the checkpoint
        threading.Thread(target=_end_with_input, daemon=True).start()
        built = build_networks(request, lambda network, stage: _tell(messages, network=network, stage=stage))
    except (StoryAdapterError, OSError) as error:
        _tell(messages, raised=base64.b64encode(pickle.dumps(error)).decode())
    else:
        _tell(messages, built=built)


def _tell(messages: TextIO, **message: object) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


def _end_with_input() -> None:
    # not through sys.stdin: a thread that reads there as the interpreter ends makes it abort
    while os.read(0, 4096):
        pass  # nothing follows the request; the end comes when the other end is closed, by whatever
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
