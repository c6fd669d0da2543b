"""
The embedded data sets ``digits_det_*``: made on the spot, so that training, evaluation and tests
have real detection data without a download. docs/digits.md says what is in them.
"""

import functools
import logging
import os
from typing import Dict, List, Optional, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager

from qmimic_d2.data.digits import files as digits_files
from qmimic_d2.data.digits.render import DigitsSpec

__all__ = ["DIGITS_SPECS", "DigitsSpec", "prepare_digits", "register_digits", "verify_digits"]

logger = logging.getLogger(__name__)

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

# SHA-256 of annotations.json. Results are comparable between machines only if it is this one.
_ANNOTATIONS_SHA256 = {
    "digits_det_train": "962667ae11a96df539f13cea97c4c20f20d7d4eb0d6e4f707443fd4e0c9b6ff7",
    "digits_det_val": "d5dedae81b6bdb0c4dda65a52fb8b701e36be93ed04c043b77f4ee82cdf4396a",
    "digits_det_hard_train": "1b9e41e99aea3c77852db0d5e184a250256c4fcf8a7ec7bdfd84c948a61ed539",
    "digits_det_hard_val": "8a431c4ddcc41000a4b00d4d85f587c887b22bbabb737846dc5a044a855ca346",
}

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
                    "%s stays registered in %r, not %r. To move it, call DatasetCatalog.remove "
                    "and MetadataCatalog.remove with its name first.",
                    *(name, _registered_roots[name], root),
                )
            continue
        json_file = os.path.join(root, name, digits_files.ANNOTATIONS)
        DatasetCatalog.register(name, functools.partial(_load, name, root))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=os.path.join(root, name, digits_files.IMAGES),
            evaluator_type="coco",
            thing_classes=list(digits_files.CLASS_NAMES),
            thing_dataset_id_to_contiguous_id={index + 1: index for index in range(len(digits_files.CLASS_NAMES))},
        )
        # COCOEvaluator opens json_file through PathManager, often before any image is loaded.
        PathManager.register_handler(_AnnotationsOnDemand(name, root, json_file))
        _registered_roots[name] = root


def prepare_digits(dataset: Union[str, DigitsSpec], root: Optional[str] = None) -> str:
    """
    Makes a data set unless it is there already. Loading a registered set, or evaluating on it,
    does this by itself. Several processes may call it at once: one makes the data while the
    others wait.

    Args:
        dataset: a name of :data:`DIGITS_SPECS`, or a spec of your own.
        root: directory of the data sets; None for the one in which the name is registered, or
            that :func:`register_digits` would take.

    Returns:
        The directory of the data set: annotations.json and images/.

    Raises:
        ValueError: the name is unknown, the root cannot be written to, or a directory of that
            name holds something else.
        ImportError: scikit-learn is needed and not installed.
    """
    spec, root = _resolve(dataset, root)
    published = _ANNOTATIONS_SHA256[spec.name] if spec == DIGITS_SPECS.get(spec.name) else None
    return digits_files.prepare(spec, root, published)


def verify_digits(dataset: Union[str, DigitsSpec], root: Optional[str] = None) -> str:
    """
    Reads every file of a data set and compares them with what was generated.

    Args:
        dataset, root: as for :func:`prepare_digits`.

    Returns:
        SHA-256 of the contents, in hexadecimal.

    Raises:
        FileNotFoundError: there is no complete data set of these settings.
        ValueError: the name is unknown, or a file was changed, added or removed.
    """
    return digits_files.verify(*_resolve(dataset, root))


class _AnnotationsOnDemand(PathHandler):
    """Makes a data set when its annotation file is asked for. It handles that one path."""

    def __init__(self, name: str, root: str, json_file: str):
        super().__init__()
        self._name, self._root, self._json_file = name, root, json_file

    def _get_supported_prefixes(self):
        return [self._json_file]

    def _get_local_path(self, path, force=False, **kwargs):
        prepare_digits(self._name, self._root)
        return path

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        prepare_digits(self._name, self._root)
        return open(path, mode, buffering, **kwargs)

    def _exists(self, path, **kwargs):
        return os.path.exists(path)

    def _isfile(self, path, **kwargs):
        return os.path.isfile(path)


def _load(name: str, root: str) -> List[dict]:
    directory = prepare_digits(name, root)
    return load_coco_json(
        os.path.join(directory, digits_files.ANNOTATIONS),
        os.path.join(directory, digits_files.IMAGES),
        name,
    )


def _default_root() -> str:
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def _resolve(dataset, root) -> Tuple[DigitsSpec, str]:
    if isinstance(dataset, DigitsSpec):
        spec = dataset
    elif dataset in DIGITS_SPECS:
        spec = DIGITS_SPECS[dataset]
    else:
        raise ValueError(f"Unknown data set {dataset!r}; use one of {sorted(DIGITS_SPECS)}.")
    if root is None:
        root = _registered_roots.get(spec.name) or _default_root()
    return spec, os.path.expanduser(root)
