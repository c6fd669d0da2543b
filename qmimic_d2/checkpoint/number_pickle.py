"""
The names that NumPy arrays and torch tensors consist of in a pickle, answered by holders.

NumPy's and torch's own callables would not do: ``numpy.ndarray((1,), "O", buffer)`` takes bytes of the file for
pointers to objects, and ``torch.FloatTensor(10**10)`` allocates what no byte of the file stands for. Every name that
is not here is refused before it is imported.
"""

import re
from collections import OrderedDict
from math import prod
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from qmimic_d2.checkpoint.plain_pickle import Holder, Name, plain_key, refused, refused_name

__all__ = ["Budget", "Storage", "admitted_names"]

_DTYPE = re.compile(r"[<>=|]?[biufc]\d{1,2}")  # bool, signed and unsigned integer, float, complex

# Storage classes of torch's files.
STORAGE_DTYPES = {
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
    "UntypedStorage": torch.uint8,
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
            pickle.UnpicklingError: the values ask for more than the file can give.
        """
        self._left -= count
        if count < 0 or self._left < 0:
            raise refused(f"values of more than {self._limit} bytes, which the file's size cannot give")


class _Dtype(Holder):
    """Stands in for ``numpy.dtype``."""

    def __init__(self, spec: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(spec, str) or not _DTYPE.fullmatch(spec):
            raise refused_name(f"numpy.dtype({spec!r})")
        self.number = np.dtype(spec)

    def set_state(self, state: Sequence[Any]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise refused("an unknown byte order")
        self.number = self.number.newbyteorder(state[1])

    def finish(self) -> np.dtype:
        return self.number


class _Array(Holder):
    """Stands in for a ``numpy.ndarray``: its parts, copied into an array when the program has ended."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._parts: Optional[Tuple[Any, ...]] = None

    def set_state(self, state: Sequence[Any]) -> None:
        _version, shape, dtype, is_fortran, raw = state
        self.fill(shape, dtype, "F" if is_fortran else "C", raw)

    def fill(self, shape: Tuple[int, ...], dtype: _Dtype, order: str, raw: Union[bytes, str]) -> "_Array":
        self.has_state = True
        raw = _as_bytes(raw, self._budget)
        self._parts = _sizes(shape), _number(dtype), order, raw
        return self

    def finish(self) -> np.ndarray:
        if self._parts is None:
            raise refused("an array without a state")
        shape, dtype, order, raw = self._parts
        if prod(shape) * dtype.itemsize != len(raw) or order not in ("C", "F"):
            raise refused(f"an array of shape {shape} and {dtype} from {len(raw)} bytes")
        array = np.frombuffer(raw, dtype=dtype).reshape(shape, order=order)
        # A copy in native byte order: torch takes no other.
        return np.array(array, dtype=dtype.newbyteorder("="), order="C")


class _Scalar(_Array):
    """Stands in for a NumPy scalar."""

    def finish(self) -> np.generic:
        return super().finish()[()]


class Storage(Holder):
    """
    The bytes behind tensors.

    Args:
        dtype: of its elements.
        numel: number of elements that the file names.
        is_untyped: a tensor on it names a dtype of its own.
        read: gives its bytes; asked at the end, once.
    """

    def __init__(self, dtype: torch.dtype, numel: int, is_untyped: bool, read: Callable[[], Tensor]) -> None:
        self.dtype, self.numel, self.is_untyped, self._read = dtype, numel, is_untyped, read
        self._bytes: Optional[Tensor] = None

    def elements(self, dtype: torch.dtype) -> Tensor:
        """All of it as a tensor of one dimension."""
        if self._bytes is None:
            self._bytes = self._read()
        return self._bytes.view(dtype)

    def finish(self) -> Any:
        raise refused_name("torch.storage, outside a tensor,")


class _TensorHolder(Holder):
    """Stands in for a tensor: a view of a storage, checked against the storage's bounds."""

    def __init__(
        self, budget: Budget, storage: Storage, offset: int, size: Any, stride: Any, dtype: Optional[torch.dtype]
    ) -> None:
        if not isinstance(storage, Storage) or (dtype is None) == storage.is_untyped:
            raise refused("a tensor without a storage of its dtype")
        self._storage, self._dtype = storage, dtype or storage.dtype
        (self._offset,), self._size, self._stride = _sizes((offset,)), _sizes(size), _sizes(stride)
        if len(self._size) != len(self._stride):
            raise refused("a tensor with other strides than sizes")
        numel = prod(self._size)
        last = self._offset + sum((n - 1) * step for n, step in zip(self._size, self._stride)) if numel else -1
        item = torch.empty(0, dtype=self._dtype).element_size()
        available = storage.numel // item if storage.is_untyped else storage.numel
        if last >= available:
            raise refused(f"a tensor of size {self._size} that reaches beyond the {available} values of its storage")
        budget.take(numel * item)

    def finish(self) -> Tensor:
        if not prod(self._size):
            return torch.empty(self._size, dtype=self._dtype)
        return self._storage.elements(self._dtype).as_strided(self._size, self._stride, self._offset)


def admitted_names(file_size: int, *, with_tensors: bool) -> Callable[[str, str], Name]:
    """
    The table of names for one file.

    Args:
        file_size: in bytes. All arrays and encoded bytes together may take as many; the tensors four times as many,
            since they share storages, and a MiB more.
        with_tensors: torch's own names as well.

    Returns:
        from module and name to a :class:`Name`; raises ``pickle.UnpicklingError`` for one that is not admitted.
    """
    arrays, encoded, views = Budget(file_size), Budget(file_size), Budget(4 * file_size + 2**20)
    table = _plain_names(encoded)
    table.update(_numpy_names(arrays))
    if with_tensors:
        table.update(_torch_names(views))

    def answer(module: str, name: str) -> Name:
        text = f"{module}.{name}"
        if text in table:
            return table[text]
        if with_tensors and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return Name(text, value=vars(torch)[name])
        raise refused_name(text)

    return answer


def _plain_names(budget: Budget) -> Dict[str, Name]:
    def encode(text: str, encoding: str) -> bytes:
        """The one use that pickle makes of ``_codecs.encode``: bytes that are not empty, in protocols below 3."""
        if encoding not in ("latin1", "latin-1"):
            raise refused_name(f"_codecs.encode to {encoding!r}")
        budget.take(len(text))
        return text.encode("latin1")

    def as_bytes(*arguments: Any) -> bytes:
        """The uses that pickle makes of ``bytes`` and ``bytearray``: empty, of bytes, or of text as latin-1."""
        if not arguments:
            return b""
        if isinstance(arguments[0], (bytes, bytearray)) and len(arguments) == 1:
            budget.take(len(arguments[0]))
            return bytes(arguments[0])
        return encode(*arguments)

    def ordered(pairs: Sequence[Any] = ()) -> OrderedDict:
        """Python 3 calls it with nothing and sets the items; Python 2 gave them as pairs."""
        if not isinstance(pairs, (list, tuple)) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in pairs):
            raise refused("an OrderedDict of no pairs")
        budget.take(len(pairs))
        return OrderedDict((plain_key(name), value) for name, value in pairs)

    def items(*arguments: Any) -> Any:
        """The items of a set; text and numbers are none."""
        if arguments and not isinstance(arguments[0], (list, tuple, set, frozenset)):
            raise refused("a set of what has no items")
        found = arguments[0] if arguments else ()
        budget.take(len(found))
        return map(plain_key, found)

    table = {
        "collections.OrderedDict": Name("collections.OrderedDict", ordered),
        "_codecs.encode": Name("_codecs.encode", encode),
    }
    for module in ("builtins", "__builtin__"):  # Python 3 and Python 2
        table[f"{module}.bytes"] = Name("bytes", as_bytes)
        table[f"{module}.bytearray"] = Name("bytearray", as_bytes)
        table[f"{module}.set"] = Name("set", lambda *arguments: set(items(*arguments)))
        table[f"{module}.frozenset"] = Name("frozenset", lambda *arguments: frozenset(items(*arguments)))
        table[f"{module}.complex"] = Name("complex", complex)
    return table


def _numpy_names(budget: Budget) -> Dict[str, Name]:
    def from_buffer(raw: bytes, dtype: _Dtype, shape: Any, order: str) -> _Array:
        return _Array(budget).fill(shape, dtype, order, raw)

    def scalar(dtype: _Dtype, raw: Union[bytes, str]) -> _Scalar:
        return _Scalar(budget).fill((), dtype, "C", raw)

    table = {
        "numpy.dtype": Name("numpy.dtype", _Dtype),
        "numpy.ndarray": Name("numpy.ndarray"),  # only ever an argument of _reconstruct
    }
    for core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
        table[f"{core}.multiarray._reconstruct"] = Name("_reconstruct", lambda kind, shape, code: _Array(budget))
        table[f"{core}.multiarray.scalar"] = Name("scalar", scalar)
        table[f"{core}.numeric._frombuffer"] = Name("_frombuffer", from_buffer)
    return table


def _torch_names(budget: Budget) -> Dict[str, Name]:
    def tensor(storage: Storage, offset: int, size: Any, stride: Any, *more: Any) -> _TensorHolder:
        if len(more) > 2 and more[2]:  # requires_grad, hooks, and then conjugate and negative bits
            raise refused_name("torch.Tensor of conjugate or negative numbers")
        return _TensorHolder(budget, storage, offset, size, stride, None)

    def untyped(storage: Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any):
        if not isinstance(dtype, Name) or not isinstance(dtype.value, torch.dtype) or any(more):
            raise refused("a tensor without a dtype")
        return _TensorHolder(budget, storage, offset, size, stride, dtype.value)

    def first(data: Any, *more: Any) -> _TensorHolder:
        """A parameter is read as the tensor that it holds."""
        if not isinstance(data, _TensorHolder):
            raise refused("a parameter of no tensor")
        return data

    def from_type(function: Any, kind: Any, arguments: Any, state: Any) -> _TensorHolder:
        """A tensor with attributes of its own, which are passed over."""
        if not isinstance(function, Name) or function.call not in (tensor, untyped, first):
            raise refused("a tensor of an unknown kind")
        return function.call(*arguments)

    def size(items: Any = ()) -> Tuple[int, ...]:
        return _sizes(items)

    table = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": untyped,
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
        "torch._tensor._rebuild_from_type_v2": from_type,
        "torch.Size": size,
        "torch.device": torch.device,
        "torch.Tensor": None,  # only ever arguments of _rebuild_from_type_v2
        "torch.nn.parameter.Parameter": None,
    }
    names = {text: Name(text, call) for text, call in table.items()}
    for kind in STORAGE_DTYPES:  # arguments of a persistent id
        for module in ("torch", "torch.storage"):
            names[f"{module}.{kind}"] = Name(f"{module}.{kind}")
    return names


def _number(dtype: Any) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise refused(f"a {type(dtype).__name__.strip('_')} where a dtype is needed")
    return dtype.number


def _as_bytes(raw: Any, budget: Budget) -> bytes:
    if not isinstance(raw, (bytes, bytearray, str)):
        raise refused(f"a {type(raw).__name__.strip('_')} where bytes are needed")
    budget.take(len(raw))
    # Python 2 wrote bytes as its str, which is read as latin-1 text of the same code points.
    return raw.encode("latin1") if isinstance(raw, str) else bytes(raw)


def _sizes(items: Any) -> Tuple[int, ...]:
    """A shape, or strides: integers from 0 to 2^62."""
    if not isinstance(items, (tuple, list)) or len(items) > 32:
        raise refused("sizes that are no tuple of numbers")
    if not all(type(each) is int and 0 <= each < 2**62 for each in items):
        raise refused("sizes that are no numbers of 0 or more")
    return tuple(items)
