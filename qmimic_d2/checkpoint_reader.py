"""
Checkpoints read without executing code.

A pickle is a program: it names callables, and the ordinary unpickler imports and calls them. torch has a
restricted unpickler for its own files (``weights_only``). Detectron2's model zoo has ``.pkl`` files of
numpy arrays, and the one for these stands here. Admitting numpy's own callables would not do:
``numpy.ndarray((1,), "O", buffer)`` takes bytes of the file for pointers to objects. So the few names that
a pickled array consists of are answered by stand-ins, which build arrays of numbers from bytes of the
right length; every other name is refused before it is imported.
"""

import os
import pickle
import re
from collections import OrderedDict
from contextlib import suppress
from typing import Any, Dict, Mapping, Sequence, Tuple, Union

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

__all__ = ["UnsafeCheckpointError", "read_checkpoint"]

_ZIP_MAGIC = b"PK\x03\x04"
_MAX_LISTED = 20
# How torch.load(weights_only=True), in its wordings since 2.1, and _WeightsUnpickler name what they refuse.
_REFUSED_GLOBAL = re.compile(r"(?:GLOBAL|Unsupported class) (\S+)")
_NUMBER_KINDS = "biufc"  # bool, signed and unsigned integer, float, complex


class _Dtype:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, spec: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(spec, str) or np.dtype(spec).kind not in _NUMBER_KINDS:
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({spec!r}) is not admitted")
        self.number = np.dtype(spec)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.number = self.number.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands in for ``numpy.ndarray`` as it is unpickled: first empty, then filled by ``__setstate__``."""

    def __setstate__(self, state: Sequence[Any]) -> None:
        _version, shape, dtype, is_fortran, raw = state
        super().__setstate__((1, shape, _number(dtype), is_fortran, _as_bytes(raw)))


def _number(dtype: _Dtype) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError(f"a {type(dtype).__name__} where a dtype is needed")
    return dtype.number


def _as_bytes(raw: Union[bytes, str]) -> bytes:
    # Python 2 wrote bytes as its str, which encoding="latin1" turns into text of the same code points.
    return raw.encode("latin1") if isinstance(raw, str) else bytes(raw)


def _reconstruct(_subtype: type, _shape: Tuple[int, ...], _typecode: bytes) -> _Array:
    return _Array((0,), dtype=np.int8)


def _frombuffer(
    raw: Union[bytes, bytearray], dtype: _Dtype, shape: Tuple[int, ...], order: str
) -> np.ndarray:
    return np.frombuffer(raw, dtype=_number(dtype)).reshape(shape, order=order)


def _scalar(dtype: _Dtype, raw: Union[bytes, str]) -> np.generic:
    return np.frombuffer(_as_bytes(raw), dtype=_number(dtype))[0]


def _encode(text: str, encoding: str) -> bytes:
    """The one use that pickle makes of ``_codecs.encode``: bytes that are not empty, in protocols below 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"GLOBAL _codecs.encode to {encoding!r} is not admitted")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """The one use that pickle makes of ``bytes``, in protocols below 3."""
    return b""


_ADMITTED: Dict[Tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    # Only ever an argument of _reconstruct, so it need not be callable.
    ("numpy", "ndarray"): "numpy.ndarray",
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
    _ADMITTED[_core + ".multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[_core + ".multiarray", "scalar"] = _scalar
    _ADMITTED[_core + ".numeric", "_frombuffer"] = _frombuffer
for _builtins in ("builtins", "__builtin__"):  # Python 3 and Python 2
    _ADMITTED[_builtins, "bytes"] = _empty_bytes
    _ADMITTED[_builtins, "set"] = set
    _ADMITTED[_builtins, "frozenset"] = frozenset


class _WeightsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not admitted") from None


class UnsafeCheckpointError(ValueError):
    """A checkpoint that holds more than tensors, number arrays and plain containers; nothing was executed."""


def read_checkpoint(path: str, key: str = "") -> Dict[str, Tensor]:
    """
    Read a model's weights without executing code.

    ``.pkl`` files (Detectron2's model zoo) go through an unpickler that admits numpy arrays of numbers and
    plain containers only; every other file, and a ``.pkl`` that is a torch archive, through
    ``torch.load(weights_only=True)``.

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
        with open(local, "rb") as file:
            is_pickle = local.endswith(".pkl") and file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC
            file.seek(0)
            if is_pickle:
                content = _WeightsUnpickler(file, encoding="latin1").load()
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make an unpickler raise anything
        refused = _REFUSED_GLOBAL.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise UnsafeCheckpointError(
                f"{subject(key, path)} holds {refused.group(1)}, which is no tensor, array of numbers or "
                "plain container: it was not read, since that could run code. Save model.state_dict() alone."
            ) from error
        raise ValueError(
            f"{subject(key, path)} is unreadable or cut short ({os.path.getsize(local)} bytes in {local!r}; "
            f"{type(error).__name__}). Get a complete copy, or give another checkpoint."
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
    for name, value in entries.items():
        if isinstance(value, (np.ndarray, np.generic)):
            # A copy in native byte order: torch takes no other, and arrays from a pickle may be read-only.
            array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            with suppress(TypeError):  # torch has not every dtype of numpy; listed below
                value = torch.from_numpy(array)
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
    shown = "".join(f"\n    {item}" for item in items[:_MAX_LISTED])
    return shown + (f"\n    and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else "")
