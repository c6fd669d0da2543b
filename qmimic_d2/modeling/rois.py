"""
Where the mimic looks: the regions of interest of a training step.

Shape letters:
    N: number of images.
    R: number of regions of one image.
"""

from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional

from detectron2.structures import Boxes, Instances

__all__ = ["ROI_SOURCES", "TrainingRegions", "select_rois"]


@dataclass
class TrainingRegions:
    """
    The regions that one training step of an R-CNN knows of, one Instances per image.

    Boxes are (x0, y0, x1, y1) in pixels of the student's input image.
    """

    # Proposals that the RoI heads sampled for their losses, foreground first.
    sampled: List[Instances] = field(default_factory=list)
    # All proposals of the proposal generator, by falling score.
    proposals: List[Instances] = field(default_factory=list)
    # Annotations.
    ground_truth: Optional[List[Instances]] = None


def _sampled(regions: TrainingRegions) -> List[Boxes]:
    if not regions.sampled:
        raise ValueError(
            'MODEL.QMIMIC.MIMIC.ROI_SOURCE is "sampled", but the RoI heads return no sampled proposals '
            'in training (StandardROIHeads, its subclasses and RFCNROIHeads do); use "proposals" or "ground_truth"'
        )
    return [instances.proposal_boxes for instances in regions.sampled]


def _proposals(regions: TrainingRegions) -> List[Boxes]:
    return [instances.proposal_boxes for instances in regions.proposals]


def _ground_truth(regions: TrainingRegions) -> List[Boxes]:
    return [instances.gt_boxes for instances in regions.ground_truth or []]


# Values of MODEL.QMIMIC.MIMIC.ROI_SOURCE.
ROI_SOURCES: Dict[str, Callable[[TrainingRegions], List[Boxes]]] = {
    "sampled": _sampled,
    "proposals": _proposals,
    "ground_truth": _ground_truth,
}


def select_rois(source: str, regions: TrainingRegions, max_per_image: int = 0) -> List[Boxes]:
    """
    The regions that the mimic loss compares.

    Args:
        source: a key of :data:`ROI_SOURCES`.
        regions: what the training step knows of.
        max_per_image: most regions per image, the first ones of the source; 0 = all. Taking the
            first draws no random number, so that a run with the mimic and one without sample alike.

    Returns:
        N Boxes of shape (R, 4), R from 0 to ``max_per_image``, detached.
    """
    boxes = [Boxes(each.tensor.detach()) for each in ROI_SOURCES[source](regions)]
    if max_per_image:
        boxes = [each[:max_per_image] for each in boxes]
    return boxes
