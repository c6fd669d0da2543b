"""
Checks of all data of a run before its first iteration: one summary of what cannot be used, one warning of what was
repaired.
"""

import logging
import os
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from qmimic_d2.data.checks import DataSetError, Findings
from qmimic_d2.data.checks.dicts import Counts, Needs, Records, inspect_dicts
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.loading import class_names, inspect_coco, is_coco, is_pascal_voc
from qmimic_d2.data.pascal_voc import check_pascal_voc, read_pascal_voc
from qmimic_d2.data.sources import SourceLoader
from qmimic_d2.modeling.family import num_classes_section

__all__ = [
    "DataReport",
    "ModelClasses",
    "check_datasets",
    "check_evaluated_classes",
    "class_difference",
    "inspect_datasets",
    "model_classes",
]

_TRAIN, _TEST = "DATASETS.TRAIN", "DATASETS.TEST"
# Names of classes, None if unknown, each with what has them.
_Classes = List[Tuple[str, Optional[Sequence[str]]]]


class ModelClasses(NamedTuple):
    """How many classes a model has, and the key that says so."""

    key: str
    number: int


class DataReport(NamedTuple):
    """
    What the check of all data found.

    Attributes:
        notes: one text for each thing that was repaired or is worth knowing.
        problems: one text for each thing that stops a run.
    """

    notes: List[str]
    problems: List[str]


class _DataSet(NamedTuple):
    """
    What a check has seen of a data set.

    Attributes:
        problems, notes: texts; "" for none.
        names: of the classes, in the order of the labels; None if unknown.
        counts: of classes and objects.
    """

    problems: str
    notes: str
    names: Optional[Sequence[str]] = None
    counts: Counts = Counts(0, None)


def model_classes(cfg: CfgNode, model: nn.Module) -> Optional[ModelClasses]:
    """None for a model of another project that keeps its number of classes elsewhere."""
    section = num_classes_section(model)
    return ModelClasses(f"MODEL.{section}.NUM_CLASSES", cfg.MODEL[section].NUM_CLASSES) if section else None


def check_datasets(cfg: CfgNode, classes: Optional[ModelClasses] = None, *, eval_only: bool = False) -> None:
    """
    Looks at the data as :func:`inspect_datasets` does. What was repaired is logged as one warning for each data set.

    Raises:
        DataSetError: the run cannot go well; has every problem, by data set and kind.
    """
    report = inspect_datasets(cfg, classes, eval_only=eval_only)
    for note in report.notes:
        logging.getLogger(__name__).warning("%s", note)
    if report.problems:
        raise DataSetError("\n".join(report.problems))


def inspect_datasets(cfg: CfgNode, classes: Optional[ModelClasses] = None, *, eval_only: bool = False) -> DataReport:
    """
    Looks at every image, annotation and class of DATASETS.TRAIN and DATASETS.TEST; docs/training.md lists the checks.

    Files of users are never changed.

    Args:
        cfg: of the run; the data sets are registered.
        classes: of the model; None where there is none, or it is unknown.
        eval_only: DATASETS.TRAIN is not loaded; where its classes are known, they are those of the model.
    """
    train = [] if eval_only else list(dict.fromkeys(cfg.DATASETS.TRAIN))
    test = list(dict.fromkeys(cfg.DATASETS.TEST))
    seen: Dict[str, _DataSet] = {}
    files, report = ImageFiles(), DataReport([], [])
    for key, name in [(_TRAIN, each) for each in train] + [(_TEST, each) for each in test]:
        if name not in seen:
            seen[name] = _look_at(cfg, name, key == _TRAIN, files)
            _report_findings(key, name, seen[name], report)
        _report_numbers(cfg, key, name, seen[name], classes, report)
    named = [] if train else _trained_classes(cfg)
    named += [(f"{name!r} of {_TRAIN if name in train else _TEST}", seen[name].names) for name in seen]
    report.problems.extend(_differences(named))
    return report


def check_evaluated_classes(cfg: CfgNode, name: str) -> None:
    """
    For an evaluation outside of a run: the classes of a test set must be those that the model was trained on.

    Args:
        cfg: of the model; DATASETS.TRAIN tells its classes, where these sets are registered and can be read.
        name: of the test set.

    Raises:
        KeyError: it is not registered.
        DataSetError: the classes or their order differ; names both lists.
    """
    for each in _differences([*_trained_classes(cfg), (repr(name), class_names(name))]):
        raise DataSetError(each)


def class_difference(first: str, first_classes: Sequence[str], other: str, other_classes: Sequence[str]) -> str:
    """
    What is wrong where a label means one class in one place and another in another; "" if nothing is.

    Args:
        first, other: what has the classes, for the message.
        first_classes, other_classes: in the order of their labels.
    """
    if list(first_classes) == list(other_classes):
        return ""
    is_order = sorted(first_classes) == sorted(other_classes)
    return (
        f"{first} has the classes {list(first_classes)}, and {other} has {list(other_classes)}: "
        f"{'the order differs, so that' if is_order else 'they differ, and'} a label of the model means another class "
        "there. Give both the same categories under ids of the same order (for Pascal VOC: the same class_names)"
    )


def _look_at(cfg: CfgNode, name: str, is_training: bool, files: ImageFiles) -> _DataSet:
    findings, metadata = Findings(), MetadataCatalog.get(name)
    kind, is_evaluated = metadata.get("evaluator_type"), name in cfg.DATASETS.TEST
    mask_format = cfg.INPUT.MASK_FORMAT if is_training else "bitmask"  # an evaluation takes any
    needs = Needs(
        mask_format if cfg.MODEL.MASK_ON else "",
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
        image_ids=is_evaluated and not is_coco(name),  # whose reader looks at them
        sizes=is_evaluated and kind == "coco" and not metadata.get("json_file"),
    )
    try:
        if is_coco(name):
            records, counts = inspect_coco(metadata, findings, files, needs, name, needs_annotations=is_training)
            registered, names = metadata.get("thing_classes") or records.class_names, records.class_names
            for each in _differences([("its registration", registered), (f"its file {metadata.json_file}", names)]):
                raise ValueError(each)
        else:
            if isinstance(DatasetCatalog[name], SourceLoader):
                records = DatasetCatalog[name].read(findings, files)
            elif is_pascal_voc(name):
                records = _read_pascal_voc(metadata, findings, files)
            else:
                records = _call(name, findings, needs, files)
            # WIDER FACE's loader has looked at its images
            counts = inspect_dicts(records, findings, files, needs, None if kind == "wider_face" else name)
        if is_pascal_voc(name):  # its evaluator goes through all classes
            counts = counts._replace(classes=len(records.class_names))
        return _DataSet(findings.problems(), findings.notes(), records.class_names, counts)
    except (ValueError, KeyError, OSError) as error:  # each says what is wrong
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        return _DataSet(text, findings.notes())


def _read_pascal_voc(metadata: Metadata, findings: Findings, files: ImageFiles) -> Records:
    if metadata.get("evaluator_type") == "pascal_voc" and metadata.year not in (2007, 2012):
        raise ValueError(
            f"it is registered with the year {metadata.year!r}; register it with 2007 or 2012, whose rules of average "
            "precision the evaluation has"
        )
    folder = PathManager.get_local_path(metadata.dirname)
    check_pascal_voc(folder, metadata.split, metadata.year)
    return read_pascal_voc(folder, metadata.split, metadata.thing_classes, findings, files)


def _call(name: str, findings: Findings, needs: Needs, files: ImageFiles) -> Records:
    """The dicts of a function of the user's own."""
    metadata = MetadataCatalog.get(name)
    kind, annotation_file = metadata.get("evaluator_type", ""), metadata.get("annotation_file", "")
    if kind == "coco" and metadata.get("json_file"):  # for the evaluator; the function may do what it likes
        inspect_coco(metadata, findings, files)
    if kind == "wider_face" and not os.path.isfile(annotation_file):
        raise FileNotFoundError(
            f"its annotations are looked for in {os.path.abspath(annotation_file)}, and there is no such file. "
            "docs/wider_face.md says where the data go"
        )
    try:
        dicts = DatasetCatalog.get(name)
    except (FileNotFoundError, ValueError):  # which say what is wrong
        raise
    except Exception as error:  # whatever a function of the user's own does
        raise ValueError(f"its function fails: {type(error).__name__}: {error}") from error
    if not isinstance(dicts, (list, tuple)):  # a PyTorch data set
        return Records((), metadata.get("thing_classes"))
    if not dicts:
        raise ValueError("its function gives no image")
    if needs.sizes and not metadata.get("thing_classes"):
        raise ValueError(
            "its metadata have no thing_classes, which the evaluation needs; set "
            "MetadataCatalog.get(name).thing_classes"
        )
    return Records(dicts, metadata.get("thing_classes"))


def _report_findings(key: str, name: str, seen: _DataSet, report: DataReport) -> None:
    if seen.notes:
        report.notes.append(f"{key} names {name!r}, of which was noted:\n{seen.notes}")
    if seen.problems:
        metadata = MetadataCatalog.get(name)
        source = metadata.get("json_file") or metadata.get("annotation_file") or metadata.get("dirname")
        is_one = "\n" not in seen.problems
        report.problems.append(
            f"{key} names {name!r}{f' ({source})' if source else ''}, which cannot be used:"
            + (f" {seen.problems.removeprefix('- ')}" if is_one else f"\n{seen.problems}")
        )


def _report_numbers(
    cfg: CfgNode, key: str, name: str, seen: _DataSet, classes: Optional[ModelClasses], report: DataReport
) -> None:
    named = f"{key} names {name!r}, which has"
    if seen.counts.objects == 0 and not seen.problems:
        if key == _TEST:
            report.notes.append(f"{named} no object but crowds or none at all: there is no AP to be measured")
        elif cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            report.problems.append(
                f"{named} no object to be trained on: no annotation, or all with iscrowd 1. Correct iscrowd, or train "
                "on another set"
            )
    if classes is None or seen.names is None:
        return
    number = len(seen.names)
    text = f"{classes.key} is {classes.number}, and {named} {number} classes"
    if seen.counts.classes > classes.number:
        report.problems.append(
            f"{text}, {seen.names[seen.counts.classes - 1]!r} the last that is annotated; set it to {number}. With too "
            "few, a label is out of bounds, or is that of the background"
        )
    elif number < classes.number and key == _TEST:
        report.problems.append(
            f"{text}: a detection of another one would stop the evaluation. Set it to {number}, or list all classes in "
            "the test set"
        )
    elif number < classes.number:
        report.notes.append(f"{text}: the others are never learned")


def _trained_classes(cfg: CfgNode) -> _Classes:
    """The sets of DATASETS.TRAIN whose classes are known without loading them."""
    return [(f"{name!r} of {_TRAIN}", class_names(name)) for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]


def _differences(named: _Classes) -> List[str]:
    known = [(what, names) for what, names in named if names]
    found = [class_difference(*known[0], *other) for other in known[1:]]
    return list(dict.fromkeys(filter(None, found)))
