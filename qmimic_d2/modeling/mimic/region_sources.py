"""
Where the mimic looks: the regions of interest of a training step.

Shape letters:
    N: number of images.
    R: number of regions of one image.
"""

from dataclasses import dataclass, field
from typing import List, Optional, Sequence, Tuple

import torch
from detectron2.structures import Boxes, Instances
from fvcore.common.registry import Registry

__all__ = [
    "ONE_MAP_PER_IMAGE",
    "ROI_SOURCE_REGISTRY",
    "WHOLE_MAP",
    "TrainingRegions",
    "check_boxes",
    "check_roi_source",
    "roi_source_names",
    "select_rois",
]

# The entry of MODEL.QMIMIC.MIMIC.ROI_SOURCE that compares whole maps, cell by cell, and no region.
WHOLE_MAP = "whole_map"

_KEY = "MODEL.QMIMIC.MIMIC.ROI_SOURCE"

# What to do where maps or regions cover another number of images than the step has.
ONE_MAP_PER_IMAGE = (
    "A backbone with branches, such as TridentNet's in training, gives several maps of an image: compare a map in "
    "front of the branches (MODEL.QMIMIC.MIMIC.IN_FEATURES) at annotated boxes (MIMIC.ROI_SOURCE 'ground_truth'), or "
    "take one branch (MODEL.TRIDENT.NUM_BRANCH 1 with one of BRANCH_DILATIONS and TEST_BRANCH_IDX 0; for a teacher "
    "MODEL.TRIDENT.TEST_BRANCH_IDX 1 in MODEL.QMIMIC.TEACHER.OPTS)"
)


@dataclass
class TrainingRegions:
    """
    The regions of one training step of a detector, one entry per image.

    Boxes are (x0, y0, x1, y1) in pixels of the student's input image.

    Attributes:
        sampled: proposals that the RoI heads sampled for their losses, foreground first.
        proposals: all proposals of the student's generator, by falling score.
        teacher_proposals: all of the teacher's.
        ground_truth: annotated boxes.
        image_sizes: height and width of each image in pixels.
        jitter: largest shift of a neighbour of an annotated box and largest change of its sides, as a share of
            the box's own sides.
        num_neighbours: of each annotated box.
        seed: of the neighbours' own generator. Runs with and without the mimic therefore sample the same proposals.
    """

    sampled: List[Instances] = field(default_factory=list)
    proposals: List[Instances] = field(default_factory=list)
    teacher_proposals: List[Boxes] = field(default_factory=list)
    ground_truth: List[Boxes] = field(default_factory=list)
    image_sizes: List[Tuple[int, int]] = field(default_factory=list)
    jitter: float = 0.0
    num_neighbours: int = 0
    seed: int = 0


ROI_SOURCE_REGISTRY = Registry("ROI_SOURCE")
ROI_SOURCE_REGISTRY.__doc__ = """
Registry of region sources: functions of the :class:`TrainingRegions` of a step that return N Boxes of shape (R, 4).
``MODEL.QMIMIC.MIMIC.ROI_SOURCE`` lists their names.
"""


@ROI_SOURCE_REGISTRY.register()
def sampled(regions: TrainingRegions) -> List[Boxes]:
    """The proposals that the RoI heads sampled; a ValueError if they return none."""
    if not regions.sampled:
        raise ValueError(
            f"{_KEY} has 'sampled', but the RoI heads return no sampled proposals in training (StandardROIHeads, its "
            "subclasses and RFCNROIHeads do); use 'proposals' or 'ground_truth'"
        )
    return [instances.proposal_boxes for instances in regions.sampled]


@ROI_SOURCE_REGISTRY.register()
def proposals(regions: TrainingRegions) -> List[Boxes]:
    """All proposals of the student; a ValueError if the detector gave none."""
    if not regions.proposals and regions.image_sizes:
        raise ValueError(
            f"{_KEY} has 'proposals', but the detector gave none in this step; use 'ground_truth' or 'neighbourhood'"
        )
    return [instances.proposal_boxes for instances in regions.proposals]


@ROI_SOURCE_REGISTRY.register()
def teacher_proposals(regions: TrainingRegions) -> List[Boxes]:
    """All proposals of the teacher."""
    return regions.teacher_proposals


@ROI_SOURCE_REGISTRY.register()
def ground_truth(regions: TrainingRegions) -> List[Boxes]:
    """The annotated boxes."""
    return regions.ground_truth


@ROI_SOURCE_REGISTRY.register()
def neighbourhood(regions: TrainingRegions) -> List[Boxes]:
    """Each annotated box and, after all of them, its neighbours: boxes near it, of about its size."""
    generator = torch.Generator().manual_seed(regions.seed)
    found = []
    for boxes, size in zip(regions.ground_truth, regions.image_sizes):
        neighbours = _neighbours(boxes, regions.jitter, regions.num_neighbours, generator)
        neighbours.clip(size)
        found.append(Boxes.cat([boxes, neighbours]))
    return found


def roi_source_names() -> List[str]:
    """Every registered source, in the order of registration."""
    return [name for name, _ in ROI_SOURCE_REGISTRY]


def check_roi_source(sources: Sequence[str], available: Optional[Sequence[str]] = None) -> None:
    """
    Args:
        sources: a value of ``MODEL.QMIMIC.MIMIC.ROI_SOURCE``.
        available: those that the detector has; None = all.

    Raises:
        ValueError: it is neither ``[WHOLE_MAP]`` nor one or more available sources, each once.
    """
    available = sorted(roi_source_names() if available is None else available)
    is_list = isinstance(sources, Sequence) and not isinstance(sources, str)
    if is_list and list(sources) == [WHOLE_MAP]:
        return
    if not is_list or not sources or not set(sources) <= set(available) or len(set(sources)) < len(sources):
        given = list(sources) if is_list else sources
        raise ValueError(f"{_KEY} is {given!r}; give a list with one or more of {available}, or {[WHOLE_MAP]}")


def select_rois(sources: Sequence[str], regions: TrainingRegions, max_per_image: int = 0) -> List[Boxes]:
    """
    The regions that the mimic loss compares.

    Args:
        sources: names in :data:`ROI_SOURCE_REGISTRY`; the regions are their union, in that order.
        regions: of the training step.
        max_per_image: most regions per image; 0 = all. The first ones of the union are kept, which draws no random
            number: runs with and without the mimic sample the same proposals.

    Returns:
        N Boxes of shape (R, 4), R from 0 to ``max_per_image``, detached.

    Raises:
        ValueError: a source covers another number of images than the step has, or its boxes are rotated.
    """
    parts = {part: ROI_SOURCE_REGISTRY.get(part)(regions) for part in sources}
    num_images = len(regions.image_sizes) or len(next(iter(parts.values())))
    counts = {f"the regions of {_KEY} {part!r}": len(boxes) for part, boxes in parts.items()}
    differing = [f"{what} cover {count}" for what, count in counts.items() if count != num_images]
    if differing:
        raise ValueError(f"the step has {num_images} images, and {', '.join(differing)}. {ONE_MAP_PER_IMAGE}")
    for boxes in parts.values():
        check_boxes(boxes)
    union = [torch.cat([boxes.tensor.detach() for boxes in of_image]) for of_image in zip(*parts.values())]
    return [Boxes(each[:max_per_image] if max_per_image else each) for each in union]


def check_boxes(boxes: Sequence[Boxes]) -> None:
    """
    Raises:
        ValueError: boxes are not (x0, y0, x1, y1), such as rotated ones.
    """
    for index, each in enumerate(boxes):
        if each.tensor.dim() != 2 or each.tensor.shape[1] != 4:
            raise ValueError(
                f"the boxes of image {index} are {type(each).__name__} of shape {tuple(each.tensor.shape)}; the mimic "
                "pools at upright boxes (x0, y0, x1, y1) of shape (R, 4). Rotated boxes are not supported"
            )


def _neighbours(boxes: Boxes, jitter: float, count: int, generator: torch.Generator) -> Boxes:
    """``count`` for each of R boxes, shape (count * R, 4); the first R are one neighbour of each."""
    shape = (count, len(boxes), 2)
    # drawn on the CPU, so that every device gets the same neighbours
    shift = (2.0 * torch.rand(shape, generator=generator) - 1.0).mul_(jitter).to(boxes.device)
    growth = (2.0 * torch.rand(shape, generator=generator) - 1.0).mul_(jitter).to(boxes.device)
    tensor = boxes.tensor.detach()
    sides = tensor[:, 2:] - tensor[:, :2]
    centers = (tensor[:, 2:] + tensor[:, :2]) / 2.0 + shift * sides
    halves = (1.0 + growth) * sides / 2.0
    return Boxes(torch.cat([centers - halves, centers + halves], dim=-1).view(-1, 4))
