"""What an error says to a person, on one line."""

__all__ = ["describe_error", "one_line"]


def describe_error(error: BaseException) -> str:
    """Type and text."""
    return f"{type(error).__name__}: {_text(error)}"


def one_line(error: BaseException) -> str:
    """Type and first line of an error, which a runtime may follow up with many."""
    lines = _text(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _text(error: BaseException) -> str:
    """A KeyError's own text would be quoted."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
