"""
The three formats of checkpoint files, read into plain content: tensors, number arrays and containers.

* torch's archives: a zip with the pickle ``data.pkl`` and one record for each storage;
* torch's older files: five pickles, and the storages after them;
* pickles of NumPy arrays, as in Detectron2's model zoo.

``torch.load(weights_only=True)`` runs no code either. But it allocates what a file asks for, from a few bytes, and
hashes keys that take for ever; see :mod:`qmimic_d2.checkpoint.plain_pickle`.
"""

import contextlib
import io
import mmap
import os
import struct
import sys
import zipfile
from typing import IO, Any, Dict, Iterator, Tuple

import numpy as np
import torch
from torch import Tensor

from qmimic_d2.checkpoint.number_pickle import STORAGE_DTYPES, Budget, Storage, admitted_names
from qmimic_d2.checkpoint.plain_pickle import Name, PlainUnpickler, finished, refused

__all__ = ["MAX_INFLATION", "read_content"]

# torch compresses nothing. An archive that somebody compressed may grow to as many times its size.
MAX_INFLATION = 20

_ZIP_MAGIC = b"PK\x03\x04"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_TORCH_MAGIC_PICKLE = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_TORCH_PROTOCOL = 1001


def read_content(path: str) -> Any:
    """
    The content of a checkpoint file; its format is told by its first bytes.

    Tensors are on the CPU. Parameters come as tensors.

    Args:
        path: of a local file. A plain pickle is read only from a name that ends in ``.pkl``.

    Raises:
        pickle.UnpicklingError: the file names what is no tensor, number array or plain container, or asks for more
            memory than its size can give. A compressed archive may grow to 20 times its size.
        Exception: damaged bytes can raise almost anything.
    """
    with open(path, "rb") as file, _mapped(file) as content:
        start = content[:64]
        if start.startswith(_ZIP_MAGIC):
            return _read_archive(file, len(content))
        if _TORCH_MAGIC_PICKLE in start:
            return _read_torch_sequence(content)
        if path.endswith(".pkl"):
            names = admitted_names(len(content), with_tensors=False)
            return finished(PlainUnpickler(content, names).load(), len(content))
        raise refused("neither a zip archive nor a file of torch.save")


@contextlib.contextmanager
def _mapped(file: IO[bytes]) -> Iterator[mmap.mmap]:
    """The file's bytes, of which no read allocates more than there are."""
    if not os.fstat(file.fileno()).st_size:
        raise EOFError("an empty file")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


class _Storages:
    """
    The storages that a file's pickle names.

    Args:
        read: gives the bytes of one by its key.
    """

    def __init__(self, read: Any) -> None:
        self._read = read
        self.by_key: Dict[str, Storage] = {}

    def named(self, identity: Any) -> Storage:
        """Answers the persistent id ("storage", class, key, location, number of elements[, view])."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] not in ("storage", b"storage"):
            raise refused("a persistent id that is no storage")
        kind, key, numel = identity[1], identity[2], identity[4]
        kind = kind.text.rpartition(".")[2] if isinstance(kind, Name) else ""
        if kind not in STORAGE_DTYPES or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise refused("a storage of an unknown kind")
        if identity[5:] not in ((), (None,)):
            raise refused("a storage that is part of another")
        dtype, is_untyped = STORAGE_DTYPES[kind], kind == "UntypedStorage"
        known = self.by_key.get(key)
        if known is None:
            known = Storage(dtype, numel, is_untyped, lambda: self._read(key, dtype, numel))
            self.by_key[key] = known
        elif (known.dtype, known.numel, known.is_untyped) != (dtype, numel, is_untyped):
            raise refused(f"storage {key!r} twice, of different kinds")
        return known


def _tensor_of(raw: bytes, dtype: torch.dtype, numel: int) -> Tensor:
    """The bytes of a storage as a tensor that owns them."""
    if len(raw) != _num_bytes(dtype, numel):
        raise refused(f"a storage of {numel} values in {len(raw)} bytes")
    tensor = torch.empty(len(raw), dtype=torch.uint8)  # in torch's own memory, aligned as any tensor
    tensor.numpy()[:] = np.frombuffer(raw, dtype=np.uint8)
    return tensor


def _num_bytes(dtype: torch.dtype, numel: int) -> int:
    return numel * torch.empty(0, dtype=dtype).element_size()


def _read_archive(file: IO[bytes], size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        folder = _checked_folder(archive, size)
        order = archive.read(f"{folder}/byteorder") if f"{folder}/byteorder" in archive.NameToInfo else b"little"
        if order not in (b"little", b"big"):
            raise refused("an unknown byte order")

        def read(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            tensor = _tensor_of(archive.read(f"{folder}/data/{key}"), dtype, numel)
            if order.decode() != sys.byteorder and tensor.numel():
                tensor.untyped_storage().byteswap(dtype)
            return tensor

        inflated = _inflated(archive)
        names = admitted_names(inflated, with_tensors=True)
        pickled = io.BytesIO(archive.read(f"{folder}/data.pkl"))
        content = PlainUnpickler(pickled, names, _Storages(read).named).load()
        return finished(content, inflated)


def _checked_folder(archive: zipfile.ZipFile, size: int) -> str:
    """The folder in which torch's records stand, once the records are found to be no more than the file can hold."""
    records = archive.infolist()
    if len(archive.NameToInfo) != len(records):
        raise refused("two records of one name in the archive")
    kinds = {each.compress_type for each in records}
    if not kinds <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise refused("an archive compressed in an unusual way")
    compressed = zipfile.ZIP_DEFLATED in kinds
    limit = size * MAX_INFLATION if compressed else size
    if _inflated(archive) > limit:
        raise refused(f"records of more than {limit} bytes in an archive of {size}")
    end = 0
    for each in sorted(records, key=lambda record: record.header_offset):
        if each.header_offset < end:
            raise refused("records that overlap in the archive")
        end = each.header_offset + each.compress_size
    folders = [each.filename[: -len("/data.pkl")] for each in records if each.filename.endswith("/data.pkl")]
    if len(folders) != 1:
        raise refused("an archive without torch's data.pkl")
    return folders[0]


def _inflated(archive: zipfile.ZipFile) -> int:
    return sum(each.file_size for each in archive.infolist())


def _read_torch_sequence(content: mmap.mmap) -> Any:
    size = len(content)
    offsets: Dict[str, Tuple[int, int]] = {}

    def read(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        start, stop = offsets[key]
        return _tensor_of(content[start:stop], dtype, numel)

    storages = _Storages(read)
    names = admitted_names(size, with_tensors=True)
    parts = [PlainUnpickler(content, names, storages.named).load() for _ in range(5)]
    magic, protocol, system, value, keys = parts
    if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL or not isinstance(system, dict):
        raise refused("not a file of torch.save")
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise refused("a file of another byte order")
    budget = Budget(size)
    for key in keys:
        (numel,) = struct.unpack("<q", content.read(8))
        storage = storages.by_key[key]
        length = _num_bytes(storage.dtype, numel)
        budget.take(length)
        offsets[key] = content.tell(), content.tell() + length
        content.seek(length, os.SEEK_CUR)
    return finished(value, size)
