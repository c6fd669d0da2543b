"""
Warnings of torch and Detectron2 about each other's deprecated functions, which a user can do nothing about.

Every entry is one message of one library. What concerns the user's data, config or code is shown.
"""

import contextlib
import logging
import sys
import warnings
from typing import Iterator

__all__ = ["hush_libraries", "quiet_imports"]

# Regular expressions that match the beginning of a warning.
_WARNINGS = (
    r"`torch\.jit\.script(_method)?` is deprecated",  # Detectron2 compiles its box functions with it
    r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated",  # Detectron2's AMPTrainer
    r"`broadcast_buffers` is deprecated",  # what Detectron2's trainer gives to torch
    r"torch\.meshgrid: in an upcoming release",  # Detectron2's anchor generator
    r"pkg_resources is deprecated as an API",  # Detectron2's model zoo
    r"Deprecated call to `pkg_resources\.declare_namespace",
)

# By logger: beginnings of messages that torch logs.
_RECORDS = {
    "torch.fx._symbolic_trace": "is_fx_tracing will return true",  # Detectron2's poolers ask it
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # Detectron2's list of the environment asks for it
}


def hush_libraries() -> None:
    """Hides these messages in this process. Warnings are left alone where the user chose: ``-W``, PYTHONWARNINGS."""
    for name in _RECORDS:
        logging.getLogger(name).addFilter(_is_no_noise)
    _hush_warnings()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides the warnings in the block alone. Filters that a library adds when it is imported stay."""
    before = list(warnings.filters)
    _hush_warnings()
    added = [each for each in warnings.filters if each not in before]
    try:
        yield
    finally:
        warnings.filters[:] = [each for each in warnings.filters if each not in added]


def _hush_warnings() -> None:
    if not sys.warnoptions:
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_RECORDS[record.name])
