"""What the command line prints: names that no terminal acts on, in whatever its encoding can show."""

import contextlib
import os
import shlex
import sys
import unicodedata
from typing import Optional, Sequence, TextIO

__all__ = ["command_text", "printable", "say"]


def printable(name: object) -> str:
    """
    A name on one line. Everything that a terminal might act on is written as an escape: control characters, characters
    that turn the direction of writing, and the surrogates by which Python keeps bytes that are no UTF-8.
    """
    return "".join(map(_shown, str(name)))


def say(text: str, file: Optional[TextIO] = None) -> None:
    """
    Prints lines and flushes. A character that the stream cannot show is written as its escape. A stream that is closed
    or full, such as a pipe into ``head``, stops no work.

    Args:
        text: line ends and tabs in it are kept; names in it come from :func:`printable`.
        file: ``sys.stdout`` when left out.
    """
    stream = sys.stdout if file is None else file
    shown = "".join(each if each in "\n\t" else _shown(each) for each in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # no space left on the device; a stream that was closed
        try:
            print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
        except BrokenPipeError:  # lead the pipe nowhere, or Python fails when it flushes at the end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def command_text(command: Sequence[str]) -> str:
    """A command as a person would type it in the working directory."""
    below = os.path.join(os.getcwd(), "")
    return shlex.join("python" if each == sys.executable else each.replace(below, "") for each in command)


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # a space of any width
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
