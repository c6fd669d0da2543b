"""The student in training: an R-CNN that imitates a frozen, quantized teacher inside its regions."""

import functools
import logging
from typing import Callable, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.roi_heads import Res5ROIHeads, ROIHeads
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from qmimic_d2.modeling.feature_comparison import FeatureComparison
from qmimic_d2.modeling.mimic import RoIMimicLoss
from qmimic_d2.modeling.quant_rcnn import QuantRCNN
from qmimic_d2.modeling.quantizer_hook import check_features
from qmimic_d2.modeling.roi_pooling import is_same_pooling
from qmimic_d2.modeling.rois import ROI_SOURCES, TrainingRegions, select_rois
from qmimic_d2.modeling.teacher import FrozenTeacher, teacher_shapes
from qmimic_d2.modeling.weighting import MimicWeight

__all__ = ["QuantMimicRCNN"]


class _StepRecord:
    """
    What one training step of the R-CNN computes on its way and the mimic needs.

    Filled by forward hooks, so that Detectron2's own forward runs as it is; emptied after the step, so
    that no graph outlives it.
    """

    def __init__(self):
        self.is_recording = False
        self.clear()

    def clear(self) -> None:
        self.maps: Dict[str, Tensor] = {}
        self.regions = TrainingRegions()
        # what the box head's pooler was given (maps, boxes of each image), and what it returned
        self.box_pooling: Optional[Tuple[List[Tensor], List[Boxes], Tensor]] = None

    def __enter__(self) -> "_StepRecord":
        self.is_recording = True
        return self

    def __exit__(self, *exc_info) -> None:
        self.is_recording = False
        self.clear()

    def on_backbone(self, backbone: nn.Module, inputs, output) -> None:
        if self.is_recording:
            self.maps = dict(output)

    def on_roi_heads(self, roi_heads: nn.Module, inputs, output) -> None:
        if self.is_recording:
            _, _, proposals, *ground_truth = inputs
            self.regions = TrainingRegions(
                sampled=list(output[0]),
                proposals=list(proposals),
                ground_truth=ground_truth[0] if ground_truth else None,
            )

    def on_box_pooler(self, pooler: nn.Module, inputs, output) -> None:
        # a cascade pools once per stage; the first pools the sampled proposals
        if self.is_recording and self.box_pooling is None and len(inputs) == 2:
            self.box_pooling = (*inputs, output)


@META_ARCH_REGISTRY.register()
class QuantMimicRCNN(QuantRCNN):
    """
    :class:`QuantRCNN` with a teacher beside it and ``loss_mimic`` among its losses.

    The teacher is no submodule (see :class:`FrozenTeacher`). It is built and audited when training
    begins: by ``train()`` on a new model, as Detectron2's trainers call it, or at the latest by the first
    training forward. A model that only evaluates never reads the teacher's weights and needs none of
    its files.

    With ``MODEL.QMIMIC.TEACHER.CONFIG_FILE`` "" it is :class:`QuantRCNN`.
    """

    @configurable
    def __init__(
        self,
        *,
        mimic_loss: Optional[RoIMimicLoss] = None,
        build_teacher: Optional[Callable[[], FrozenTeacher]] = None,
        weight: Optional[MimicWeight] = None,
        roi_source: str = "sampled",
        max_rois_per_image: int = 0,
        diagnostics_period: int = 20,
        **kwargs,
    ):
        """
        Args:
            mimic_loss: L_m between the student's and the teacher's maps; None: no mimic, or the
                teacher's config is not there (``build_teacher`` then says so).
            build_teacher: called once, when training begins; None: the mimic is off.
            weight: lambda over time.
            roi_source: a key of :data:`ROI_SOURCES`.
            max_rois_per_image: most regions per image; 0 = all.
            diagnostics_period: iterations between two comparisons of student and teacher; 0 = never.
            kwargs: of :class:`QuantRCNN`.

        Raises:
            ValueError: an option is unknown or out of range, or ``mimic_loss`` has no teacher.
        """
        super().__init__(**kwargs)
        if mimic_loss is not None and build_teacher is None:
            raise ValueError(f"{type(self).__name__} got a mimic_loss and no build_teacher; give both or none")
        _check_regions(roi_source, max_rois_per_image)
        if build_teacher is not None:
            _check_keeps_regions(roi_source, self.roi_heads)
        if diagnostics_period < 0:
            raise ValueError(
                f"MODEL.QMIMIC.DIAGNOSTICS.PERIOD is {diagnostics_period}; give iterations >= 0 (0 = never)"
            )
        self.mimic_loss = mimic_loss
        self.weight = weight or MimicWeight(1.0)
        self.roi_source = roi_source
        self.max_rois_per_image = max_rois_per_image
        self.diagnostics_period = diagnostics_period
        self._build_teacher = build_teacher
        self._teacher: Optional[FrozenTeacher] = None
        self._has_warned = False
        self._record = _StepRecord()
        if mimic_loss is not None:
            self._register_recording()

    @classmethod
    def from_config(cls, cfg: CfgNode):
        args = super().from_config(cfg)
        node = cfg.MODEL.QMIMIC.MIMIC
        args.update(
            weight=MimicWeight(node.LOSS_WEIGHT, node.SCHEDULE, node.WARMUP_ITERS),
            roi_source=node.ROI_SOURCE,
            max_rois_per_image=node.MAX_ROIS_PER_IMAGE,
            diagnostics_period=cfg.MODEL.QMIMIC.DIAGNOSTICS.PERIOD,
        )
        if cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE:
            args["build_teacher"] = functools.partial(FrozenTeacher, cfg)
            args["mimic_loss"] = _build_mimic_loss(cfg, args["backbone"])
        return args

    @property
    def teacher(self) -> Optional[FrozenTeacher]:
        """The frozen teacher; None before training begins, and where there is none."""
        return self._teacher

    def train(self, mode: bool = True) -> "QuantMimicRCNN":
        """As ``nn.Module.train``; on a new model it builds the teacher, so that errors come early."""
        # An evaluation that ends with train(), as Detectron2's does, is no beginning of a training.
        begins = mode and self.training
        super().train(mode)
        if begins:
            self._prepare_training()
        return self

    def forward(self, batched_inputs: List[Dict[str, Tensor]]):
        """As :meth:`GeneralizedRCNN.forward`; the training losses hold ``loss_mimic`` as well."""
        if not self.training:
            return super().forward(batched_inputs)
        self._prepare_training()
        if self.mimic_loss is None:
            return super().forward(batched_inputs)
        with self._record:
            losses = super().forward(batched_inputs)
            losses.update(self._mimic_losses(batched_inputs))
        return losses

    @torch.no_grad()
    def compare(self, batched_inputs: List[Dict[str, Tensor]], boxes: List[Boxes]) -> Dict[str, FeatureComparison]:
        """
        How alike student and teacher are inside given regions, in the mode that the model is in.

        Compared is what the mimic loss compares: r of the student's map as it was before its quantizer.

        Args:
            batched_inputs: N dicts as Detectron2's ``DatasetMapper`` makes them; "image" is read.
            boxes: N Boxes in pixels of these images.

        Returns:
            By name of the student's map.

        Raises:
            ValueError: there is no teacher yet; training begins with one.
        """
        if self._teacher is None:
            raise ValueError("this model has no teacher to be compared with; call train() first, which loads it")
        with self._record:
            self.backbone(self.preprocess_image(batched_inputs).tensor)
            return self.mimic_loss.compare(self._record.maps, self._teacher.features(batched_inputs), boxes)

    def _apply(self, *args, **kwargs):
        module = super()._apply(*args, **kwargs)
        if self._teacher is not None:
            self._teacher.to(self.device)
        return module

    def _prepare_training(self) -> None:
        if self._build_teacher is None:
            if not self._has_warned:
                self._has_warned = True
                logging.getLogger(__name__).warning(
                    "MODEL.QMIMIC.TEACHER.CONFIG_FILE is '': training without a teacher, the mimic is off"
                )
        elif self._teacher is None:
            teacher = self._build_teacher().to(self.device)
            if self.mimic_loss is None:
                raise ValueError(
                    "MODEL.QMIMIC.TEACHER.CONFIG_FILE was not found when this model was built, and is there "
                    "now; build the model again to train it"
                )
            self._teacher = teacher

    def _mimic_losses(self, batched_inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        iteration = get_event_storage().iter
        weight = self.weight.at(iteration)
        measure = self.diagnostics_period > 0 and iteration % self.diagnostics_period == 0
        losses = {}
        if weight > 0.0 or measure:
            with torch.set_grad_enabled(weight > 0.0 and torch.is_grad_enabled()):
                losses = self._compare(batched_inputs, measure)
        if weight > 0.0:
            return {name: loss * weight for name, loss in losses.items()}
        return self.mimic_loss.zeros(self._record.maps)

    def _compare(self, batched_inputs, measure: bool) -> Dict[str, Tensor]:
        boxes = select_rois(self.roi_source, self._record.regions, self.max_rois_per_image)
        return self.mimic_loss(
            self._record.maps,
            self._teacher.features(batched_inputs),
            boxes,
            student_pooled=self._pooled_by_box_head(boxes),
            measure=measure,
        )

    def _pooled_by_box_head(self, boxes: List[Boxes]) -> Optional[Tensor]:
        """
        Rows of the box head's pooled tensor that belong to the chosen regions, shape (M, C, P, P).

        None where the box head pooled another map, other regions or otherwise than the mimic does.
        """
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

    def _register_recording(self) -> None:
        # In front of the quantizer's hook: the mimic compares r of the map as it was before.
        self.backbone.register_forward_hook(self._record.on_backbone, prepend=True)
        self.roi_heads.register_forward_hook(self._record.on_roi_heads)
        box_pooler = getattr(self.roi_heads, "box_pooler", None)
        if isinstance(box_pooler, nn.Module):
            box_pooler.register_forward_hook(self._record.on_box_pooler)


def _build_mimic_loss(cfg: CfgNode, backbone: Backbone) -> Optional[RoIMimicLoss]:
    node = cfg.MODEL.QMIMIC.MIMIC
    names = node.IN_FEATURES or cfg.MODEL.ROI_HEADS.IN_FEATURES
    available = backbone.output_shape()
    check_features(names, available, "MODEL.QMIMIC.MIMIC.IN_FEATURES")
    student_shapes: Dict[str, ShapeSpec] = {name: available[name] for name in names}
    try:
        shapes = teacher_shapes(cfg)
    except FileNotFoundError as error:
        # An evaluation needs no teacher; training raises this error again.
        logging.getLogger(__name__).info("no teacher, so this model can only evaluate: %s", error)
        return None
    # The adapter's initial weights must not shift the random numbers of the rest of the training:
    # variants of one seed sample alike.
    with torch.random.fork_rng(devices=[]):
        return RoIMimicLoss(cfg, student_shapes, shapes)


def _check_regions(roi_source: str, max_rois_per_image: int) -> None:
    if roi_source not in ROI_SOURCES:
        raise ValueError(
            f"MODEL.QMIMIC.MIMIC.ROI_SOURCE is {roi_source!r}; choose one of {sorted(ROI_SOURCES)}"
        )
    if max_rois_per_image < 0:
        raise ValueError(
            f"MODEL.QMIMIC.MIMIC.MAX_ROIS_PER_IMAGE is {max_rois_per_image}; give a number >= 0 (0 = all)"
        )


def _check_keeps_regions(roi_source: str, roi_heads: ROIHeads) -> None:
    if roi_source == "sampled" and isinstance(roi_heads, Res5ROIHeads):
        raise ValueError(
            'MODEL.QMIMIC.MIMIC.ROI_SOURCE is "sampled", but Res5ROIHeads keeps its sampled proposals to '
            'itself; set it to "proposals" or "ground_truth"'
        )
