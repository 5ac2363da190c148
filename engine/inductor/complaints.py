"""What a compiler complained of, in one line."""

_LONGEST = 400


def first_complaint(message: str) -> str:
    """Of an exception's message: its first line, and the first error that the rest tells of."""
    lines = _lines(message)
    told = next((line for line in lines[1:] if _is_error(line)), "")
    return (f"{lines[0]}: {told}" if told else lines[0])[:_LONGEST]


def last_complaint(output: str) -> str:
    """Of a process that ended early, by what it printed: the last error, or else the last line."""
    lines = _lines(output)
    return next((line for line in reversed(lines) if _is_error(line)), lines[-1])[:_LONGEST]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]


def _is_error(line: str) -> bool:
    # "Fatal Python error: Aborted" says that it ended, not why
    return "error:" in line.lower() and not line.startswith("Fatal Python error")
