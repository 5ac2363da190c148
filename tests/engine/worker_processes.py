"""The processes in which an engine is built."""

import psutil


def worker_processes() -> list[psutil.Process]:
    """This process's children that work for it; it may have others, such as a compiler's pool."""
    return [process for process in psutil.Process().children() if "storyadapter.engine.processes" in _command(process)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
