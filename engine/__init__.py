"""The backends, the engine store, and the one function that wires a backend to the method.

`open_networks` and `build_engine` are loaded on first use, so that one backend's session can be imported alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storyadapter.engine.opening import build_engine, open_networks

__all__ = ["build_engine", "open_networks"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("storyadapter.engine.opening"), name)
    raise AttributeError(f"module 'storyadapter.engine' has no attribute {name!r}")
