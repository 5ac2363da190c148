"""Where the program keeps what it can make again."""

from pathlib import Path

from platformdirs import user_cache_path


def user_cache() -> Path:
    """The user's cache folder of this program, `~/.cache/storyadapter-trt` or below `$XDG_CACHE_HOME`; not created."""
    return user_cache_path("storyadapter-trt", appauthor=False)
