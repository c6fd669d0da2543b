"""Pascal VOC's files, looked for before Detectron2's loader stumbles over one that is missing."""

import os
from typing import List

__all__ = ["check_pascal_voc"]

# As on http://host.robots.ox.ac.uk/pascal/VOC/, by year and by split ("" for the others).
_ARCHIVES = {
    (2007, "test"): "VOCtest_06-Nov-2007.tar",
    (2007, ""): "VOCtrainval_06-Nov-2007.tar",
    (2012, ""): "VOCtrainval_11-May-2012.tar",
}


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
    path = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {path!r}. {_what_to_do(folder, split, year)}")
    with open(path, encoding="utf-8") as file:
        ids = file.read().split()
    if not ids:
        raise ValueError(f"{path!r} lists no image. {_what_to_do(folder, split, year)}")
    for part, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        missing = _missing(os.path.join(folder, part), [each + suffix for each in ids])
        if missing:
            raise FileNotFoundError(
                f"{path!r} lists {len(ids)} images, and {len(missing)} files of them are missing, the first "
                f"{os.path.join(folder, part, missing[0])!r}. {_what_to_do(folder, split, year)}"
            )


def _missing(folder: str, names: List[str]) -> List[str]:
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return [name for name in names if name not in there]


def _what_to_do(folder: str, split: str, year: int) -> str:
    name = os.path.basename(folder)
    archive = _ARCHIVES.get((year, split), _ARCHIVES.get((year, "")))
    unpack = f"Unpack {archive} and move its VOCdevkit/{name}" if archive else f"Move {name}"
    return (
        f"{unpack} to {os.path.dirname(os.path.abspath(folder))}, so that {name}/Annotations, "
        f"{name}/ImageSets/Main and {name}/JPEGImages stand there; the environment variable DETECTRON2_DATASETS names "
        "another folder"
    )
