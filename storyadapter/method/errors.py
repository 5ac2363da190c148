"""Errors a user can act on: one line each, with the exit code of the command line.

The text says what was found, what was expected and what to type.
"""


class StoryAdapterError(Exception):
    """Base of every error that is told to the user in one line, without a traceback."""

    exit_code = 1


class InputError(StoryAdapterError):
    """The request can't be served as typed; nothing was written."""

    exit_code = 2


class CheckpointError(InputError):
    """Model files are missing, corrupt, or don't fit each other."""


class UnavailableError(InputError):
    """A backend, device or precision that can't be had on this machine."""


class EngineMismatchError(InputError):
    """The engine store holds no artefact for this request."""


class RunError(StoryAdapterError):
    """The run began and had to stop: no space left, a frame that came out non-finite, an engine that failed."""


class EngineBuildError(StoryAdapterError):
    """A builder refused a network, ended early, or made something that computes something else."""
