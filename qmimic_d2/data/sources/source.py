"""One data set of a user's own: its format, its place, its classes, and how it is loaded."""

import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

from qmimic_d2.data.checks.coco import coco_class_names
from qmimic_d2.data.checks.dicts import Records, load_usable
from qmimic_d2.data.checks.findings import Findings
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.pascal_voc import read_pascal_voc, voc_class_names, voc_splits
from qmimic_d2.data.sources.yolo import SPLITS, read_data_yaml, read_yolo

__all__ = ["FORMATS", "Source", "SourceLoader", "guess_sources"]

KEY = "DATASETS.SOURCES"
_ENTRIES = ("NAME", "FORMAT", "PATH", "SPLIT", "IMAGES", "CLASSES")


@dataclass(frozen=True)
class Source:
    """
    An entry of ``DATASETS.SOURCES``.

    Attributes:
        name: of the data set, as ``DATASETS.TRAIN`` and ``TEST`` have it.
        format: a key of :data:`FORMATS`.
        path: of the annotation file, folder or data.yaml.
        split: of a "voc" or "yolo" set; "" for "coco".
        images: folder of the images of a "coco" set.
        classes: names in the order of the labels; () = as the data have them.
    """

    name: str
    format: str
    path: str
    split: str = ""
    images: str = ""
    classes: Tuple[str, ...] = ()

    @classmethod
    def from_entry(cls, entry: Any, beside: str = "") -> "Source":
        """
        Args:
            entry: a dict of the config.
            beside: folder from which relative paths count; "" = the working directory. A path that is not there but
                in the working directory counts from that.

        Raises:
            ValueError: it is no such dict, or lacks something; says what.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"{KEY} has {entry!r}; give dicts with NAME, FORMAT and PATH")
        unknown = sorted(set(entry) - set(_ENTRIES), key=str)
        if unknown:
            name = entry.get("NAME", "")
            raise ValueError(f"{KEY} has an entry {name!r} with {unknown}; an entry may have {list(_ENTRIES)}")
        for key in ("NAME", "FORMAT", "PATH"):
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ValueError(f"{KEY} has {dict(entry)!r}, where {key} is {entry.get(key)!r}; give a text")
        if entry["FORMAT"] not in FORMATS:
            raise ValueError(f"{KEY}: {entry['NAME']!r} has FORMAT {entry['FORMAT']!r}; choose one of {list(FORMATS)}")
        is_coco = entry["FORMAT"] == "coco"
        if is_coco == bool(entry.get("SPLIT")):
            what = f"takes no SPLIT, and has {entry['SPLIT']!r}" if is_coco else "needs a SPLIT"
            raise ValueError(f"{KEY}: {entry['NAME']!r} of FORMAT {entry['FORMAT']!r} {what}")
        if entry.get("IMAGES") and not is_coco:
            raise ValueError(f"{KEY}: {entry['NAME']!r} has IMAGES, which FORMAT 'coco' alone takes")
        path = _absolute(entry["PATH"], beside)
        images = _absolute(entry.get("IMAGES") or os.path.dirname(path), beside) if is_coco else ""
        classes = tuple(str(each) for each in entry.get("CLASSES") or ())
        return cls(entry["NAME"], entry["FORMAT"], path, str(entry.get("SPLIT") or ""), images, classes)

    def to_entry(self) -> Dict[str, Any]:
        """The dict that :meth:`from_entry` reads."""
        entry = {"NAME": self.name, "FORMAT": self.format, "PATH": self.path}
        for key, value in (("SPLIT", self.split), ("IMAGES", self.images), ("CLASSES", list(self.classes))):
            if value:
                entry[key] = value
        return entry

    def find_classes(self) -> Tuple[str, ...]:
        """
        ``classes``, or else those of the data.

        Raises:
            FileNotFoundError, ValueError: the data are not there, or cannot be read; or ``classes`` are not those of a
                COCO file, whose ids give the order.
        """
        try:
            if self.classes and self.format != "coco":
                return self.classes
            found = tuple(FORMATS[self.format](self))
            if self.classes and self.classes != found:
                raise ValueError(
                    f"CLASSES is {list(self.classes)}, and the ids of the categories in {self.path!r} give "
                    f"{list(found)}; leave CLASSES out, or renumber the categories"
                )
            return found
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{KEY}: {self.name!r}: {error}") from error


class SourceLoader:
    """
    Loads a "voc" or "yolo" source: the function that Detectron2's catalog calls.

    Args:
        source: with its classes.
    """

    def __init__(self, source: Source):
        self.source = source

    def __call__(self) -> Sequence[Dict[str, Any]]:
        """
        Dicts as Detectron2 has them.

        Raises:
            FileNotFoundError, DataSetError: the data cannot be used; the message has every problem.
        """
        return load_usable(self.read, f"the data set {self.source.name!r}")

    def read(self, findings: Findings, files: ImageFiles) -> Records:
        """What is to be inspected; what is wrong with the files themselves goes to ``findings``."""
        read = read_yolo if self.source.format == "yolo" else read_pascal_voc
        return read(self.source.path, self.source.split, self.source.classes, findings, files)


# By format, what gives the names of the classes of the data.
FORMATS: Dict[str, Callable[[Source], Sequence[str]]] = {
    "coco": lambda source: coco_class_names(source.path),
    "voc": lambda source: voc_class_names(source.path, source.split),
    "yolo": lambda source: read_data_yaml(source.path, source.split).classes,
}

# Splits of a folder in VOC's layout: for training and for evaluation, the preferred ones first.
_VOC_TRAIN, _VOC_TEST = ("trainval", "train"), ("test", "val")


def guess_sources(path: str, prefix: str, is_complete: bool = True) -> Tuple[List[Source], List[Source]]:
    """
    What a path holds, by its form: a ``data.yaml`` of YOLO, or a folder in VOC's layout.

    Args:
        path: of a file or folder.
        prefix: of the names: "prefix_train" and "prefix_val".
        is_complete: one source to train on and one to evaluate on are needed. False: all that there are.

    Returns:
        Sources to train on, and sources to evaluate on.

    Raises:
        FileNotFoundError, ValueError: it is nothing of the kind, or is not complete; says what is there.
    """
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path!r}")
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "data.yaml")):
        path = os.path.join(path, "data.yaml")
    if os.path.isdir(path):
        kind, splits = "voc", voc_splits(path)
        if not splits:
            raise ValueError(
                f"{path!r} is no data set that is known: it has no data.yaml (YOLO) and no ImageSets/Main (Pascal "
                "VOC). For COCO, give the annotation files and the folders of their images"
            )
        train = next((each for each in _VOC_TRAIN if each in splits), "")
        others = [each for each in _VOC_TEST if each in splits and not (train == "trainval" and each == "val")]
    elif path.lower().endswith((".yaml", ".yml")):
        kind, splits = "yolo", list(read_data_yaml(path).images)
        train = "train" if "train" in splits else ""
        others = [each for each in SPLITS[1:] if each in splits]
    else:
        raise ValueError(f"{path!r} is neither a data.yaml nor a folder; for COCO, give annotation files and folders")
    if is_complete and not (train and others):
        missing = "to evaluate on" if train else "to train on"
        raise ValueError(f"{path!r} has the splits {splits}, and none {missing}")
    if is_complete:
        return [Source(f"{prefix}_train", kind, path, train)], [Source(f"{prefix}_val", kind, path, others[0])]
    if not train and not others:
        train, *others = splits
    sources = {each: Source(f"{prefix}_{each}", kind, path, each) for each in (train, *others) if each}
    return [sources[train]] if train else [], [sources[each] for each in others]


def _absolute(path: str, beside: str) -> str:
    path = os.path.expanduser(path)
    from_file = os.path.abspath(os.path.join(beside, path))
    return from_file if os.path.exists(from_file) or not os.path.exists(path) else os.path.abspath(path)
