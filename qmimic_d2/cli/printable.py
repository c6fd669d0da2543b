"""What the command line prints: names that no terminal acts on, in whatever its encoding can show."""

import os
import sys
import unicodedata
from typing import Optional, TextIO

__all__ = ["printable", "say"]


def printable(name: object) -> str:
    """
    A name on one line, in which everything that a terminal might act on is written as an escape.

    These are control characters (ESC, line ends), characters that turn the direction of writing, and the
    surrogates by which Python keeps bytes that are no UTF-8.
    """
    return "".join(_shown(each) for each in str(name))


def say(text: str, file: Optional[TextIO] = None) -> None:
    """
    Prints lines and flushes. A stream that cannot show a character shows its escape; one that is closed or
    full, such as a pipe into ``head``, stops no work.

    Args:
        text: line ends and tabs in it are kept; names in it come from :func:`printable`.
        file: ``sys.stdout`` when left out.
    """
    stream = sys.stdout if file is None else file
    shown = "".join(each if each in "\n\t" else _shown(each) for each in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        _silence(stream)
    except (OSError, ValueError):  # no space left on the device; a stream that was closed
        pass


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # a space of any width
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _silence(stream: TextIO) -> None:
    """Leads a broken pipe nowhere, so that Python does not fail when it flushes at the end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass
