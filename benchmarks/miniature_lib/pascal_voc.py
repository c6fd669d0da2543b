"""
Pascal VOC 2007 and 2012 in miniature: digits in the layout of the official development kit.

Detectron2's ``voc_2007_*`` and ``voc_2012_*`` load it as they load the real data. The twenty classes are the ten
digits, upright in the first ten and lying (the image turned clockwise by a quarter) in the others.
"""

import os
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Dict, List, Tuple

from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from miniature_lib.painting import Box, PaintedImage, covered_share, paint_images, publish
from qmimic_d2.data.digits.render import DigitsSpec

__all__ = ["make_miniature_voc"]

# Per year: split, whose handwriting, and the first image's number. VOC 2012's test set was never published.
_SPLITS: Dict[int, Tuple[Tuple[str, str], ...]] = {
    2007: (("train", "train"), ("val", "train"), ("test", "val")),
    2012: (("train", "train"), ("val", "train")),
}
_ID = {2007: "{:06d}", 2012: "2008_{:06d}"}
_SETTINGS = dict(image_size=160, digits_per_image=(5, 8), size=(20, 48))
# Of every so many images of an orientation, the first has a difficult object.
_DIFFICULT_PERIOD = 4


@dataclass(frozen=True)
class _Object:
    name: str
    box: Box
    is_difficult: bool
    is_occluded: bool


def make_miniature_voc(root: str, num_images: int = 40, seed: int = 0) -> List[str]:
    """
    Makes ``VOC2007`` and ``VOC2012``, unless they are there already.

    Args:
        root: folder for them, made if need be: DETECTRON2_DATASETS of who uses them.
        num_images: of each split, 8 or more.
        seed: of all randomness.

    Returns:
        The two folders.

    Raises:
        ValueError: a folder of that name holds something else, cannot be written, or the images are too few.
        ImportError: scikit-learn is needed and not installed.
    """
    folders = []
    for year in _SPLITS:
        folder = os.path.join(root, f"VOC{year}")
        settings = {"dataset": f"VOC{year}", "num_images": num_images, "seed": seed}
        publish(folder, settings, lambda partial, year=year: _write(partial, year, num_images, seed))
        folders.append(folder)
    return folders


def _write(folder: str, year: int, num_images: int, seed: int) -> None:
    for name in ("Annotations", os.path.join("ImageSets", "Main"), "JPEGImages"):
        os.makedirs(os.path.join(folder, name))
    splits: Dict[str, Dict[str, List[_Object]]] = {}
    first = 1
    for split, handwriting in _SPLITS[year]:
        spec = DigitsSpec(f"miniature_voc_{year}_{split}_{seed}", handwriting, num_images, **_SETTINGS)
        images = paint_images(spec, _has_every_class, is_turned=_is_turned)
        splits[split] = {}
        for index, image in enumerate(images):
            image_id = _ID[year].format(first + index)
            objects = _objects(index, image)
            splits[split][image_id] = objects
            with open(os.path.join(folder, "JPEGImages", f"{image_id}.jpg"), "wb") as file:
                file.write(image.jpeg)
            tree = _annotation(year, image_id, image, objects)
            tree.write(os.path.join(folder, "Annotations", f"{image_id}.xml"), encoding="utf-8")
        first += num_images
    splits["trainval"] = {**splits["train"], **splits["val"]}
    for split, content in splits.items():
        _write_image_sets(os.path.join(folder, "ImageSets", "Main"), split, content)


def _is_turned(index: int) -> bool:
    return index % 2 == 1


def _objects(index: int, image: PaintedImage) -> List[_Object]:
    difficult = -1
    if index // 2 % _DIFFICULT_PERIOD == 0:
        difficult = min(range(len(image.objects)), key=lambda number: _area(image.objects[number][1]))
    offset = 10 if _is_turned(index) else 0
    return [
        _Object(CLASS_NAMES[digit + offset], box, number == difficult, covered_share(image, number) > 0.0)
        for number, (digit, box) in enumerate(image.objects)
    ]


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _has_every_class(images: List[PaintedImage]) -> bool:
    """Else the AP of a class would be undefined; difficult objects do not count in it."""
    objects = [each for index, image in enumerate(images) for each in _objects(index, image)]
    return {each.name for each in objects if not each.is_difficult} == set(CLASS_NAMES)


def _annotation(year: int, image_id: str, image: PaintedImage, objects: List[_Object]) -> ET.ElementTree:
    root = ET.Element("annotation")
    _add(root, folder=f"VOC{year}", filename=f"{image_id}.jpg")
    _add(ET.SubElement(root, "source"), database="miniature", annotation="qmimic_d2", image="digits")
    _add(ET.SubElement(root, "size"), width=image.width, height=image.height, depth=3)
    _add(root, segmented=0)
    for each in objects:
        # Whole digits stand in the image, so none is truncated.
        node = ET.SubElement(root, "object")
        _add(node, name=each.name, pose="Unspecified", truncated=0)
        if year == 2012:
            _add(node, occluded=int(each.is_occluded))
        _add(node, difficult=int(each.is_difficult))
        x0, y0, x1, y1 = each.box
        # Pascal counts pixels from 1, and both corners belong to the box.
        _add(ET.SubElement(node, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ET.indent(root, space="\t")
    return ET.ElementTree(root)


def _add(parent: ET.Element, **values) -> None:
    for tag, value in values.items():
        ET.SubElement(parent, tag).text = str(value)


def _write_image_sets(folder: str, split: str, content: Dict[str, List[_Object]]) -> None:
    _write_lines(os.path.join(folder, f"{split}.txt"), list(content))
    for name in CLASS_NAMES:
        lines = []
        for image_id, objects in content.items():
            of_class = [each for each in objects if each.name == name]
            # 0: there are difficult ones only
            flag = (0 if all(each.is_difficult for each in of_class) else 1) if of_class else -1
            lines.append(f"{image_id} {flag:2d}")
        _write_lines(os.path.join(folder, f"{name}_{split}.txt"), lines)


def _write_lines(path: str, lines: List[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(lines) + "\n")
