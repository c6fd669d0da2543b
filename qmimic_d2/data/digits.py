"""
The embedded data sets ``digits_det_*``: made on the spot, so that training, evaluation and tests
have real detection data without a download. docs/digits.md says what is in them.

A set is a directory ``<root>/<name>`` of ordinary COCO files::

    annotations.json
    images/000001.jpg ...
    complete.json           written last: settings, digests and library versions

It is made under another name and renamed once it is whole, so an interrupted generation is never
taken for a data set.
"""
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import asdict
from typing import Dict, List, Optional, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock

from .digits_render import DigitsPainter, DigitsSpec

__all__ = ["DIGITS_SPECS", "DigitsSpec", "prepare_digits", "register_digits", "verify_digits"]

logger = logging.getLogger(__name__)

CLASS_NAMES = [str(digit) for digit in range(10)]

_HARD = dict(
    digits_per_image=(4, 7),
    distractors_per_image=(3, 6),
    size=(13, 44),
    max_rotation=25.0,
    contrast=(45.0, 130.0),
    max_iou=0.2,
    max_cover=0.35,
)

DIGITS_SPECS: Dict[str, DigitsSpec] = {
    spec.name: spec
    for spec in (
        DigitsSpec("digits_det_train", split="train", num_images=2000),
        DigitsSpec("digits_det_val", split="val", num_images=500),
        DigitsSpec("digits_det_hard_train", split="train", num_images=3000, **_HARD),
        DigitsSpec("digits_det_hard_val", split="val", num_images=400, **_HARD),
    )
}

# To be raised with every change of what a spec paints: data made before is then made again.
_GENERATOR_VERSION = 1

# SHA-256 of annotations.json. Results are comparable between machines only if it is this one.
_ANNOTATIONS_SHA256 = {
    "digits_det_train": "",
    "digits_det_val": "",
    "digits_det_hard_train": "",
    "digits_det_hard_val": "",
}

_ANNOTATIONS = "annotations.json"
_IMAGES = "images"
_MARKER = "complete.json"
_JPEG_QUALITY = 95

# Where register_digits() put each set that it registered.
_registered_roots: Dict[str, str] = {}


def register_digits(root: Optional[str] = None) -> None:
    """
    Registers the four sets of :data:`DIGITS_SPECS` with Detectron2's catalogs. No file is read
    or made before a set is used. A name that is already registered is left as it is.

    Args:
        root: directory of the data sets; None for the environment variable
            ``DETECTRON2_DATASETS``, or "datasets" without it, as for Detectron2's own data sets.
    """
    root = _default_root() if root is None else os.path.expanduser(root)
    for name in DIGITS_SPECS:
        if name in DatasetCatalog:
            if _registered_roots.get(name, root) != root:
                logger.warning(
                    "%s stays registered under %r, not %r. To move it, call "
                    "DatasetCatalog.remove(%r) and MetadataCatalog.remove(%r) first.",
                    name, _registered_roots[name], root, name, name,
                )  # fmt: skip
            continue
        json_file = os.path.join(root, name, _ANNOTATIONS)
        DatasetCatalog.register(name, functools.partial(_load, name, root))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=os.path.join(root, name, _IMAGES),
            evaluator_type="coco",
            thing_classes=CLASS_NAMES,
        )
        # COCOEvaluator opens json_file through PathManager, often before any image is loaded.
        PathManager.register_handler(_AnnotationsOnDemand(name, root, json_file))
        _registered_roots[name] = root


def prepare_digits(dataset: Union[str, DigitsSpec], root: Optional[str] = None) -> str:
    """
    Makes a data set unless it is there already. Loading a registered set does this by itself.
    Several processes may call it at once: one makes the data while the others wait.

    A complete set is recognised by its settings and the number of its files, which takes no
    time; see :func:`verify_digits` for a full check.

    Args:
        dataset: a name of :data:`DIGITS_SPECS`, or a spec of your own.
        root: directory of the data sets; None for where the name is registered, else for the
            one that :func:`register_digits` would take.

    Returns:
        The directory of the data set.

    Raises:
        ValueError: the name is unknown, the root cannot be written to, or a directory of that
            name holds something else.
        ImportError: scikit-learn is needed and not installed.
    """
    spec, root, directory = _locate(dataset, root)
    # Without the lock first: a complete set may lie on a disk that cannot be written to.
    if _is_complete(spec, directory):
        return directory
    try:
        os.makedirs(root, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError(f"no permission to write to {root}")
    except OSError as e:
        raise ValueError(
            f"Cannot make the data set {spec.name} in {root!r} ({e}). Set the environment "
            "variable DETECTRON2_DATASETS to a directory that can be written to."
        ) from e
    with file_lock(directory):
        # Another process may have made it while this one waited.
        if not _is_complete(spec, directory):
            _generate(spec, root, directory)
    return directory


def verify_digits(dataset: Union[str, DigitsSpec], root: Optional[str] = None) -> str:
    """
    Reads every file of a data set and compares them with what was generated.

    Args:
        dataset, root: as for :func:`prepare_digits`.

    Returns:
        SHA-256 of the contents, in hexadecimal.

    Raises:
        FileNotFoundError: there is no complete data set of these settings.
        ValueError: a file was changed, added or removed.
    """
    spec, root, directory = _locate(dataset, root)
    marker = _read_marker(directory)
    if marker is None or marker.get("settings") != _settings(spec):
        raise FileNotFoundError(
            f"No complete data set {spec.name} with the present settings in {root!r}. "
            f"prepare_digits({spec.name!r}) makes it."
        )
    found = _contents_sha256(directory)
    if found != marker["contents_sha256"]:
        raise ValueError(
            f"The files in {directory!r} are not those that were generated. Remove the directory "
            "to have them made again."
        )
    return found


class _AnnotationsOnDemand(PathHandler):
    """Makes a data set when its annotation file is asked for. Any other path is not its own."""

    def __init__(self, name: str, root: str, json_file: str):
        super().__init__()
        self._name, self._root, self._json_file = name, root, json_file

    def _get_supported_prefixes(self) -> List[str]:
        return [self._json_file]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        prepare_digits(self._name, self._root)
        return path

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        prepare_digits(self._name, self._root)
        return open(path, mode, buffering)

    def _exists(self, path: str, **kwargs) -> bool:
        return os.path.exists(path)

    def _isfile(self, path: str, **kwargs) -> bool:
        return os.path.isfile(path)


def _load(name: str, root: str) -> List[dict]:
    directory = prepare_digits(name, root)
    return load_coco_json(
        os.path.join(directory, _ANNOTATIONS), os.path.join(directory, _IMAGES), name
    )


def _default_root() -> str:
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def _locate(dataset, root):
    if isinstance(dataset, DigitsSpec):
        spec = dataset
    elif dataset in DIGITS_SPECS:
        spec = DIGITS_SPECS[dataset]
    else:
        raise ValueError(f"Unknown data set {dataset!r}; use one of {sorted(DIGITS_SPECS)}.")
    if root is None:
        root = _registered_roots.get(spec.name) or _default_root()
    root = os.path.expanduser(root)
    return spec, root, os.path.join(root, spec.name)


def _settings(spec: DigitsSpec) -> dict:
    """What decides the contents, as JSON would give it back."""
    settings = dict(asdict(spec), generator=_GENERATOR_VERSION, jpeg_quality=_JPEG_QUALITY)
    return json.loads(json.dumps(settings))


def _read_marker(directory: str) -> Optional[dict]:
    try:
        with open(os.path.join(directory, _MARKER)) as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def _is_complete(spec: DigitsSpec, directory: str) -> bool:
    marker = _read_marker(directory)
    if marker is None or marker.get("settings") != _settings(spec):
        return False
    try:
        num_images = len(os.listdir(os.path.join(directory, _IMAGES)))
    except OSError:
        return False
    return num_images == spec.num_images and os.path.isfile(os.path.join(directory, _ANNOTATIONS))


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def _contents_sha256(directory: str) -> str:
    images = os.path.join(directory, _IMAGES)
    files = [f"{_IMAGES}/{name}" for name in os.listdir(images)] if os.path.isdir(images) else []
    if os.path.isfile(os.path.join(directory, _ANNOTATIONS)):
        files.append(_ANNOTATIONS)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{_sha256(os.path.join(directory, file))}  {file}\n".encode())
    return digest.hexdigest()


def _generate(spec: DigitsSpec, root: str, directory: str) -> None:
    """Called with the lock held, so nobody else is at work on this data set."""
    start = time.perf_counter()
    _refuse_foreign_files(directory)
    for leftover in os.listdir(root):
        if re.fullmatch(re.escape(spec.name) + r"\.(partial|old)-\d+", leftover):
            shutil.rmtree(os.path.join(root, leftover), ignore_errors=True)

    logger.info("Making the data set %s (%d images) in %s", spec.name, spec.num_images, directory)
    partial, old = f"{directory}.partial-{os.getpid()}", f"{directory}.old-{os.getpid()}"
    try:
        num_digits = _write(spec, partial)
        # A rename does not replace a directory that has files in it.
        if os.path.exists(directory):
            os.rename(directory, old)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    logger.info(
        "Made %s: %d images with %d digits in %.1f seconds, in %s",
        spec.name, spec.num_images, num_digits, time.perf_counter() - start, directory,
    )  # fmt: skip


def _refuse_foreign_files(directory: str) -> None:
    """An outdated or damaged set is replaced; whatever else bears its name is not deleted."""
    if not os.path.lexists(directory):
        return
    images = os.path.join(directory, _IMAGES)
    ours = os.path.isdir(directory) and set(os.listdir(directory)) <= {
        _ANNOTATIONS,
        _IMAGES,
        _MARKER,
    }
    if ours and os.path.isdir(images):
        ours = all(re.fullmatch(r"\d{6}\.jpg", file) for file in os.listdir(images))
    if not ours:
        raise ValueError(
            f"{directory!r} is in the way: it holds files that are not part of this data set. "
            "Move it, or set the environment variable DETECTRON2_DATASETS to another directory."
        )


def _write(spec: DigitsSpec, directory: str) -> int:
    """Writes a whole data set into a new directory and returns the number of digits in it."""
    import cv2
    import numpy
    import sklearn

    painter = DigitsPainter(spec)
    os.makedirs(os.path.join(directory, _IMAGES))
    images, annotations = [], []
    for index in range(spec.num_images):
        image, digits = painter.paint(index)
        image_id = index + 1
        file_name = f"{image_id:06d}.jpg"
        encoded, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        assert encoded, file_name
        with open(os.path.join(directory, _IMAGES, file_name), "wb") as f:
            f.write(data.tobytes())
        height, width = image.shape[:2]
        images.append(dict(id=image_id, file_name=file_name, height=height, width=width))
        for digit, (x0, y0, x1, y1) in digits:
            annotations.append(
                dict(
                    # COCO evaluation takes id 0 for "no match".
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=digit + 1,
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    area=(x1 - x0) * (y1 - y0),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASS_NAMES)]
    coco = dict(
        info=dict(description=f"{spec.name}: handwritten digits on photographs"),
        images=images,
        annotations=annotations,
        categories=categories,
    )
    with open(os.path.join(directory, _ANNOTATIONS), "w", newline="\n") as f:
        json.dump(coco, f, sort_keys=True)

    versions = {m.__name__: m.__version__ for m in (cv2, numpy, sklearn)}
    annotations_sha256 = _sha256(os.path.join(directory, _ANNOTATIONS))
    expected = _ANNOTATIONS_SHA256.get(spec.name)
    if spec == DIGITS_SPECS.get(spec.name) and annotations_sha256 != expected:
        logger.warning(
            "The annotations of %s differ from the published ones (SHA-256 %s, not %s), so "
            "results on it are not comparable with other machines. Made with: %s.",
            spec.name, annotations_sha256, expected, versions,
        )  # fmt: skip
    marker = dict(
        settings=_settings(spec),
        annotations_sha256=annotations_sha256,
        contents_sha256=_contents_sha256(directory),
        versions=versions,
    )
    with open(os.path.join(directory, _MARKER), "w", newline="\n") as f:
        json.dump(marker, f, indent=2, sort_keys=True)
    return len(annotations)
