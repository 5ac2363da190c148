"""A process that has this folder in PYTHONPATH, and every process that it starts, finds no ONNX packages."""

from importlib.machinery import PathFinder

HIDDEN = ("onnx", "onnxruntime", "onnxscript")
_find = PathFinder.find_spec


def _find_others(name, path=None, target=None):
    return None if name in HIDDEN else _find(name, path, target)


PathFinder.find_spec = _find_others
