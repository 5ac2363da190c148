"""The processes in which an engine is built."""

import psutil


def worker_processes(module: str) -> list[psutil.Process]:
    """This process's children that run `python -m <module>`; it may have others, such as a compiler's pool."""
    return [process for process in psutil.Process().children() if module in _command(process)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
