"""
Checkpoints as flat dicts of tensors, read without executing code.

:mod:`qmimic_d2.checkpoint.files` reads the file. Here stand the address that it comes from, the errors that name it,
and the layouts of state dicts.
"""

import os
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Dict, Mapping, Sequence

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from qmimic_d2.checkpoint.files import read_content
from qmimic_d2.checkpoint.plain_pickle import Refused, RefusedName

__all__ = ["UnsafeCheckpointError", "read_checkpoint"]

_MAX_LISTED = 20


class UnsafeCheckpointError(ValueError):
    """A checkpoint that holds more than tensors, number arrays and plain containers; nothing was executed."""


def read_checkpoint(path: str, key: str = "") -> Dict[str, Tensor]:
    """
    Read a model's weights without executing code.

    A file of ``torch.save`` may have any name; a plain pickle of NumPy arrays (Detectron2's model zoo) ends in
    ``.pkl``. Memory is bounded by the file's size; see :func:`qmimic_d2.checkpoint.files.read_content`.

    Args:
        path: a local file, or an address that Detectron2's ``PathManager`` resolves (``detectron2://``,
            ``https://``).
        key: the config key that ``path`` came from, for error messages.

    Returns:
        name -> tensor on the CPU: the file's ``"model"`` or ``"state_dict"`` entry if it has one, else the
        whole file; without the prefix ``"module."`` if all names share it. Module versions (``_metadata``)
        are kept.

    Raises:
        FileNotFoundError: no such file, or the address could not be fetched.
        UnsafeCheckpointError: the file holds more than weights.
        ValueError: ``path`` is empty, the file is unreadable or cut short, or holds no flat dict of tensors.
    """
    content = read_mapping(local_path(path, key), path, key)
    for name in ("model", "state_dict"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    return flat_state(content, path, key)


def subject(key: str, path: str) -> str:
    """How error messages name a checkpoint: by the config key it came from, if any, and its path."""
    return f"{key}: checkpoint {path!r}" if key else f"checkpoint {path!r}"


def local_path(path: str, key: str) -> str:
    """The file that ``path`` stands for, fetched if it is an address; a missing one is an error."""
    if not path:
        raise ValueError(
            f"{key or 'the path of a checkpoint'} is empty, and the model would keep its random weights. "
            "Give a .pth or .pkl file, or an address such as detectron2://..."
        )
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:  # each path handler raises what its protocol raises
        raise FileNotFoundError(
            f"{subject(key, path)} could not be fetched ({type(error).__name__}: {error}). Correct the "
            "address, or download the file and give its local path."
        ) from error
    if not os.path.isfile(local):
        found = "is a folder" if os.path.isdir(local) else "does not exist"
        raise FileNotFoundError(
            f"{subject(key, path)} {found}; looked for {os.path.abspath(local)!r}. Give the path of the "
            "file, absolute or from the working directory."
        )
    return local


def read_mapping(local: str, path: str, key: str) -> Mapping[str, Any]:
    """The dict in the file ``local``, as saved; ``path`` and ``key`` are for error messages."""
    try:
        content = read_content(local)
    except RefusedName as error:
        raise UnsafeCheckpointError(
            f"{subject(key, path)} holds {error}, which is no tensor, array of numbers or plain container: it was not "
            "read, since that could run code. Save model.state_dict() alone."
        ) from error
    except Exception as error:  # damaged bytes can make a reader raise anything
        reason = f"it has {error}" if isinstance(error, Refused) else type(error).__name__
        raise ValueError(
            f"{subject(key, path)} is unreadable or cut short ({os.path.getsize(local)} bytes in {local!r}; {reason}). "
            "Get a complete copy, or give another checkpoint."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{subject(key, path)} holds a {type(content).__name__}, where a state dict is needed. Save it "
            "as torch.save({'model': model.state_dict()}, path)."
        )
    return content


def flat_state(entries: Any, path: str, key: str) -> Dict[str, Tensor]:
    """Arrays become tensors, and a common prefix "module." goes; an entry of another kind is an error."""
    state: Dict[str, Tensor] = OrderedDict()
    others = []
    if not isinstance(entries, Mapping):
        others.append(f"the whole entry: {type(entries).__name__}")
        entries = {}
    for name, value in entries.items():
        if isinstance(value, (np.ndarray, np.generic)):
            with suppress(TypeError):  # torch has not every dtype of numpy; listed below
                value = torch.from_numpy(np.asarray(value, dtype=value.dtype.newbyteorder("=")))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            others.append(f"{name}: {type(value).__name__}")
            continue
        state[name] = value.detach()
    if others or not state:
        raise ValueError(
            f"{subject(key, path)} is no flat dict of names and tensors, nor one under 'model' or "
            f"'state_dict'{':' + listing(others) if others else ': it is empty.'}\n"
            "Save it as torch.save({'model': model.state_dict()}, path)."
        )
    if isinstance(getattr(entries, "_metadata", None), Mapping):
        state._metadata = entries._metadata
    return entries_below(state, "module." if all(name.startswith("module.") for name in state) else "")


def entries_below(state: Mapping[str, Tensor], prefix: str) -> Dict[str, Tensor]:
    """The entries below ``prefix``, without it, in a new dict, with the module versions that belong there."""
    cut = len(prefix)
    entries: Dict[str, Tensor] = OrderedDict((n[cut:], t) for n, t in state.items() if n.startswith(prefix))
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        entries._metadata = OrderedDict(
            ((module + ".")[cut:-1], versions)
            for module, versions in metadata.items()
            if (module + ".").startswith(prefix)
        )
    return entries


def listing(items: Sequence[str]) -> str:
    """One indented line per item, the first 20 of them, for error messages."""
    shown = "".join(f"\n    {_printable(item)}" for item in items[:_MAX_LISTED])
    return shown + (f"\n    and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else "")


def _printable(text: str) -> str:
    """Names come from files; one with a line break or a terminal's escape is shown escaped."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
