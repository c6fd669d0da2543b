"""
The three formats of checkpoint files, read into plain content: tensors, number arrays and containers.

* torch's archives: a zip with the pickle ``data.pkl`` and one record for each storage;
* torch's older files: five pickles, and the storages after them;
* pickles of NumPy arrays, as in Detectron2's model zoo.

``torch.load(weights_only=True)`` runs no code either. But it allocates what a file asks for, from a few bytes, and
hashes keys that take for ever; see :mod:`qmimic_d2.checkpoint.plain_pickle`.
"""

import io
import mmap
import os
import struct
import sys
import zipfile
from typing import IO, Any, Callable, Dict

import numpy as np
import torch
from torch import Tensor

from qmimic_d2.checkpoint.plain_pickle import PlainUnpickler, Refused, check_content
from qmimic_d2.checkpoint.stand_ins import Budget, Storage, StorageKind, names_for

__all__ = ["MAX_INFLATION", "read_content"]

# torch compresses nothing. An archive that somebody compressed may grow to as many times its size.
MAX_INFLATION = 20

_ZIP_MAGIC = b"PK\x03\x04"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_TORCH_MAGIC_PICKLE = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_TORCH_PROTOCOL = 1001


def read_content(path: str) -> Any:
    """
    The content of a checkpoint file; its first bytes give its format.

    Tensors are on the CPU. Parameters come as tensors.

    Args:
        path: of a local file. A plain pickle is read only from a name that ends in ``.pkl``.

    Raises:
        Refused: the file names what is no tensor, number array or plain container, or asks for more memory than its
            size can give. A compressed archive may grow to 20 times its size.
        Exception: damaged bytes can raise almost anything.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise EOFError("an empty file")
        # no read of the mapped file allocates more than there is
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] == _ZIP_MAGIC:
                return _read_archive(file, size)
            if _TORCH_MAGIC_PICKLE in content[:64]:
                return _read_torch_sequence(content, size)
            if not path.endswith(".pkl"):
                raise Refused("neither a zip archive nor a file of torch.save")
            value = PlainUnpickler(content, names_for(size, with_tensors=False)).load()
            check_content(value, size)
            return value


class _Storages:
    """
    The storages that a file's pickle names, by their keys.

    Args:
        read: fills the memory of one, given its key.
        size: in bytes that all of them may have together.
    """

    def __init__(self, read: Callable[[str, Tensor], None], size: int) -> None:
        self._read, self._budget = read, Budget(size)
        self.by_key: Dict[str, Storage] = {}

    def named(self, identity: Any) -> Storage:
        """Answers the persistent id ("storage", class, key, location, number of elements[, view])."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] not in ("storage", b"storage"):
            raise Refused("a persistent id that is no storage")
        kind, key, numel = identity[1], identity[2], identity[4]
        if not isinstance(kind, StorageKind) or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise Refused("a storage of an unknown kind")
        if identity[5:] not in ((), (None,)):
            raise Refused("a storage that is part of another")
        length = numel * kind.item_size
        if key not in self.by_key:
            self._budget.take(length)
            memory = torch.empty(length, dtype=torch.uint8)  # torch's own, aligned as any tensor
            self._read(key, memory)
            self.by_key[key] = Storage(kind, memory)
        known = self.by_key[key]
        if known.kind != kind or len(known.content) != length:
            raise Refused(f"storage {key!r} twice, of different kinds")
        return known


def _fill(memory: Tensor, raw: bytes) -> None:
    if len(raw) != len(memory):
        raise Refused(f"a storage of {len(memory)} bytes in {len(raw)} bytes")
    memory.numpy()[:] = np.frombuffer(raw, dtype=np.uint8)


def _read_archive(file: IO[bytes], size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        folder = _checked_folder(archive, size)
        inflated = _inflated(archive)

        def record(name: str) -> bytes:
            info = archive.getinfo(f"{folder}/{name}")
            with archive.open(info) as stream:
                return stream.read(info.file_size)  # no more is decompressed, even if there is more

        order = record("byteorder") if f"{folder}/byteorder" in archive.NameToInfo else b"little"
        if order not in (b"little", b"big"):
            raise Refused("an unknown byte order")
        storages = _Storages(lambda key, memory: _fill(memory, record(f"data/{key}")), inflated)
        names = names_for(inflated, with_tensors=True)
        value = PlainUnpickler(io.BytesIO(record("data.pkl")), names, storages.named).load()
        check_content(value, inflated)
        if order.decode() != sys.byteorder:
            for storage in storages.by_key.values():
                if storage.kind.dtype and len(storage.content):
                    storage.content.untyped_storage().byteswap(storage.kind.dtype)
        return value


def _checked_folder(archive: zipfile.ZipFile, size: int) -> str:
    """The folder in which torch's records stand, once the records are found to be no more than the file can hold."""
    records = archive.infolist()
    if len(archive.NameToInfo) != len(records):
        raise Refused("two records of one name in the archive")
    kinds = {each.compress_type for each in records}
    if not kinds <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise Refused("an archive compressed in an unusual way")
    limit = size * MAX_INFLATION if zipfile.ZIP_DEFLATED in kinds else size
    if _inflated(archive) > limit:
        raise Refused(f"records of more than {limit} bytes in an archive of {size}")
    end = 0
    for each in sorted(records, key=lambda record: record.header_offset):
        if each.header_offset < end:
            raise Refused("records that overlap in the archive")
        end = each.header_offset + each.compress_size
    folders = [each.filename[: -len("/data.pkl")] for each in records if each.filename.endswith("/data.pkl")]
    if len(folders) != 1:
        raise Refused("an archive without torch's data.pkl")
    return folders[0]


def _inflated(archive: zipfile.ZipFile) -> int:
    return sum(each.file_size for each in archive.infolist())


def _read_torch_sequence(content: mmap.mmap, size: int) -> Any:
    storages = _Storages(lambda key, memory: None, size)  # the bytes come after the pickles
    names = names_for(size, with_tensors=True)
    parts = [PlainUnpickler(content, names, storages.named).load() for _ in range(5)]
    magic, protocol, system, value, keys = parts
    if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL or not isinstance(system, dict):
        raise Refused("not a file of torch.save")
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise Refused("a file of another byte order")
    if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages.by_key):
        raise Refused("other storages than its tensors need")
    for key in keys:
        storage = storages.by_key[key]
        (numel,) = struct.unpack("<q", content.read(8))
        if numel * storage.kind.item_size != len(storage.content):
            raise Refused(f"a storage of {numel} values for tensors of another number")
        _fill(storage.content, content.read(len(storage.content)))
    check_content(value, size)
    return value
