"""
Pickles read as data, without running what they ask for.

A pickle is a program for a small stack machine: it names callables, calls them, and writes into what they return.
:class:`PlainUnpickler` is Python's own unpickler, for which every name is one of
:mod:`qmimic_d2.checkpoint.stand_ins`. It writes into plain containers alone.

What a file can make it allocate is bounded by the file's own size. The unpickler in C is not bounded: nine bytes make
it allocate gigabytes (a memo index, the length of a byte array), and a key of nested tuples is hashed for ever.
"""

import pickle
from collections import OrderedDict
from typing import IO, Any, Callable, Dict, List, Mapping

import numpy as np
import torch

__all__ = ["Name", "PlainUnpickler", "Refused", "RefusedName", "StandIn", "check_content", "plain_key"]

MAX_DEPTH = 100
MAX_READS = 10_000_000
# A pickle of a few bytes may still say a few things more than once.
_MIN_NODES = 100_000

_SCALARS = (str, bytes, int, float, complex, bool, type(None))
_NUMBERS = (torch.Tensor, np.ndarray, np.generic, torch.dtype, torch.device)


class Refused(pickle.UnpicklingError):
    """A pickle is damaged, or asks for what no checkpoint needs."""


class RefusedName(Refused):
    """A pickle names what is not admitted; it was not imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name[:200].encode("unicode_escape").decode())


class Name:
    """
    Stands for a name in a pickle, such as ``numpy.dtype``; nothing is imported for it.

    Args:
        text: module and name.
        answer: answers a call of the name, with the call's arguments; None for one that is only an argument.
    """

    def __init__(self, text: str, answer: Callable[..., Any] = None) -> None:
        self.text, self.answer = text, answer

    def __call__(self, *arguments: Any) -> Any:
        if self.answer is None:
            raise Refused(f"a call of {self.text}")
        return self.answer(*arguments)


class StandIn:
    """Stands for an object that a pickle makes by a call, and gives its state after that."""

    needs_state = False

    def set_state(self, state: Any) -> None:
        """
        Raises:
            Refused: the state is not one that such an object has, or there was one already.
        """
        raise NotImplementedError


class PlainUnpickler(pickle._Unpickler):
    """
    Reads one pickle.

    Args:
        file: in binary mode; ``read(n)`` must not allocate ``n`` bytes for a file that is shorter (``BytesIO`` and
            ``mmap`` do not).
        names: what stands for each name.
        persistent: answers a persistent id, such as that of a storage in torch's files.

    Raises (from :meth:`load`):
        Exception: of any kind, since damaged bytes can be any program; :class:`Refused` where it is seen through.
    """

    def __init__(self, file: IO[bytes], names: Mapping[str, Any], persistent: Callable[[Any], Any] = None) -> None:
        super().__init__(_Source(file), encoding="latin1")  # Python 2 wrote bytes as its text
        self._names, self._persistent = names, persistent

    def find_class(self, module: str, name: str) -> Any:
        text = f"{module}.{name}"
        if text not in self._names:
            raise RefusedName(text)
        return self._names[text]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise Refused("a persistent id")
        return self._persistent(pid)

    def _target(self, *kinds: type) -> Any:
        """The top of the stack, into which the program writes: nothing but a plain container."""
        if type(self.stack[-1]) not in kinds:
            raise Refused(f"an item for a {_kind(self.stack[-1])}")
        return self.stack[-1]

    def _set_items(self, items: List[Any]) -> None:
        target = self._target(dict, OrderedDict)
        for key, value in zip(items[::2], items[1::2]):
            target[plain_key(key)] = value

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            target.set_state(state)
        elif type(target) is OrderedDict and type(state) is dict:
            # Of its attributes, the versions of a state dict's modules count; others could stand in for methods.
            if "_metadata" in state:
                target._metadata = state["_metadata"]
        else:
            raise Refused(f"a state for a {_kind(target)}")

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _setitem(self) -> None:
        items = [self.stack.pop(-2), self.stack.pop()]
        self._set_items(items)

    def _additems(self) -> None:
        items = self.pop_mark()
        self._target(set).update(map(plain_key, items))

    # No data need classes of Python 2, registered extensions and buffers outside the file.
    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4)
        and bytes([code]) not in (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
    }
    dispatch.update(
        {
            pickle.BUILD[0]: _build,
            pickle.DICT[0]: _dict,
            pickle.SETITEM[0]: _setitem,
            pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
            pickle.ADDITEMS[0]: _additems,
            pickle.FROZENSET[0]: lambda self: self.append(frozenset(map(plain_key, self.pop_mark()))),
            pickle.FRAME[0]: lambda self: self.read(8),  # every read goes to the file
            # the length of a bytearray, of which no more is allocated than there is
            pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
        }
    )


class _Source:
    """A file of which a pickle reads so often at most, since each opcode may allocate a container."""

    def __init__(self, file: IO[bytes]) -> None:
        self._read, self.readline, self._left = file.read, file.readline, MAX_READS

    def read(self, count: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise Refused("more opcodes than any checkpoint has")
        return self._read(count)


def plain_key(key: Any) -> Any:
    """A dict's key or a set's item: a scalar, or a tuple of scalars. The hash of nested tuples has no bound."""
    if isinstance(key, _SCALARS) or (type(key) is tuple and all(isinstance(each, _SCALARS) for each in key)):
        return key
    raise Refused(f"a {_kind(key)} as a key")


def check_content(value: Any, size: int) -> None:
    """
    Checks what :class:`PlainUnpickler` returned; versions of modules that are none are taken off.

    Args:
        size: of the file in bytes. Written out, with shared parts as often as they are used, the content has at most
            as many items, or 100,000.

    Raises:
        Refused: a cycle, more than 100 levels, more items than ``size``, or what is neither number nor container.
    """
    _num_nodes(value, max(size, _MIN_NODES), 0, {})


def _num_nodes(value: Any, limit: int, depth: int, known: Dict[int, int]) -> int:
    """Number of items of a value, those of its parts included; 0 in ``known`` for one that is being counted."""
    kind = type(value)
    if isinstance(value, StandIn) and value.needs_state:
        raise Refused(f"an {_kind(value).lower()} without a state")
    if kind in _SCALARS or isinstance(value, (*_NUMBERS, StandIn)):
        return 1
    if isinstance(value, Name):
        raise RefusedName(value.text)
    count = known.get(id(value))
    if count == 0:
        raise Refused("a container that holds itself")
    if count:
        return count
    if depth > MAX_DEPTH:
        raise Refused(f"more than {MAX_DEPTH} levels of containers")
    known[id(value)] = 0
    if kind in (list, tuple):
        count = 1 + sum(_num_nodes(each, limit, depth + 1, known) for each in value)
    elif kind in (dict, OrderedDict):
        count = 1 + len(value) + sum(_num_nodes(each, limit, depth + 1, known) for each in value.values())
        if hasattr(value, "_metadata") and not _is_versions(value._metadata):
            del value._metadata
    elif kind in (set, frozenset):
        count = 1 + len(value)
    else:
        raise Refused(f"a {_kind(value)} outside a tensor")
    if count > limit:
        raise Refused(f"containers of more items than the file's size can give, {limit}")
    known[id(value)] = count
    return count


def _is_versions(metadata: Any) -> bool:
    """Whether it is what ``state_dict()`` notes of modules: name -> dict with their versions."""
    return isinstance(metadata, Mapping) and all(
        isinstance(name, str)
        and type(each) in (dict, OrderedDict)
        and all(isinstance(part, _SCALARS) for part in each.values())
        for name, each in metadata.items()
    )


def _kind(value: Any) -> str:
    return value.text if isinstance(value, Name) else type(value).__name__.strip("_")
