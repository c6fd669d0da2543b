"""
A folder of feature maps, found by what they are the maps of.

One file holds the maps of one image, under a name that is a digest of everything that decides on them. Files are
written under another name and renamed, so that processes on several machines may share the folder and may be killed at
any moment. Every file has a checksum: what is damaged is as good as not there. An embedded data base (LMDB, SQLite)
would need fewer files, but must not be used from several machines.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np

from qmimic_d2.files import read_json, write_json

__all__ = ["MapStore", "StoredTeacher", "damaged_entries", "remove_entries", "stored_teachers"]

logger = logging.getLogger(__name__)

_MAGIC = b"qmimicm1"
_DIGEST_BYTES = 16
_SUFFIX = ".map"
_TEACHER = "teacher.json"
# A temporary file that is older, in seconds, is what a killed writer left.
_OLD = 3600.0
# Share of the limit that stays when old entries go.
_KEPT_SHARE = 0.9
# The time of a file's last use is renewed when it is older, in seconds.
_USE_SECONDS = 60.0

Arrays = Dict[str, np.ndarray]


class MapStore:
    """
    The maps of one teacher.

    Attributes:
        hits, misses: number of calls of :meth:`get` that found something, or not.
        bytes_read, bytes_written: of files.
    """

    def __init__(self, folder: str, identity: str, max_bytes: int):
        """
        Args:
            folder: of the cache, which several teachers may share; made if need be.
            identity: digest of what decides on the teacher's maps besides the image.
            max_bytes: of all files in ``folder``. The entries that were used longest ago make room for new ones.

        Raises:
            OSError: the folder cannot be made.
        """
        self._root, self._folder, self._max_bytes = folder, os.path.join(folder, identity), max_bytes
        os.makedirs(self._folder, exist_ok=True)
        self.hits = self.misses = self.bytes_read = self.bytes_written = 0
        self._is_full = False
        self._num_bytes: Optional[int] = None

    def describe(self, content: Dict[str, object]) -> None:
        """Notes, for people, whose maps these are; once."""
        path = os.path.join(self._folder, _TEACHER)
        if not os.path.exists(path):
            with contextlib.suppress(OSError):
                write_json(path, content)

    @property
    def description(self) -> Dict[str, object]:
        """What :meth:`describe` noted; {} where that is not there, or damaged."""
        try:
            content = read_json(os.path.join(self._folder, _TEACHER))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def get(self, key: str) -> Optional[Arrays]:
        """
        Args:
            key: hexadecimal digest of an image.

        Returns:
            What :meth:`put` kept under it, arrays that may not be written to; None where it is not there, or damaged.
            A damaged file is named in the log and removed.
        """
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            self.misses += 1
            return None
        arrays = _decode(key, content)
        if arrays is None:
            logger.warning("The cached maps in %s are damaged; the teacher makes them anew", path)
            with contextlib.suppress(OSError):
                os.remove(path)
            self.misses += 1
            return None
        self.hits += 1
        self.bytes_read += len(content)
        with contextlib.suppress(OSError):
            if time.time() - os.stat(path).st_mtime > _USE_SECONDS:
                os.utime(path)
        return arrays

    def put(self, key: str, arrays: Arrays) -> None:
        """Keeps arrays under a key. Where the disk is full, a warning says so, and nothing more is kept."""
        if self._is_full:
            return
        content, path = _encode(key, arrays), self._path(key)
        partial = os.path.join(os.path.dirname(path), f".{os.getpid()}.{secrets.token_hex(4)}.part")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._make_room(len(content))
            with open(partial, "wb") as file:
                file.write(content)
            os.replace(partial, path)  # without a flush: what a power cut damages, the checksum finds
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(partial)
            self._is_full = True
            logger.warning("No further map is cached in %s: %s. The training goes on", self._root, error)
            return
        self.bytes_written += len(content)

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, key[:2], key[2:] + _SUFFIX)

    def _make_room(self, num_bytes: int) -> None:
        """Other processes write, too: their bytes are counted when the limit seems to be reached."""
        if self._num_bytes is None or self._num_bytes + num_bytes > self._max_bytes:
            entries = sorted(_entries(self._root), key=lambda entry: entry.used)
            self._num_bytes = sum(each.num_bytes for each in entries)
            if self._num_bytes + num_bytes > self._max_bytes:
                for each in entries:
                    if self._num_bytes + num_bytes <= _KEPT_SHARE * self._max_bytes:
                        break
                    with contextlib.suppress(OSError):  # another process was quicker
                        os.remove(each.path)
                    self._num_bytes -= each.num_bytes
        self._num_bytes += num_bytes


@dataclass(frozen=True)
class StoredTeacher:
    """
    The maps of one teacher, for people.

    Attributes:
        identity: name of its folder.
        description: see :meth:`MapStore.describe`.
        num_entries, num_bytes: images, and bytes of their files.
    """

    identity: str
    description: Dict[str, object]
    num_entries: int
    num_bytes: int


def stored_teachers(folder: str) -> List[StoredTeacher]:
    """
    Raises:
        FileNotFoundError: there is no such folder.
    """
    found = []
    for identity in sorted(os.listdir(folder)):
        own = os.path.join(folder, identity)
        if os.path.isfile(os.path.join(own, _TEACHER)):
            entries = list(_entries(own))
            description = MapStore(folder, identity, 0).description
            found.append(StoredTeacher(identity, description, len(entries), sum(each.num_bytes for each in entries)))
    return found


def damaged_entries(folder: str) -> Iterator[Tuple[str, bool]]:
    """Reads all entries. Gives the path of each, and whether it is damaged."""
    for each in _entries(folder):
        try:
            with open(each.path, "rb") as file:
                content = file.read()
        except OSError:
            continue  # evicted meanwhile
        parent, name = os.path.split(each.path)
        yield each.path, _decode(os.path.basename(parent) + name[: -len(_SUFFIX)], content) is None


def remove_entries(folder: str) -> int:
    """Removes all entries and what stands beside them of this package's; returns their number."""
    paths = [each.path for each in _entries(folder)]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            if name == _TEACHER or (parent == folder and name.startswith("shapes_") and name.endswith(".json")):
                os.remove(os.path.join(parent, name))
        with contextlib.suppress(OSError):  # somebody else's files are in it
            os.rmdir(parent)
    return len(paths)


@dataclass(frozen=True)
class _Entry:
    path: str
    num_bytes: int
    used: float


def _entries(folder: str) -> Iterator[_Entry]:
    """All entries; what killed writers left is removed on the way."""
    for parent, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):
                if name.endswith(_SUFFIX):
                    status = os.stat(path)
                    yield _Entry(path, status.st_size, status.st_mtime)
                elif name.startswith(".") and name.endswith(".part") and time.time() - os.stat(path).st_mtime > _OLD:
                    os.remove(path)


def _encode(key: str, arrays: Arrays) -> bytes:
    """Checksum, then a JSON header with its length, then the compressed bytes of all arrays."""
    shapes = [[name, each.dtype.str, each.shape] for name, each in arrays.items()]
    header = json.dumps({"key": key, "arrays": shapes}).encode()
    payload = zlib.compress(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays.values()), 1)
    body = len(header).to_bytes(4, "little") + header + payload
    return _MAGIC + _digest(body) + body


def _decode(key: str, content: bytes) -> Optional[Arrays]:
    """The arrays; None for damaged content, and for that of another key."""
    begin = len(_MAGIC) + _DIGEST_BYTES
    body = content[begin:]
    if content[:begin] != _MAGIC + _digest(body):
        return None
    end = 4 + int.from_bytes(body[:4], "little")
    header = json.loads(body[4:end])
    if header["key"] != key:
        return None
    data, offset, arrays = zlib.decompress(body[end:]), 0, {}
    for name, dtype, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, dtype, count, offset).reshape(shape)
        offset += arrays[name].nbytes
    return arrays


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
