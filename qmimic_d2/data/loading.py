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

from qmimic_d2.data.checks.coco import coco_class_names, read_coco
from qmimic_d2.data.checks.dicts import Counts, Needs, Records, inspect_dicts
from qmimic_d2.data.checks.findings import Findings
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.pascal_voc import load_pascal_voc

__all__ = [
    "build_coco_evaluator",
    "class_names",
    "inspect_coco",
    "is_coco",
    "is_pascal_voc",
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
    if not is_coco(name):
        return None
    try:
        return coco_class_names(metadata.json_file)
    except (OSError, ValueError):
        return None


def is_coco(name: str) -> bool:
    """Whether ``register_coco_instances`` registered the set."""
    metadata = MetadataCatalog.get(name)
    return _registered_by(name, detectron2_coco) and bool(metadata.get("json_file"))


def is_pascal_voc(name: str) -> bool:
    """Whether ``register_pascal_voc`` registered the set."""
    metadata = MetadataCatalog.get(name)
    return _registered_by(name, detectron2_pascal_voc) and bool(metadata.get("dirname"))


def inspect_coco(
    metadata: Metadata,
    findings: Findings,
    files: ImageFiles,
    needs: Needs = Needs(),
    title: Optional[str] = None,
    needs_annotations: bool = False,
) -> Tuple[Records, Counts]:
    """
    Reads and inspects the annotation file of a set. Where it can be used, this process then reads the repaired one.

    Args:
        metadata: of the set.
        needs_annotations: as in :func:`qmimic_d2.data.checks.coco.read_coco`.
        findings, files, needs, title: as in :func:`qmimic_d2.data.checks.dicts.inspect_dicts`.

    Raises:
        FileNotFoundError: there is no such file; says where the data go.
        ValueError: it is not in COCO's format.
    """
    path, image_root = _annotation_file(metadata)
    content, records = read_coco(path, image_root, findings, files, needs_annotations)
    counts = inspect_dicts(records, findings, files, needs, title)
    if not findings.has_problems:
        usable = path
        if findings.is_repaired:
            usable = _new_file(f"minival_{os.path.basename(path)}" if "minival" in path else os.path.basename(path))
            with open(usable, "w", encoding="utf-8") as file:
                file.write(json.dumps(content))  # json.dump encodes in Python, which takes four times as long
        _usable_files[_state(path, image_root)] = usable
    return records, counts


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


def _annotation_file(metadata: Metadata) -> Tuple[str, str]:
    """The file, on this machine, and the folder of its images."""
    path = PathManager.get_local_path(metadata.json_file)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"the annotations of {metadata.name!r} are looked for in {os.path.abspath(path)}, and there is no such "
            "file. Put the data there; for Detectron2's own data sets, set the environment variable "
            "DETECTRON2_DATASETS to the folder that holds them"
        )
    return path, metadata.get("image_root", "")


def _usable_file(metadata: Metadata) -> str:
    state = _state(*_annotation_file(metadata))
    if state not in _usable_files:
        findings = Findings()
        inspect_coco(metadata, findings, ImageFiles())
        findings.raise_problems(f"the data set {metadata.name!r}")
    return _usable_files[state]


def _state(path: str, image_root: str) -> Tuple[str, str, int, int]:
    state = os.stat(path)
    return os.path.abspath(path), str(image_root), state.st_size, state.st_mtime_ns


def _new_file(name: str) -> str:
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory(prefix="qmimic_d2_"))
    folder = os.path.join(_folders[0].name, str(next(_numbers)))
    os.mkdir(folder)
    return os.path.join(folder, name)
