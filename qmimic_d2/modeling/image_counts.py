"""The check that maps and boxes belong to the same images, before regions are read from them."""

from typing import Dict, Iterable, List, Sequence

from detectron2.structures import Boxes
from torch import Tensor

__all__ = ["check_boxes", "check_counts", "check_maps", "named"]

_ADVICE = (
    "A backbone with branches, such as TridentNet's in training, gives several maps of an image: compare a map in "
    "front of the branches (MODEL.QMIMIC.MIMIC.IN_FEATURES) at annotated boxes (MIMIC.ROI_SOURCE 'ground_truth'), or "
    "take one branch (MODEL.TRIDENT.NUM_BRANCH 1 with one of BRANCH_DILATIONS and TEST_BRANCH_IDX 0; for a teacher "
    "MODEL.TRIDENT.TEST_BRANCH_IDX 1 in MODEL.QMIMIC.TEACHER.OPTS)"
)


def check_maps(maps_of: Dict[str, Dict[str, Tensor]], num_images: int) -> None:
    """
    Args:
        maps_of: compared maps of shape (N, C, H, W), by name; those of "student", of "teacher" or of both.
        num_images: N, of the boxes or of the input.

    Raises:
        ValueError: a map covers another number of images; names every map and its number.
    """
    counts = {
        f"the {whose}'s map {name!r}": len(each) for whose, maps in maps_of.items() for name, each in maps.items()
    }
    if any(count != num_images for count in counts.values()):
        covered = ", ".join(f"{what} covers {count}" for what, count in counts.items())
        raise ValueError(f"boxes and sizes of {num_images} images do not fit the maps: {covered}. {_ADVICE}")


def named(maps: Dict[str, Tensor], names: Iterable[str]) -> Dict[str, Tensor]:
    """
    Returns:
        The maps of these names.

    Raises:
        ValueError: one of them is not there.
    """
    missing = [name for name in names if name not in maps]
    if missing:
        raise ValueError(
            f"the backbone gave no map {missing} in this step, but {sorted(maps)}: the mimic reads the student's maps "
            "in a forward hook of model.backbone, which has to be called in every training step"
        )
    return {name: maps[name] for name in names}


def check_boxes(boxes: Sequence[Boxes]) -> None:
    """
    Raises:
        ValueError: boxes that are not (x0, y0, x1, y1), such as rotated ones.
    """
    for index, each in enumerate(boxes):
        if each.tensor.dim() != 2 or each.tensor.shape[1] != 4:
            raise ValueError(
                f"the boxes of image {index} are {type(each).__name__} of shape {tuple(each.tensor.shape)}; the mimic "
                "pools at upright boxes (x0, y0, x1, y1) of shape (R, 4). Rotated boxes are not supported"
            )


def check_counts(counts: Dict[str, int], num_images: int) -> None:
    """
    Args:
        counts: number of images that something covers, by what it is.
        num_images: N.

    Raises:
        ValueError: one of them is not N; names it.
    """
    differing: List[str] = [f"{what} cover {count}" for what, count in counts.items() if count != num_images]
    if differing:
        raise ValueError(f"the step has {num_images} images, and {', '.join(differing)}. {_ADVICE}")
