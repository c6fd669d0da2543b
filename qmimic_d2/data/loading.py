"""
Data sets as a run loads them: with the repairs of :mod:`qmimic_d2.data.checks`.

Sets that were registered by Detectron2's ``register_coco_instances`` and ``register_pascal_voc`` are read by this
package. A function of the user's own is called as it is. The catalogs are the same after each call.
"""

import contextlib
import copy
import itertools
import json
import os
import tempfile
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import coco as detectron2_coco
from detectron2.data.datasets import pascal_voc as detectron2_pascal_voc
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

from qmimic_d2.data.checks.coco import CocoContent, inspect_coco
from qmimic_d2.data.checks.findings import DataSetError, Findings
from qmimic_d2.data.pascal_voc import load_pascal_voc

__all__ = [
    "build_coco_evaluator",
    "class_names",
    "is_coco",
    "is_pascal_voc",
    "keep_repaired",
    "load_dataset",
    "load_dataset_dicts",
    "repaired",
]

# Path to read for an annotation file in a certain state.
_usable_files: Dict[Tuple[str, str, int, int], str] = {}
# Repaired annotation files of this process.
_folders: List[tempfile.TemporaryDirectory] = []
_numbers = itertools.count()


def load_dataset(name: str) -> List[Dict[str, Any]]:
    """
    As ``DatasetCatalog.get``, with repairs.

    Raises:
        KeyError: the name is not registered.
        DataSetError: the data cannot be used; has every problem.
    """
    with repaired([name]):
        return DatasetCatalog.get(name)


def load_dataset_dicts(names: Union[str, Sequence[str]], **options: Any) -> List[Dict[str, Any]]:
    """
    As Detectron2's ``get_detection_dataset_dicts``, with repairs.

    Raises:
        KeyError, DataSetError: as :func:`load_dataset`.
    """
    with repaired([names] if isinstance(names, str) else names):
        return get_detection_dataset_dicts(names, **options)


def build_coco_evaluator(name: str, output_dir: str, kpt_oks_sigmas: Sequence[float] = ()) -> COCOEvaluator:
    """
    Detectron2's evaluator on the data as they are now.

    Annotations of a set without a COCO file are converted anew for every evaluator. Detectron2's own would take the
    file that an earlier evaluation left in ``output_dir``, whatever has been corrected since.

    Args:
        name: registered.
        output_dir: of detections.
        kpt_oks_sigmas: as Detectron2's; () for COCO's own keypoints.

    Raises:
        DataSetError: as :func:`load_dataset`.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        path = _usable_file(metadata)
    else:
        path = _new_file(f"{name}_coco_format.json")
        load = DatasetCatalog[name]
        # the conversion moves keypoints in place, also those of a list that the function gives again
        with _replaced({name: lambda: copy.deepcopy(load())}):
            detectron2_coco.convert_to_coco_json(name, path, allow_cached=False)
    with _json_file(metadata, path):
        return COCOEvaluator(name, output_dir=output_dir, kpt_oks_sigmas=kpt_oks_sigmas)


def class_names(name: str) -> Optional[List[str]]:
    """
    The classes of a data set in the order of its labels, without loading it.

    Returns:
        None where only loading would tell, or the annotation file cannot be read.

    Raises:
        KeyError: the name is not registered.
    """
    if name not in DatasetCatalog:
        raise KeyError(f"the data set {name!r} is not registered")
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes"):
        return list(metadata.thing_classes)
    if not is_coco(name) or not os.path.isfile(metadata.json_file):
        return None
    try:
        return inspect_coco(metadata.json_file, "", Findings(), needs_annotations=False).class_names
    except ValueError:
        return None


def is_coco(name: str) -> bool:
    """Whether ``register_coco_instances`` registered the set."""
    metadata = MetadataCatalog.get(name)
    return _registered_by(name, detectron2_coco) and bool(metadata.get("json_file"))


def is_pascal_voc(name: str) -> bool:
    """Whether ``register_pascal_voc`` registered the set."""
    metadata = MetadataCatalog.get(name)
    return _registered_by(name, detectron2_pascal_voc) and bool(metadata.get("dirname"))


def keep_repaired(path: str, image_root: str, inspected: Optional[CocoContent]) -> str:
    """
    Remembers, for this process, what to read instead of an annotation file in its present state.

    Args:
        path: of the file, on this machine.
        image_root: folder of the images.
        inspected: repaired content; None where nothing was to be repaired.

    Returns:
        The path to read.
    """
    usable = path
    if inspected is not None:
        usable = _new_file(f"minival_{os.path.basename(path)}" if "minival" in path else os.path.basename(path))
        with open(usable, "w", encoding="utf-8") as file:
            json.dump(inspected.content, file)
    _usable_files[_state(path, image_root)] = usable
    return usable


def _registered_by(name: str, module: Any) -> bool:
    return getattr(DatasetCatalog[name], "__module__", "") == module.__name__


def repaired(names: Sequence[str]) -> ContextManager[None]:
    """
    In the block, Detectron2's catalog loads these data sets with repairs.

    Raises:
        DataSetError: as :func:`load_dataset`, but not yet for Pascal VOC, which is read inside of the block.
    """
    loaders: Dict[str, Callable[[], List[Dict[str, Any]]]] = {}
    for name in names:
        metadata = MetadataCatalog.get(name) if name in DatasetCatalog else None
        if metadata is not None and is_coco(name):
            path = _usable_file(metadata)
            if path != PathManager.get_local_path(metadata.json_file):
                loaders[name] = _coco_loader(name, path, metadata.get("image_root", ""))
        elif metadata is not None and is_pascal_voc(name):
            loaders[name] = _pascal_voc_loader(metadata)
    return _replaced(loaders)


def _coco_loader(name: str, path: str, image_root: str) -> Callable[[], List[Dict[str, Any]]]:
    return lambda: detectron2_coco.load_coco_json(path, image_root, name)


def _pascal_voc_loader(metadata: Metadata) -> Callable[[], List[Dict[str, Any]]]:
    return lambda: load_pascal_voc(metadata.dirname, metadata.split, metadata.thing_classes)


@contextlib.contextmanager
def _replaced(loaders: Dict[str, Callable[[], List[Dict[str, Any]]]]) -> Iterator[None]:
    originals = {name: DatasetCatalog[name] for name in loaders}
    DatasetCatalog.data.update(loaders)
    try:
        yield
    finally:
        DatasetCatalog.data.update(originals)


@contextlib.contextmanager
def _json_file(metadata: Metadata, path: str) -> Iterator[None]:
    """In the block, the metadata name this file; Detectron2's metadata refuse another value by assignment."""
    values = vars(metadata)
    original = values.get("json_file")
    values["json_file"] = path
    try:
        yield
    finally:
        if original is None:
            del values["json_file"]
        else:
            values["json_file"] = original


def _usable_file(metadata: Metadata) -> str:
    path, image_root = PathManager.get_local_path(metadata.json_file), metadata.get("image_root", "")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no annotation file {os.path.abspath(path)} of {metadata.name!r}")
    known = _usable_files.get(_state(path, image_root))
    if known is not None:
        return known
    findings = Findings()
    inspected = inspect_coco(path, image_root, findings, needs_annotations=False)
    if findings.has_problems:
        raise DataSetError(f"the data set {metadata.name!r} cannot be used:\n{findings.problems()}")
    return keep_repaired(path, image_root, inspected if findings.is_repaired else None)


def _state(path: str, image_root: str) -> Tuple[str, str, int, int]:
    state = os.stat(path)
    return os.path.abspath(path), str(image_root), state.st_size, state.st_mtime_ns


def _new_file(name: str) -> str:
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory(prefix="qmimic_d2_"))
    folder = os.path.join(_folders[0].name, str(next(_numbers)))
    os.mkdir(folder)
    return os.path.join(folder, name)
