"""
Pascal VOC's files, and those of users' own in this format.

Detectron2's loader and evaluator take what the challenge's own files have. This reader also takes lists with blank
lines or one line, images with another ending than .jpg, objects without ``difficult``, ``truncated`` and ``pose``,
coordinates that are no whole numbers, and annotations without a usable ``<size>``.
"""

import os
import xml.etree.ElementTree as ElementTree
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from qmimic_d2.data.checks.dicts import Records, load_usable
from qmimic_d2.data.checks.findings import Findings
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.checks.numbers import numbers, whole_size

__all__ = ["check_pascal_voc", "load_pascal_voc", "read_pascal_voc", "voc_class_names", "voc_image_ids", "voc_splits"]

# As on http://host.robots.ox.ac.uk/pascal/VOC/, by year and by split ("" for the others).
_ARCHIVES = {
    (2007, "test"): "VOCtest_06-Nov-2007.tar",
    (2007, ""): "VOCtrainval_06-Nov-2007.tar",
    (2012, ""): "VOCtrainval_11-May-2012.tar",
}
# In this order, in lower or upper case; Detectron2's loader takes the first alone.
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def voc_splits(folder: str) -> List[str]:
    """The lists that a folder has."""
    lists = os.path.dirname(_list_file(folder, ""))
    names = sorted(os.listdir(lists)) if os.path.isdir(lists) else []
    return [name[:-4] for name in names if name.endswith(".txt")]


def voc_image_ids(folder: str, split: str) -> List[str]:
    """
    The images of a split, in the order of its list.

    A line is an image's id, or an id and the flag -1, 0 or 1 as in the challenge's lists of one class. Blank lines do
    not count.

    Raises:
        FileNotFoundError: there is no such list; names those that there are.
    """
    path = _list_file(folder, split)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no list {path!r}; {folder!r} has the splits {voc_splits(folder)}")
    with open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    return [_without_flag(folder, line) for line in lines if line]


def voc_class_names(folder: str, split: str) -> List[str]:
    """The classes in the annotations of a split, sorted."""
    elements = (each for _, _, root in _annotations(folder, split, Findings()) for each in root.findall("object"))
    return sorted({_text(each, "name") for each in elements} - {""})


def read_pascal_voc(
    folder: str, split: str, class_names: Sequence[str], findings: Findings, files: ImageFiles
) -> Records:
    """
    Args:
        folder: holds Annotations, ImageSets and JPEGImages.
        split: name of a list in ImageSets/Main, without ".txt".
        class_names: in the order of the labels.
        findings: takes problems and repairs.
        files: tell sizes that an annotation lacks.

    Returns:
        What Detectron2's ``load_voc_instances`` gives, for what the module says, and ``difficult`` of each object.

    Raises:
        FileNotFoundError: the list is not there.
    """
    images = _images_by_id(os.path.join(folder, "JPEGImages"))
    labels = {name: label for label, name in enumerate(class_names)}
    dicts, places = [], []
    for image_id, path, root in _annotations(folder, split, findings):
        file = images.get(image_id) or os.path.join(folder, "JPEGImages", f"{image_id}.jpg")
        size = whole_size(_text(root, "size/width"), _text(root, "size/height"), of_text=True)
        if size is None:
            size = files.size(file)
            if size is not None:  # else the file's own problem is reported
                shown = f"{path}: {size[0]} x {size[1]}"
                findings.repair("annotations have no usable <size>", "It is read from the image", shown)
        elements = root.findall("object")
        places.append([f"{path}: object {number}" for number in range(1, len(elements) + 1)])
        objects = [_object(element, labels, findings, where) for element, where in zip(elements, places[-1])]
        dicts.append({"file_name": file, "image_id": image_id, "annotations": objects})
        dicts[-1].update(zip(("width", "height"), size or ()))
    return Records(dicts, class_names, places)


def load_pascal_voc(folder: str, split: str, class_names: Sequence[str]) -> Sequence[Dict[str, Any]]:
    """
    The dicts of :func:`read_pascal_voc`.

    Raises:
        DataSetError: the data cannot be used; has every problem.
        FileNotFoundError: the list is not there.
    """
    folder = PathManager.get_local_path(folder)
    return load_usable(
        lambda findings, files: read_pascal_voc(folder, split, class_names, findings, files),
        f"the data that {_list_file(folder, split)!r} lists",
    )


def check_pascal_voc(folder: str, split: str, year: int) -> None:
    """
    Looks for the list of a split, and for the annotation and the image of everything in it. No file is parsed.

    Args:
        folder: ``VOC2007`` or ``VOC2012``, as registered with Detectron2.
        split: "train", "val", "trainval" or "test".
        year: of the challenge.

    Raises:
        FileNotFoundError: something is not there; names it, how many more there are, and what to unpack where.
        ValueError: the list is empty.
    """
    path = _list_file(folder, split)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {path!r}. {_what_to_do(folder, split, year)}")
    ids = voc_image_ids(folder, split)
    if not ids:
        raise ValueError(f"{path!r} lists no image. {_what_to_do(folder, split, year)}")
    images = _images_by_id(os.path.join(folder, "JPEGImages"))
    parts = (
        ("Annotations", ".xml", [each for each in ids if not os.path.isfile(_xml_file(folder, each))]),
        ("JPEGImages", ".jpg", [each for each in ids if each not in images]),
    )
    for part, suffix, missing in parts:
        if missing:
            raise FileNotFoundError(
                f"{path!r} lists {len(ids)} images, and {len(missing)} files of them are missing, the first "
                f"{os.path.join(folder, part, missing[0] + suffix)!r}. {_what_to_do(folder, split, year)}"
            )


def _list_file(folder: str, split: str) -> str:
    return os.path.join(folder, "ImageSets", "Main", f"{split}.txt")


def _without_flag(folder: str, line: str) -> str:
    words = line.split()
    has_flag = len(words) > 1 and words[-1] in ("-1", "0", "1")
    return line[: -len(words[-1])].rstrip() if has_flag and not os.path.isfile(_xml_file(folder, line)) else line


def _xml_file(folder: str, image_id: str) -> str:
    return os.path.join(folder, "Annotations", f"{image_id}.xml")


def _images_by_id(folder: str) -> Dict[str, str]:
    """Paths of the images below a folder by their names without ending."""
    found: Dict[str, Tuple[int, str]] = {}
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if ending.lower() in _ENDINGS:
                image_id = os.path.relpath(os.path.join(parent, stem), folder).replace(os.sep, "/")
                ranked = _ENDINGS.index(ending.lower()) + (ending != ending.lower()), os.path.join(parent, name)
                found[image_id] = min(found.get(image_id, ranked), ranked)
    return {image_id: path for image_id, (_, path) in found.items()}


def _annotations(
    folder: str, split: str, findings: Findings
) -> Iterator[Tuple[str, str, ElementTree.Element]]:
    """Image id, annotation file and its content for each image of a list."""
    for image_id in voc_image_ids(folder, split):
        path = _xml_file(folder, image_id)
        try:
            root = ElementTree.parse(path).getroot()
        except FileNotFoundError:
            fix = "Add them, or take the images out of the list"
            findings.refuse("annotation files are not there", fix, path)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            fix = "Replace them, or take the images out of the list"
            findings.refuse("annotation files are no XML", fix, f"{path} ({error})")
        else:
            yield image_id, path, root


def _object(element: ElementTree.Element, labels: Dict[str, int], findings: Findings, where: str) -> Dict[str, Any]:
    """Pascal counts pixels from 1, and the last ones are included."""
    name, difficult = _text(element, "name"), _text(element, "difficult")
    if difficult not in ("0", "1"):
        findings.repair("objects have no usable <difficult>", "0 is taken: they count in the evaluation", where)
    texts = [_text(element, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    corners = numbers(texts, of_text=True)
    return {
        "category_id": labels.get(name, name),
        "bbox": [corners[0] - 1.0, corners[1] - 1.0, *corners[2:]] if corners else texts,
        "bbox_mode": BoxMode.XYXY_ABS,
        "difficult": int(difficult == "1"),
    }


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _what_to_do(folder: str, split: str, year: int) -> str:
    name = os.path.basename(folder)
    archive = _ARCHIVES.get((year, split), _ARCHIVES.get((year, "")))
    unpack = f"Unpack {archive} and move its VOCdevkit/{name}" if archive else f"Move {name}"
    return (
        f"{unpack} to {os.path.dirname(os.path.abspath(folder))}, so that {name}/Annotations, "
        f"{name}/ImageSets/Main and {name}/JPEGImages stand there; the environment variable DETECTRON2_DATASETS names "
        "another folder"
    )
