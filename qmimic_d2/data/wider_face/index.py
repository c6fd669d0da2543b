"""
WIDER FACE as one list of images with their sizes and faces, kept in a cache beside the annotation file.

Parsing the text takes a second; opening every image for its size takes minutes on a slow disk, and is what the
cache saves. It is ``<annotation file>.index``, two lines of JSON:

    {"format": 1, "annotations_sha256": ..., "images_sha256": ...}
    [["0--Parade/....jpg", bytes, mtime in ns, width, height, [[x, y, w, h, blur, ...], ...]], ...]

and is used as far as it is right: the first line must name the digests of the annotation file and of the second
line, else all is read anew; an image whose length or time of change is another is opened again.
"""

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

from qmimic_d2.data.wider_face.annotations import WiderFaceRecord, parse_annotations
from qmimic_d2.image_file import UnusableImageError, image_size

__all__ = ["IndexedImage", "load_index"]

logger = logging.getLogger(__name__)

# To be raised with every change of what the cache holds.
_FORMAT = 1


@dataclass(frozen=True)
class IndexedImage:
    """
    One image of the data set.

    Attributes:
        record: what the annotation file says of it.
        num_bytes, mtime_ns: length of its file and when it was changed, which tell whether ``width`` and
            ``height`` still hold.
        width, height: pixels, as Detectron2 reads the image (turned as its EXIF orientation says).
    """

    record: WiderFaceRecord
    num_bytes: int
    mtime_ns: int
    width: int
    height: int


def load_index(annotation_file: str, image_root: str) -> List[IndexedImage]:
    """
    Reads the annotations and the size of every image.

    Args:
        annotation_file: ``wider_face_{train,val}_bbx_gt.txt``.
        image_root: folder of the events' folders: ``WIDER_{train,val}/images``.

    Returns:
        The images in the order of the file.

    Raises:
        FileNotFoundError: the file, the folder or an image is missing; says what to put where.
        ValueError: a line of the file is malformed, or an image cannot be read; names it.
    """
    _require_files(annotation_file, image_root)
    with open(annotation_file, "rb") as file:
        source = file.read()
    cache_file = f"{annotation_file}.index"
    cached = _read_cache(cache_file, source)
    if cached is None:
        records = parse_annotations(_decode(source, annotation_file), annotation_file)
    else:
        records = [image.record for image in cached]
    images = _with_sizes(records, {image.record.image: image for image in cached or ()}, annotation_file, image_root)
    if images != cached:
        _write_cache(cache_file, source, images)
    return images


def _require_files(annotation_file: str, image_root: str) -> None:
    for what, path, is_there in (
        ("annotations", annotation_file, os.path.isfile(annotation_file)),
        ("images", image_root, os.path.isdir(image_root)),
    ):
        if not is_there:
            folder = os.path.dirname(os.path.abspath(path))
            raise FileNotFoundError(
                f"WIDER FACE's {what} are looked for in {os.path.abspath(path)}, which is not there. Unpack "
                f"{os.path.basename(folder)}.zip into {os.path.dirname(folder)}, or set the environment variable "
                "DETECTRON2_DATASETS to the folder that holds widerface/"
            )


def _decode(source: bytes, name: str) -> str:
    try:
        return source.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text file: {error}") from error


def _with_sizes(
    records: List[WiderFaceRecord], known: Dict[str, IndexedImage], annotation_file: str, image_root: str
) -> List[IndexedImage]:
    images, num_opened = [], 0
    for record in records:
        path = os.path.join(image_root, record.image)
        try:
            state = os.stat(path)
        except OSError as error:
            raise FileNotFoundError(
                f"{annotation_file} has a record of {record.image}, and there is no image {os.path.abspath(path)} "
                f"({error.strerror}). Unpack the data set's archive again"
            ) from error
        image = known.get(record.image)
        if image is None or (image.num_bytes, image.mtime_ns) != (state.st_size, state.st_mtime_ns):
            image = IndexedImage(record, state.st_size, state.st_mtime_ns, *_read_size(path))
            num_opened += 1
        images.append(image)
    if num_opened:
        logger.info("Read the sizes of %d images in %s", num_opened, image_root)
    return images


def _read_size(path: str) -> Tuple[int, int]:
    """Width and height of an image in pixels, from its header."""
    try:
        return image_size(path)
    except UnusableImageError as error:
        raise ValueError(
            f"{path} is no image that can be read: {error}. Unpack the data set's archive again"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_cache(path: str, source: bytes) -> Optional[List[IndexedImage]]:
    """What an earlier call wrote for this annotation file, or None: missing, damaged, or of another file."""
    try:
        with open(path, "rb") as file:
            head, _, body = file.read().partition(b"\n")
        if json.loads(head) != _cache_head(source, body):
            return None
        return [
            IndexedImage(WiderFaceRecord(image, tuple(map(tuple, faces))), *numbers)
            for image, *numbers, faces in json.loads(body)
        ]
    except (OSError, ValueError):
        return None


def _write_cache(path: str, source: bytes, images: List[IndexedImage]) -> None:
    """Under another name first, one of this process alone; where nothing can be written, the data do without."""
    rows = [
        [image.record.image, image.num_bytes, image.mtime_ns, image.width, image.height, image.record.faces]
        for image in images
    ]
    body = (json.dumps(rows, separators=(",", ":")) + "\n").encode()
    head = json.dumps(_cache_head(source, body)).encode()
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=os.path.basename(path), suffix=".part", dir=os.path.dirname(path))
        with open(handle, "wb") as file:
            file.write(head + b"\n" + body)
        os.chmod(partial, 0o644)  # a data set is often shared; mkstemp's file is its owner's alone
        os.replace(partial, path)
    except OSError as error:
        logger.warning("Image sizes are read again at every start, because %s cannot be written: %s", path, error)
        if partial is not None and os.path.exists(partial):
            os.remove(partial)


def _cache_head(source: bytes, body: bytes) -> dict:
    return {"format": _FORMAT, "annotations_sha256": _sha256(source), "images_sha256": _sha256(body)}
