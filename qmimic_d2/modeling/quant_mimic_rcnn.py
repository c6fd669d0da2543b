"""The student in training: an R-CNN that imitates a frozen, quantized teacher inside its regions."""

from typing import List, Optional

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import Res5ROIHeads, RROIHeads
from detectron2.structures import Boxes
from torch import Tensor

from qmimic_d2.modeling.mimic_student import MimicStudent
from qmimic_d2.modeling.quant_rcnn import QuantRCNN
from qmimic_d2.modeling.roi_pooling import is_same_pooling
from qmimic_d2.modeling.rois import ROI_SOURCES, sources_of

__all__ = ["QuantMimicRCNN"]


@META_ARCH_REGISTRY.register()
class QuantMimicRCNN(MimicStudent, QuantRCNN):
    """
    :class:`QuantRCNN` with a teacher beside it and ``loss_mimic`` among its losses.

    With ``MODEL.QMIMIC.TEACHER.CONFIG_FILE`` "" it is :class:`QuantRCNN`.
    """

    head_names = ("proposal_generator", "roi_heads")
    roi_sources = tuple(ROI_SOURCES)

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: of :class:`MimicStudent` and :class:`QuantRCNN`.

        Raises:
            ValueError: as these do, or the RoI heads keep the regions that the mimic is to look at.
        """
        super().__init__(**kwargs)
        if self._build_teacher is not None:
            self._check_regions()
        if self.mimic_loss is not None:
            self._record.watch_roi_heads(self.roi_heads)

    def _check_regions(self) -> None:
        if isinstance(self.proposal_generator, RRPN) or isinstance(self.roi_heads, RROIHeads):
            raise ValueError(
                "MODEL.PROPOSAL_GENERATOR.NAME or MODEL.ROI_HEADS.NAME gives rotated boxes "
                f"({type(self.proposal_generator).__name__}, {type(self.roi_heads).__name__}), and the mimic pools "
                "upright ones; set them to 'RPN' and 'StandardROIHeads', or train without a teacher: "
                "MODEL.QMIMIC.TEACHER.CONFIG_FILE ''"
            )
        if "sampled" in sources_of(self.roi_source) and isinstance(self.roi_heads, Res5ROIHeads):
            raise ValueError(
                'MODEL.QMIMIC.MIMIC.ROI_SOURCE is "sampled", but Res5ROIHeads keeps its sampled proposals to '
                'itself; set it to "proposals" or "ground_truth"'
            )

    @classmethod
    def from_config(cls, cfg: CfgNode):
        args = super().from_config(cfg)
        return {**args, **cls.mimic_arguments(cfg, args["backbone"])}

    def _already_pooled(self, boxes: List[Boxes]) -> Optional[Tensor]:
        """Rows of the box head's pooled tensor; None where it pooled another map, other regions or otherwise."""
        names = self.mimic_loss.student_features
        if self._record.box_pooling is None or self.roi_source != "sampled" or len(names) != 1:
            return None
        maps, pooled_boxes, pooled = self._record.box_pooling
        sampled = [instances.proposal_boxes for instances in self._record.regions.sampled]
        is_same = (
            len(maps) == 1
            and maps[0] is self._record.maps[names[0]]
            and len(pooled_boxes) == len(sampled)
            and all(ours is theirs for ours, theirs in zip(sampled, pooled_boxes))
            and is_same_pooling(self.mimic_loss.pooler, self.roi_heads.box_pooler)
        )
        if not is_same:
            return None
        counts = [len(each) for each in sampled]
        if counts == [len(each) for each in boxes]:
            return pooled
        return torch.cat([rows[: len(each)] for rows, each in zip(pooled.split(counts), boxes)])
