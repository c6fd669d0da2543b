"""
What stands for the names of NumPy, torch and plain Python in a pickle, see :mod:`qmimic_d2.checkpoint.plain_pickle`.

NumPy's and torch's own callables would not do: ``numpy.ndarray((1,), "O", buffer)`` takes bytes of the file for
pointers to objects, and ``torch.FloatTensor(10**10)`` allocates what no byte of the file stands for.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any, Dict, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from qmimic_d2.checkpoint.plain_pickle import Name, Refused, RefusedName, StandIn, plain_key

__all__ = ["Budget", "Storage", "StorageKind", "names_for"]

_DTYPE = re.compile(r"[<>=|]?[biufc]\d{1,2}")  # bool, signed and unsigned integer, float, complex

# Storage classes of torch's files. The tensor on an untyped one names its dtype.
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": None,
}


class Budget:
    """
    Bytes that the values of a file may take.

    Args:
        limit: in bytes, from the file's size.
    """

    def __init__(self, limit: int) -> None:
        self._left = self._limit = limit

    def take(self, count: int) -> None:
        """
        Raises:
            Refused: the values ask for more than the file can give.
        """
        self._left -= count
        if count < 0 or self._left < 0:
            raise Refused(f"values of more than {self._limit} bytes, which the file's size cannot give")


@dataclass(frozen=True)
class StorageKind:
    """A storage class of torch; ``dtype`` is None for bytes whose dtype the tensor names."""

    dtype: Optional[torch.dtype]

    @property
    def item_size(self) -> int:
        return torch.empty(0, dtype=self.dtype or torch.uint8).element_size()


@dataclass(frozen=True)
class Storage:
    """The bytes that tensors are views of."""

    kind: StorageKind
    content: Tensor


class _Dtype(StandIn):
    """Stands for a ``numpy.dtype`` of numbers."""

    def __init__(self, spec: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(spec, str) or not _DTYPE.fullmatch(spec):
            raise RefusedName(f"numpy.dtype({spec!r})")
        self.number = np.dtype(spec)

    def set_state(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise Refused("an unknown byte order")
        self.number = self.number.newbyteorder(state[1])


class _Array(np.ndarray, StandIn):
    """An array that is empty until its state sets it, once, to a copy of the file's bytes."""

    needs_state = True
    budget: Budget

    def set_state(self, state: Any) -> None:
        if not self.needs_state:
            raise Refused("a second state for an array")
        _version, shape, dtype, is_fortran, raw = state
        raw = _as_bytes(raw, self.budget)
        if not isinstance(dtype, _Dtype):
            raise Refused(f"a {type(dtype).__name__} where a dtype is needed")
        if prod(_sizes(shape)) * dtype.number.itemsize != len(raw):
            raise Refused(f"an array of shape {shape} and {dtype.number} from {len(raw)} bytes")
        # NumPy uses the memory of the bytes that it is given, so two arrays must not be given the same ones.
        self.__setstate__((1, shape, dtype.number, bool(is_fortran), bytes(bytearray(raw))))
        self.needs_state = False


def names_for(file_size: int, *, with_tensors: bool) -> Dict[str, Any]:
    """
    What stands for each name in one file.

    Args:
        file_size: in bytes. All arrays, encoded bytes and tensors together may take four times as many, since tensors
            share storages, and a MiB more.
        with_tensors: torch's own names as well.

    Returns:
        module and name -> a :class:`Name`, or a value.
    """
    budget = Budget(4 * file_size + 2**20)
    answers = _plain_answers(budget)
    answers.update(_numpy_answers(budget))
    if not with_tensors:
        return {text: Name(text, answer) for text, answer in answers.items()}
    answers.update(_torch_answers(budget))
    names: Dict[str, Any] = {text: Name(text, answer) for text, answer in answers.items()}
    names.update({f"torch.{name}": each for name, each in vars(torch).items() if isinstance(each, torch.dtype)})
    for kind, dtype in _STORAGE_DTYPES.items():
        names[f"torch.{kind}"] = names[f"torch.storage.{kind}"] = StorageKind(dtype)
    return names


def _plain_answers(budget: Budget) -> Dict[str, Any]:
    def as_bytes(content: Any = b"", encoding: str = "latin1") -> bytes:
        """The uses that pickle makes of ``bytes``, ``bytearray`` and ``_codecs.encode``: text is latin-1."""
        if encoding not in ("latin1", "latin-1"):
            raise RefusedName(f"_codecs.encode to {encoding!r}")
        return _as_bytes(content, budget)

    def ordered(pairs: Any = ()) -> OrderedDict:
        """Python 3 calls it with nothing and sets the items; Python 2 gave them as pairs."""
        if not isinstance(pairs, (list, tuple)) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in pairs):
            raise Refused("an OrderedDict of no pairs")
        budget.take(len(pairs))
        return OrderedDict((plain_key(name), value) for name, value in pairs)

    def items(found: Any) -> Iterator[Any]:
        """The items of a set; text and numbers are none."""
        if not isinstance(found, (list, tuple, set, frozenset)):
            raise Refused("a set of what has no items")
        budget.take(len(found))
        return map(plain_key, found)

    answers: Dict[str, Any] = {"collections.OrderedDict": ordered, "_codecs.encode": as_bytes}
    for module in ("builtins", "__builtin__"):  # Python 3 and Python 2
        answers[f"{module}.bytes"] = answers[f"{module}.bytearray"] = as_bytes
        answers[f"{module}.set"] = lambda found=(): set(items(found))
        answers[f"{module}.frozenset"] = lambda found=(): frozenset(items(found))
        answers[f"{module}.complex"] = complex
    return answers


def _numpy_answers(budget: Budget) -> Dict[str, Any]:
    def blank(*arguments: Any) -> _Array:
        array = np.empty(0, dtype=np.uint8).view(_Array)
        array.budget = budget
        return array

    def from_buffer(raw: Any, dtype: Any, shape: Any, order: str) -> _Array:
        if order not in ("C", "F"):
            raise Refused("an array in an unknown order")
        array = blank()
        array.set_state((1, shape, dtype, order == "F", raw))
        return array

    def scalar(dtype: Any, raw: Any) -> np.generic:
        return np.asarray(from_buffer(raw, dtype, (), "C"))[()]

    # numpy.ndarray is only ever an argument of _reconstruct
    answers: Dict[str, Any] = {"numpy.dtype": _Dtype, "numpy.ndarray": None}
    for core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
        answers[f"{core}.multiarray._reconstruct"] = blank
        answers[f"{core}.multiarray.scalar"] = scalar
        answers[f"{core}.numeric._frombuffer"] = from_buffer
    return answers


def _torch_answers(budget: Budget) -> Dict[str, Any]:
    def view(storage: Any, dtype: Any, offset: int, size: Any, stride: Any) -> Tensor:
        """A view of a storage, within its bounds."""
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
            raise Refused("a tensor without a storage of its dtype")
        (offset,), size, stride = _sizes((offset,)), _sizes(size), _sizes(stride)
        if len(size) != len(stride):
            raise Refused("a tensor with other strides than sizes")
        elements = storage.content.view(dtype)
        numel = prod(size)
        if numel and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(elements):
            raise Refused(f"a tensor of size {size} that reaches beyond the {len(elements)} values of its storage")
        budget.take(numel * elements.element_size())
        return elements.as_strided(size, stride, offset) if numel else torch.empty(size, dtype=dtype)

    def tensor(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Tensor:
        if len(more) > 2 and more[2]:  # requires_grad, hooks, and then conjugate and negative bits
            raise RefusedName("torch.Tensor of conjugate or negative numbers")
        return view(storage, storage.kind.dtype, offset, size, stride)

    def untyped(storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any):
        if storage.kind.dtype is not None or any(more):
            raise Refused("a tensor of another dtype than its storage's")
        return view(storage, dtype, offset, size, stride)

    def first(data: Any, *more: Any) -> Tensor:
        """A parameter is read as the tensor that it holds."""
        if not isinstance(data, Tensor):
            raise Refused("a parameter of no tensor")
        return data

    def from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
        """A tensor with attributes of its own, which are passed over."""
        if not isinstance(function, Name):
            raise Refused("a tensor of an unknown kind")
        return first(function(*arguments))

    return {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": untyped,
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
        "torch._tensor._rebuild_from_type_v2": from_type,
        "torch.Size": lambda items=(): _sizes(items),
        "torch.device": torch.device,
        "torch.Tensor": None,  # only ever arguments of _rebuild_from_type_v2
        "torch.nn.parameter.Parameter": None,
    }


def _as_bytes(raw: Any, budget: Budget) -> bytes:
    if not isinstance(raw, (bytes, str)):
        raise Refused(f"a {type(raw).__name__.strip('_')} where bytes are needed")
    budget.take(len(raw))
    # Python 2 wrote bytes as its str, which is read as latin-1 text of the same code points.
    return raw.encode("latin1") if isinstance(raw, str) else raw


def _sizes(items: Any) -> Tuple[int, ...]:
    """A shape, or strides: integers from 0 to 2^62."""
    if not isinstance(items, (tuple, list)) or len(items) > 32:
        raise Refused("sizes that are no tuple of numbers")
    if not all(type(each) is int and 0 <= each < 2**62 for each in items):
        raise Refused("sizes that are no numbers of 0 or more")
    return tuple(items)
