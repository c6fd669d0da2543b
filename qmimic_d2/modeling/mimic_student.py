"""A detector in training with a teacher beside it: what every meta-architecture of this project shares."""

import functools
import logging
from typing import Callable, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from qmimic_d2.modeling.feature_comparison import FeatureComparison
from qmimic_d2.modeling.gradient_meter import GradientMeter
from qmimic_d2.modeling.head_features import head_features
from qmimic_d2.modeling.image_counts import named
from qmimic_d2.modeling.mimic import RoIMimicLoss
from qmimic_d2.modeling.quantizer_hook import check_features
from qmimic_d2.modeling.rois import ROI_SOURCES, WHOLE_MAP, check_roi_source, select_rois, sources_of
from qmimic_d2.modeling.scale_warning import ScaleWarning
from qmimic_d2.modeling.step_record import StepRecord
from qmimic_d2.modeling.teacher import FrozenTeacher, load_teacher_modules, teacher_shapes
from qmimic_d2.modeling.teacher_config import TeacherConfigError
from qmimic_d2.modeling.trunk_adapter import is_in_trunk
from qmimic_d2.modeling.weighting import BalancedWeight, MimicWeight, build_mimic_weight

__all__ = ["MimicStudent", "warn_of_unused_teacher"]


def warn_of_unused_teacher(cfg: CfgNode, model: nn.Module) -> None:
    """Warns where a config names a teacher, and its model is of a class that imitates none."""
    if cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE and not isinstance(model, MimicStudent):
        logging.getLogger(__name__).warning(
            "MODEL.QMIMIC.TEACHER.CONFIG_FILE names a teacher, which nothing uses: MODEL.META_ARCHITECTURE is %r "
            "and none of those that imitate one, such as 'QuantMimicRCNN'",
            cfg.MODEL.META_ARCHITECTURE,
        )


class MimicStudent(nn.Module):
    """
    Adds ``loss_mimic`` to the losses of the detector class it stands in front of.

    The teacher is no submodule (see :class:`FrozenTeacher`). It is built and audited when training begins: by
    ``train()`` on a new model, as Detectron2's trainers call it, or at the latest by the first training forward.
    A model that only evaluates never reads the teacher's weights and needs none of its files.

    A subclass is ``class X(MimicStudent, Detector)``. Its ``from_config`` adds :meth:`mimic_arguments` to the
    detector's, and its ``__init__`` tells the record where the regions come from.
    """

    # Names of the submodules that INIT_HEADS_FROM_TEACHER fills.
    head_names: Sequence[str] = ()
    # Parts of ROI_SOURCE that the detector has.
    roi_sources: Sequence[str] = ("ground_truth", "neighbourhood", "teacher_proposals")

    def __init__(
        self,
        *,
        mimic_loss: Optional[RoIMimicLoss] = None,
        build_teacher: Optional[Callable[[], FrozenTeacher]] = None,
        load_heads: Optional[Callable[[Dict[str, nn.Module]], None]] = None,
        weight: Optional[MimicWeight] = None,
        roi_source: str = "sampled",
        max_rois_per_image: int = 0,
        jitter: float = 0.25,
        num_neighbours: int = 4,
        diagnostics_period: int = 20,
        gradient_period: int = 0,
        **kwargs,
    ):
        """
        Args:
            mimic_loss: L_m between the student's and the teacher's maps; None: no mimic, or the
                teacher's config is not there (``build_teacher`` then says so).
            build_teacher: called once, when training begins; None: the mimic is off.
            load_heads: fills the given submodules from the teacher when training begins; None: they keep their
                own initial weights.
            weight: lambda over time.
            roi_source: see :func:`check_roi_source`.
            max_rois_per_image: most regions per image; 0 = all.
            jitter, num_neighbours: see :class:`TrainingRegions`.
            diagnostics_period: iterations between two comparisons of student and teacher; 0 = never.
            gradient_period: iterations between two measurements of the mimic's share of the gradient; 0 = never.
            kwargs: of the detector class.

        Raises:
            ValueError: an option is unknown or out of range, or ``mimic_loss`` has no teacher.
        """
        super().__init__(**kwargs)
        if mimic_loss is not None and build_teacher is None:
            raise ValueError(f"{type(self).__name__} got a mimic_loss and no build_teacher; give both or none")
        check_roi_source(roi_source, self.roi_sources if build_teacher is not None else tuple(ROI_SOURCES))
        _check_regions(max_rois_per_image, jitter, num_neighbours)
        _check_period("PERIOD", diagnostics_period)
        _check_period("GRADIENT_PERIOD", gradient_period)
        self.mimic_loss = mimic_loss
        if mimic_loss is not None:
            # Below the loss, so that a student that is loaded without its mimic knows what to pass over.
            mimic_loss.weight = weight or MimicWeight()
        self.roi_source = roi_source
        self.max_rois_per_image = max_rois_per_image
        self.jitter = jitter
        self.num_neighbours = num_neighbours
        self.diagnostics_period = diagnostics_period
        self._gradient_meter = GradientMeter(gradient_period)
        self._build_teacher = build_teacher
        self._load_heads = load_heads
        self._teacher: Optional[FrozenTeacher] = None
        self._has_warned = False
        self._has_loaded_heads = False
        self._scale_warning = ScaleWarning()
        self._record = StepRecord()
        if mimic_loss is not None:
            takes_gradients = gradient_period > 0 or isinstance(mimic_loss.weight, BalancedWeight)
            separates = takes_gradients and len(mimic_loss.student_features) > 1
            self._record.watch_backbone(self.backbone, separates=separates)
        for head in self._heads().values():
            head._register_load_state_dict_pre_hook(self._note_loaded_heads)

    @staticmethod
    def mimic_arguments(cfg: CfgNode, backbone: Backbone) -> Dict:
        """The arguments of ``__init__`` that a config describes."""
        node = cfg.MODEL.QMIMIC.MIMIC
        args = {
            "roi_source": node.ROI_SOURCE,
            "max_rois_per_image": node.MAX_ROIS_PER_IMAGE,
            "jitter": node.JITTER,
            "num_neighbours": node.NUM_NEIGHBOURS,
            "diagnostics_period": cfg.MODEL.QMIMIC.DIAGNOSTICS.PERIOD,
            "gradient_period": cfg.MODEL.QMIMIC.DIAGNOSTICS.GRADIENT_PERIOD,
            "weight": build_mimic_weight(cfg),
        }
        if cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE:
            args["build_teacher"] = functools.partial(FrozenTeacher, cfg)
            args["mimic_loss"] = _build_mimic_loss(cfg, backbone)
            if node.INIT_HEADS_FROM_TEACHER:
                args["load_heads"] = functools.partial(load_teacher_modules, cfg)
        return args

    @property
    def teacher(self) -> Optional[FrozenTeacher]:
        """The frozen teacher; None before training begins, and where there is none."""
        return self._teacher

    def train(self, mode: bool = True) -> "MimicStudent":
        """As ``nn.Module.train``; on a new model it builds the teacher, so that errors come early."""
        # An evaluation that ends with train(), as Detectron2's does, is no beginning of a training.
        begins = mode and self.training
        super().train(mode)
        if begins:
            self._prepare_training()
        return self

    def forward(self, batched_inputs: List[Dict[str, Tensor]]):
        """As the detector's; the training losses hold ``loss_mimic`` as well."""
        if not self.training:
            return super().forward(batched_inputs)
        self._prepare_training()
        if self.mimic_loss is None:
            return super().forward(batched_inputs)
        with self._record:
            losses = super().forward(batched_inputs)
            losses.update(self._mimic_losses(batched_inputs, losses))
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

    def _heads(self) -> Dict[str, nn.Module]:
        """Those of ``head_names`` that there are; with precomputed proposals there is no proposal generator."""
        heads = {name: getattr(self, name) for name in self.head_names}
        return {name: head for name, head in heads.items() if head is not None}

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
                    "MODEL.QMIMIC.TEACHER.CONFIG_FILE was not found, or could not be read, when this model was built, "
                    "and can be now; build the model again to train it"
                )
            if self._load_heads is not None and not self._has_loaded_heads:
                self._load_heads(self._heads())
                self._has_loaded_heads = True
            self._teacher = teacher

    def _note_loaded_heads(self, state: Dict[str, Tensor], prefix: str, *rest) -> None:
        # Weights that somebody loads before training begins, a checkpoint's say, are to stay.
        self._has_loaded_heads = self._has_loaded_heads or any(name.startswith(prefix) for name in state)

    def _mimic_losses(
        self, batched_inputs: List[Dict[str, Tensor]], detection: Dict[str, Tensor]
    ) -> Dict[str, Tensor]:
        storage = get_event_storage()
        iteration = storage.iter
        weight = self.mimic_loss.weight.at(iteration)
        measure = _is_due(self.diagnostics_period, iteration)
        losses = {}
        if weight > 0.0 or measure:
            with torch.set_grad_enabled(weight > 0.0 and torch.is_grad_enabled()):
                losses = self._compare(batched_inputs, measure)
        if weight > 0.0 and torch.is_grad_enabled():
            weight = self._measure_gradients(detection, losses, weight)
        storage.put_scalar("qmimic/weight", weight, smoothing_hint=False)
        if weight > 0.0:
            self._scale_warning.look(detection, losses, self.mimic_loss.weight, self.mimic_loss.normalize_by)
            return {name: loss * weight for name, loss in losses.items()}
        return self.mimic_loss.zeros(self._record.maps)

    def _measure_gradients(
        self, detection: Dict[str, Tensor], losses: Dict[str, Tensor], weight: float
    ) -> float:
        """Writes the mimic's share of the gradient where it is due; returns lambda, balanced where that is due."""
        storage = get_event_storage()
        schedule = self.mimic_loss.weight
        maps = named(self._record.maps, self.mimic_loss.student_features)
        self._gradient_meter.check_frozen(maps, balances=isinstance(schedule, BalancedWeight))
        writes = self._gradient_meter.is_due(storage.iter)
        balances = schedule.wants_balance(storage.iter)
        if not (writes or balances):
            return weight
        shares = self._gradient_meter.measure(self, maps, detection, losses, writes=writes, balances=balances)
        if balances:
            schedule.balance(shares["map"].detection, shares["map"].mimic)
            weight = schedule.at(storage.iter)
        for place, share in shares.items():
            for name, value in share.scaled(weight).scalars(place).items():
                storage.put_scalar(name, value, smoothing_hint=False)
        return weight

    def _compare(self, batched_inputs: List[Dict[str, Tensor]], measure: bool) -> Dict[str, Tensor]:
        image_sizes = [tuple(each["image"].shape[-2:]) for each in batched_inputs]
        if self.roi_source == WHOLE_MAP:
            teacher_maps = self._teacher.features(batched_inputs)
            return self.mimic_loss.whole_maps(self._record.maps, teacher_maps, image_sizes, measure=measure)
        regions = self._record.regions
        regions.image_sizes = image_sizes
        regions.ground_truth = [each["instances"].gt_boxes.to(self.device) for each in batched_inputs]
        regions.jitter, regions.num_neighbours = self.jitter, self.num_neighbours
        regions.seed = get_event_storage().iter
        if "teacher_proposals" in sources_of(self.roi_source):
            teacher_maps, regions.teacher_proposals = self._teacher.features_and_proposals(batched_inputs)
        else:
            teacher_maps = self._teacher.features(batched_inputs)
        boxes = select_rois(self.roi_source, regions, self.max_rois_per_image)
        return self.mimic_loss(
            self._record.maps,
            teacher_maps,
            boxes,
            student_pooled=self._already_pooled(boxes),
            measure=measure,
        )

    def _already_pooled(self, boxes: List[Boxes]) -> Optional[Tensor]:
        """
        The student's only compared map pooled at the regions as the mimic pools, shape (M, C, P, P), where the
        detector has done that already; None otherwise.
        """
        return None


def _is_due(period: int, iteration: int) -> bool:
    return period > 0 and iteration % period == 0


def _build_mimic_loss(cfg: CfgNode, backbone: Backbone) -> Optional[RoIMimicLoss]:
    node = cfg.MODEL.QMIMIC.MIMIC
    names = node.IN_FEATURES or head_features(cfg)
    available = backbone.output_shape()
    check_features(names, available, "MODEL.QMIMIC.MIMIC.IN_FEATURES")
    student_shapes: Dict[str, ShapeSpec] = {name: available[name] for name in names}
    try:
        shapes = teacher_shapes(cfg)
    except (FileNotFoundError, TeacherConfigError) as error:
        # An evaluation needs no teacher, whatever became of its files; training raises this error again.
        logging.getLogger(__name__).info("no teacher, so this model can only evaluate: %s", error)
        return None
    args = {"adapter": ""} if is_in_trunk(cfg) else {}
    # The adapter's initial weights must not shift the random numbers of the rest of the training:
    # variants of one seed sample alike.
    with torch.random.fork_rng(devices=[]):
        return RoIMimicLoss(cfg, student_shapes, shapes, **args)


def _check_period(name: str, period: int) -> None:
    if period < 0:
        raise ValueError(f"MODEL.QMIMIC.DIAGNOSTICS.{name} is {period}; give iterations >= 0 (0 = never)")


def _check_regions(max_rois_per_image: int, jitter: float, num_neighbours: int) -> None:
    prefix = "MODEL.QMIMIC.MIMIC."
    if max_rois_per_image < 0:
        raise ValueError(f"{prefix}MAX_ROIS_PER_IMAGE is {max_rois_per_image}; give a number >= 0 (0 = all)")
    if not 0.0 <= jitter < 1.0:
        raise ValueError(f"{prefix}JITTER is {jitter}; give a share of a box's sides from 0.0 to below 1.0")
    if num_neighbours < 0:
        raise ValueError(f"{prefix}NUM_NEIGHBOURS is {num_neighbours}; give a number >= 0")
