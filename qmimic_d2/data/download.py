"""
Downloads Pascal VOC and WIDER FACE by torchvision's dataset classes, into the layout that the shipped configs read.

Archives and what is unpacked of them stand in ``downloads`` below the root until every file of a part is in its place.
A file gets there by renaming, so that an interruption leaves no half of one.
"""

import os
import shutil
import zipfile
from typing import Callable, List

from torchvision.datasets import VOCDetection, WIDERFace
from torchvision.datasets.utils import check_integrity, download_and_extract_archive, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT

from qmimic_d2.data.pascal_voc import check_pascal_voc
from qmimic_d2.data.wider_face.registration import FOLDER, GROUND_TRUTH, load_wider_face

__all__ = ["VOC_PARTS", "DownloadError", "download_pascal_voc", "download_wider_face"]

# Below the root; archives of Pascal VOC stand in it, those of WIDER FACE in its folder "widerface".
_DOWNLOADS = "downloads"
# Year and split of each archive that the shipped configs need.
VOC_PARTS = ((2007, "trainval"), (2007, "test"), (2012, "trainval"))
# torchvision does not know it. There is no official checksum.
_EVAL_TOOLS = "http://shuoyang1213.me/WIDERFACE/support/eval_script/eval_tools.zip"
_TABLES = ("face", "easy", "medium", "hard")


class DownloadError(RuntimeError):
    """An archive cannot be fetched or unpacked; names it."""


def download_pascal_voc(root: str, year: int, split: str) -> bool:
    """
    Args:
        root: gets ``VOC2007`` or ``VOC2012``.
        year, split: one of :data:`VOC_PARTS`.

    Returns:
        Whether something was fetched or unpacked; False where every file is there.

    Raises:
        DownloadError: the archive cannot be fetched or unpacked.
        FileNotFoundError, ValueError: it is unpacked, and something is missing all the same.
    """
    folder = os.path.join(root, f"VOC{year}")
    if _is_whole(lambda: check_pascal_voc(folder, split, year)):
        return False
    downloads = os.path.join(root, _DOWNLOADS)
    unpacked = os.path.join(downloads, "VOCdevkit")
    shutil.rmtree(unpacked, ignore_errors=True)  # of an interrupted run
    archive = DATASET_YEAR_DICT[f"{year}-test" if split == "test" else str(year)]["filename"]
    _fetch(archive, downloads, lambda: VOCDetection(downloads, str(year), split, download=True))
    _move(os.path.join(unpacked, f"VOC{year}"), folder)
    check_pascal_voc(folder, split, year)
    shutil.rmtree(unpacked)
    os.remove(os.path.join(downloads, archive))
    return True


def download_wider_face(root: str) -> List[str]:
    """
    Args:
        root: gets ``widerface``.

    Returns:
        What was fetched or unpacked, of "wider_face_split", "WIDER_train", "WIDER_val" and "eval_tools".

    Raises:
        DownloadError, FileNotFoundError, ValueError: as for :func:`download_pascal_voc`.
    """
    folder, downloads = os.path.join(root, FOLDER), os.path.join(root, _DOWNLOADS, FOLDER)
    done = []
    split_folder = os.path.join(folder, "wider_face_split")
    annotations = [os.path.join(split_folder, f"wider_face_{split}_bbx_gt.txt") for split in ("train", "val")]
    if not all(map(os.path.isfile, annotations)):
        _fetch_wider_face(root, [], "wider_face_split")
        done.append("wider_face_split")
    for annotation_file, archive in zip(annotations, WIDERFace.FILE_LIST):  # train, val; the test set has no boxes
        part = os.path.splitext(archive[2])[0]
        images = os.path.join(folder, part, "images")
        if _is_whole(lambda file=annotation_file, images=images: load_wider_face(file, images)):
            continue
        _fetch_wider_face(root, [archive], part)
        load_wider_face(annotation_file, images)
        os.remove(os.path.join(downloads, archive[2]))
        done.append(part)
    tables = [os.path.join(folder, GROUND_TRUTH, f"wider_{each}_val.mat") for each in _TABLES]
    if not all(map(os.path.isfile, tables)):
        _fetch_eval_tools(downloads)
        _move(os.path.join(downloads, "eval_tools"), os.path.join(folder, "eval_tools"))
        done.append("eval_tools")
    shutil.rmtree(downloads, ignore_errors=True)
    return done


def _fetch_wider_face(root: str, archives: List[tuple], part: str) -> None:
    """torchvision's class always adds the annotations, which are small."""
    downloads = os.path.join(root, _DOWNLOADS, FOLDER)
    for name in ("wider_face_split", part):
        shutil.rmtree(os.path.join(downloads, name), ignore_errors=True)
    missing = []
    for archive in archives:  # torchvision wants the package gdown even where the archive is there
        if check_integrity(os.path.join(downloads, archive[2]), archive[1]):
            extract_archive(os.path.join(downloads, archive[2]))
        else:
            missing.append(archive)
    wanted = type("WIDERFaceInPart", (WIDERFace,), {"FILE_LIST": missing})
    _fetch(f"{part}.zip", downloads, lambda: wanted(os.path.join(root, _DOWNLOADS), download=True))
    for name in dict.fromkeys(("wider_face_split", part)):
        _move(os.path.join(downloads, name), os.path.join(root, FOLDER, name))


def _fetch_eval_tools(downloads: str) -> None:
    path = os.path.join(downloads, "eval_tools.zip")
    if os.path.exists(path) and not zipfile.is_zipfile(path):  # half of one, which torchvision would take for whole
        os.remove(path)
    _fetch("eval_tools.zip", downloads, lambda: download_and_extract_archive(_EVAL_TOOLS, downloads))


def _is_whole(check: Callable[[], object]) -> bool:
    try:
        check()
    except (FileNotFoundError, ValueError):
        return False
    return True


def _fetch(archive: str, downloads: str, fetch: Callable[[], object]) -> None:
    try:
        fetch()
    except Exception as error:  # torchvision, gdown, the network and the archives each raise their own
        raise DownloadError(
            f"{archive} cannot be downloaded or unpacked: {type(error).__name__}: {error}. Run the command again: it "
            f"goes on with what is missing. Or put {archive} into {os.path.abspath(downloads)} yourself, and run it "
            "again"
        ) from error


def _move(source: str, target: str) -> None:
    """Every file of a folder into another one, which may have some of them."""
    for parent, _, names in os.walk(source):
        place = os.path.join(target, os.path.relpath(parent, source))
        os.makedirs(place, exist_ok=True)
        for name in names:
            os.replace(os.path.join(parent, name), os.path.join(place, name))
