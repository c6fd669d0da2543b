"""
Pickles read as data, without running what they ask for.

A pickle is a program for a small stack machine: it names callables, calls them, and writes into what they return.
:class:`PlainUnpickler` runs that program on plain containers and on inert holders alone. A callable is a name until
the reader's own table answers it, and what it returns is a holder that takes its state once. Nothing is written into
an array while the program runs: holders become arrays and tensors at the end (:func:`finished`).

What a file can make this module allocate is bounded by the file's own size. Python's unpickler is not bounded: nine
bytes make it allocate gigabytes (a memo index, the length of a byte array), and a key of nested tuples is hashed for
ever.
"""

import codecs
import pickle
import pickletools
from collections import OrderedDict
from typing import IO, Any, Callable, Dict, List, Mapping, Optional, Tuple

__all__ = ["Holder", "Name", "PlainUnpickler", "finished", "refused", "refused_name"]

MAX_DEPTH = 100
MAX_OPCODES = 10_000_000
# A pickle of a few bytes may still say a few things more than once.
_MIN_NODES = 100_000

_OPCODES = {ord(each.code): each for each in pickletools.opcodes}
_SCALARS = (str, bytes, int, float, bool, type(None))
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)


def refused(reason: str) -> pickle.UnpicklingError:
    """The error of a pickle that is damaged, or that asks for what no checkpoint needs."""
    return pickle.UnpicklingError(reason)


def refused_name(name: str) -> pickle.UnpicklingError:
    """The error of a pickle that names what is not admitted; it was not imported."""
    return pickle.UnpicklingError(f"GLOBAL {name.encode('unicode_escape').decode()} is not admitted")


class Name:
    """
    A name that a pickle gives, such as ``numpy.dtype``; nothing is imported for it.

    Args:
        text: module and name.
        call: answers a call of the name, with the call's arguments; None for one that is only an argument.
        value: what the name stands for where it is left as a value; None where it must not be.
    """

    def __init__(self, text: str, call: Optional[Callable[..., Any]] = None, value: Any = None) -> None:
        self.text, self.call, self.value = text, call, value


class Holder:
    """What a call returned, until the end of the program. Subclasses take one state at most."""

    has_state = False

    def set_state(self, state: Any) -> None:
        raise refused(f"a state for a {type(self).__name__.strip('_')}")

    def finish(self) -> Any:
        """The value that the holder stands for; called once, when the program has ended."""
        raise NotImplementedError


class PlainUnpickler:
    """
    Runs one pickle.

    Args:
        file: in binary mode; ``read(n)`` must not allocate ``n`` bytes for a file that is shorter (``BytesIO`` and
            ``mmap`` do not).
        names: answers (module, name).
        persistent: answers a persistent id, such as that of a storage in torch's files.

    Raises (from :meth:`load`):
        pickle.UnpicklingError, ValueError, LookupError, TypeError: the pickle is damaged or is refused.
    """

    def __init__(
        self,
        file: IO[bytes],
        names: Callable[[str, str], Name],
        persistent: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        self._file = file
        self._names = names
        self._persistent = persistent
        self._stack: List[Any] = []
        self._marked: List[List[Any]] = []
        self._memo: Dict[int, Any] = {}
        self._described: Dict[int, OrderedDict] = {}

    def load(self) -> Any:
        """The value that the pickle leaves, with holders in it; see :func:`finished`."""
        for _ in range(MAX_OPCODES):
            code = self._file.read(1)
            opcode = _OPCODES.get(code[0]) if code else None
            if opcode is None:
                raise refused("it ends in the middle" if not code else f"an unknown opcode {code!r}")
            if opcode.name == "STOP":
                return self._stack.pop()
            self._run(opcode.name, self._argument(opcode))
        raise refused(f"more than {MAX_OPCODES} opcodes")

    def _argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        if opcode.name == "STRING":
            # Python 2 wrote bytes so; pickletools decodes them as ASCII in some versions of Python.
            line = self._file.readline().strip()
            if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
                raise refused("a string without quotes")
            return codecs.escape_decode(line[1:-1])[0].decode("latin1")
        return opcode.arg.reader(self._file) if opcode.arg is not None else None

    def _run(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(argument)
            return
        operation = getattr(self, f"_{name.lower()}", None)
        if operation is None:
            raise refused(f"opcode {name}, which no checkpoint needs")
        if argument is None:
            operation()
        else:
            operation(argument)

    # ---- framing, the stack and the memo

    def _proto(self, version: int) -> None:
        if version > pickle.HIGHEST_PROTOCOL:
            raise refused(f"pickle protocol {version}")

    def _frame(self, length: int) -> None:
        pass

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _pop_mark(self) -> List[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _binput = _long_binput = _put

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _binget = _long_binget = _get

    # ---- values and containers

    def _none(self) -> None:
        self._stack.append(None)

    def _newtrue(self) -> None:
        self._stack.append(True)

    def _newfalse(self) -> None:
        self._stack.append(False)

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _empty_set(self) -> None:
        self._stack.append(set())

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple1(self) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _list(self) -> None:
        items = self._pop_mark()
        self._stack.append(items)

    def _dict(self) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set_items(items)

    def _frozenset(self) -> None:
        items = self._pop_mark()
        self._stack.append(frozenset(map(plain_key, items)))

    def _append(self) -> None:
        self._target(list).append(self._stack.pop())

    def _appends(self) -> None:
        items = self._pop_mark()
        self._target(list, below=0).extend(items)

    def _additems(self) -> None:
        items = self._pop_mark()
        self._target(set, below=0).update(map(plain_key, items))

    def _setitem(self) -> None:
        items = self._stack[-2:]
        del self._stack[-2:]
        self._set_items(items)

    def _setitems(self) -> None:
        self._set_items(self._pop_mark())

    def _set_items(self, items: List[Any]) -> None:
        target = self._target(dict, OrderedDict, below=0)
        for key, value in zip(items[::2], items[1::2]):
            target[plain_key(key)] = value

    def _target(self, *kinds: type, below: int = 1) -> Any:
        """What the program writes into, ``below`` the top of the stack: nothing but a plain container."""
        target = self._stack[-1 - below]
        if type(target) not in kinds:
            raise refused(f"an item for a {_kind(target)}")
        return target

    # ---- names, calls and states

    def _global(self, name: str) -> None:
        # pickletools joins module and name, which are lines of their own in the file, by a space
        module, _, name = name.partition(" ")
        self._stack.append(self._names(module, name))

    def _inst(self, name: str) -> None:
        raise refused_name(name.replace(" ", "."))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise refused("a name that is no text")
        self._stack.append(self._names(module, name))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Name) or function.call is None or not isinstance(arguments, tuple):
            raise refused(f"a call of {function.text if isinstance(function, Name) else _kind(function)}")
        self._stack.append(function.call(*arguments))

    def _newobj(self) -> None:
        self._reduce()

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is OrderedDict and isinstance(state, dict):
            # Of its attributes, the versions of a state dict's modules count; others could stand in for methods.
            if id(target) in self._described:
                raise refused("a second state for an OrderedDict")
            self._described[id(target)] = target  # kept, so that no other object takes its id
            if "_metadata" in state:
                target._metadata = state["_metadata"]
        elif isinstance(target, Holder) and not target.has_state:
            target.has_state = True
            target.set_state(state)
        else:
            raise refused(f"{'a second' if isinstance(target, Holder) else 'a'} state for a {_kind(target)}")

    def _binpersid(self) -> None:
        if self._persistent is None:
            raise refused("a persistent id")
        self._stack.append(self._persistent(self._stack.pop()))


def plain_key(key: Any) -> Any:
    """A dict's key or a set's item: a scalar, or a tuple of scalars. The hash of nested tuples has no bound."""
    if isinstance(key, _SCALARS) or (type(key) is tuple and all(isinstance(each, _SCALARS) for each in key)):
        return key
    raise refused(f"a {_kind(key)} as a key")


def finished(value: Any, size: int) -> Any:
    """
    The content of a pickle: the containers anew, with every holder in them turned into its value.

    Args:
        value: what :meth:`PlainUnpickler.load` returned.
        size: of the file in bytes. Written out, with shared parts as often as they are used, the content has at most
            as many items, or 100,000.

    Raises:
        pickle.UnpicklingError: a cycle, more than 100 levels, more items than ``size``, or a name left as a value.
    """
    return _Finisher(max(size, _MIN_NODES)).finish(value, 0)[0]


class _Finisher:
    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._done: Dict[int, Tuple[Any, int]] = {}
        self._under_way = set()

    def finish(self, value: Any, depth: int) -> Tuple[Any, int]:
        """The value and the number of its items, those of its parts included."""
        if type(value) in _SCALARS:
            return value, 1
        key = id(value)
        if key in self._done:
            return self._done[key]
        if key in self._under_way:
            raise refused("a container that holds itself")
        if depth > MAX_DEPTH:
            raise refused(f"more than {MAX_DEPTH} levels of containers")
        self._under_way.add(key)
        result, count = self._built(value, depth + 1)
        self._under_way.discard(key)
        if count > self._max_nodes:
            raise refused(f"containers of more items than the file's size can give, {self._max_nodes}")
        self._done[key] = result, count
        return result, count

    def _built(self, value: Any, depth: int) -> Tuple[Any, int]:
        kind = type(value)
        if isinstance(value, Holder):
            return value.finish(), 1
        if isinstance(value, Name):
            if value.value is None:
                raise refused_name(value.text)
            return value.value, 1
        if kind in (list, tuple):
            parts = [self.finish(each, depth) for each in value]
            return kind(part for part, _ in parts), 1 + sum(count for _, count in parts)
        if kind in (dict, OrderedDict):
            parts = [(name, *self.finish(each, depth)) for name, each in value.items()]
            result = kind((name, part) for name, part, _ in parts)
            if hasattr(value, "_metadata") and _is_versions(value._metadata):
                result._metadata = OrderedDict((name, dict(each)) for name, each in value._metadata.items())
            return result, 1 + len(parts) + sum(count for _, _, count in parts)
        if kind in (set, frozenset, bytearray):
            return (bytes(value), 1) if kind is bytearray else (value, 1 + len(value))
        return value, 1  # a number of another type, such as complex


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
