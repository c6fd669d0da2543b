"""The mimic of a detector: in each training step it adds its losses to the detector's."""

import functools
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import Res5ROIHeads, RROIHeads
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qmimic_d2.diagnostics.feature_comparison import FeatureComparison
from qmimic_d2.diagnostics.gradient_meter import GradientMeter
from qmimic_d2.modeling.family import DETECTOR_REGIONS, head_modules, own_regions
from qmimic_d2.modeling.mimic.attachment import Attachment
from qmimic_d2.modeling.mimic.cached_teacher import Teacher, build_teacher
from qmimic_d2.modeling.mimic.loss import Pair, RoIMimicLoss
from qmimic_d2.modeling.mimic.region_sources import WHOLE_MAP, check_roi_source, roi_source_names, select_rois
from qmimic_d2.modeling.mimic.step_record import StepRecord, named
from qmimic_d2.modeling.mimic.teacher import load_teacher_modules
from qmimic_d2.modeling.mimic.weight import BalancedWeight, MimicWeight, build_mimic_weight

__all__ = ["Mimic", "MimicSettings", "check_detector"]


@dataclass(frozen=True)
class MimicSettings:
    """
    Where the mimic looks and when it measures.

    Attributes:
        roi_source: sources of regions; see :func:`check_roi_source`.
        max_rois_per_image: most regions per image; 0 = all.
        jitter, num_neighbours: see :class:`TrainingRegions`.
        diagnostics_period: iterations between two comparisons of student and teacher; 0 = never.
        gradient_period: iterations between two measurements of the mimic's share of the gradient; 0 = never.

    Raises:
        ValueError: one of them is unknown or out of range; names the key.
    """

    roi_source: Sequence[str] = ("sampled",)
    max_rois_per_image: int = 0
    jitter: float = 0.25
    num_neighbours: int = 4
    diagnostics_period: int = 20
    gradient_period: int = 0

    def __post_init__(self):
        check_roi_source(self.roi_source)
        prefix = "MODEL.QMIMIC.MIMIC."
        if self.max_rois_per_image < 0:
            raise ValueError(f"{prefix}MAX_ROIS_PER_IMAGE is {self.max_rois_per_image}; give a number >= 0 (0 = all)")
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"{prefix}JITTER is {self.jitter}; give a share of a box's sides from 0.0 to below 1.0")
        if self.num_neighbours < 0:
            raise ValueError(f"{prefix}NUM_NEIGHBOURS is {self.num_neighbours}; give a number >= 0")
        for name in ("diagnostics_period", "gradient_period"):
            period, key = getattr(self, name), name.upper().replace("DIAGNOSTICS_", "")
            if period < 0:
                raise ValueError(f"MODEL.QMIMIC.DIAGNOSTICS.{key} is {period}; give iterations >= 0 (0 = never)")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "MimicSettings":
        """Those of a config."""
        node, diagnostics = cfg.MODEL.QMIMIC.MIMIC, cfg.MODEL.QMIMIC.DIAGNOSTICS
        return cls(
            roi_source=node.ROI_SOURCE,
            max_rois_per_image=node.MAX_ROIS_PER_IMAGE,
            jitter=node.JITTER,
            num_neighbours=node.NUM_NEIGHBOURS,
            diagnostics_period=diagnostics.PERIOD,
            gradient_period=diagnostics.GRADIENT_PERIOD,
        )


class Mimic(Attachment, RoIMimicLoss):
    """
    The whole method, without the detector: adapters, loss weight, teacher, regions, loss, measurements.

    Its parameters and buffers are those of the adapters and the weight, in ``state_dict`` under ``mimic.``. The teacher
    is no submodule (see :class:`FrozenTeacher`). It is built and audited when training begins, so that an evaluation
    needs none of its files.

    :func:`qmimic_d2.attach_mimic` builds one and hangs it on a detector. A training step::

        pairs = mimic.pairs(student_maps, teacher_maps, boxes)  # per level: r(f_s) and f_t, pooled
        losses = mimic.loss(pairs)                              # L_m of each, or another ``distance``
    """

    @configurable
    def __init__(
        self,
        *,
        build_teacher: Callable[[], Teacher],
        load_heads: Optional[Callable[[Dict[str, nn.Module]], None]] = None,
        weight: Optional[MimicWeight] = None,
        settings: MimicSettings = MimicSettings(),
        **kwargs,
    ):
        """
        Args:
            build_teacher: called once, when training begins.
            load_heads: fills the detector's heads from the teacher when training begins; None: they keep their own
                initial weights.
            weight: lambda over time; None: 1.0.
            settings: where it looks and when it measures.
            kwargs: of :class:`RoIMimicLoss`.
        """
        super().__init__(**kwargs)
        self.weight = weight or MimicWeight()
        self.settings = settings
        self.teacher: Optional[Teacher] = None
        self.build_teacher = build_teacher
        self._load_heads = load_heads
        self._has_loaded_heads = False
        self._gradient_meter = GradientMeter()
        takes_gradients = settings.gradient_period > 0 or isinstance(self.weight, BalancedWeight)
        self.record = StepRecord(separates=takes_gradients and len(self.student_features) > 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, student_shapes: Dict[str, ShapeSpec], teacher_shapes: Dict[str, ShapeSpec]):
        initializes = cfg.MODEL.QMIMIC.MIMIC.INIT_HEADS_FROM_TEACHER
        return {
            **super().from_config(cfg, student_shapes, teacher_shapes),
            "build_teacher": functools.partial(build_teacher, cfg),
            "load_heads": functools.partial(load_teacher_modules, cfg) if initializes else None,
            "weight": build_mimic_weight(cfg),
            "settings": MimicSettings.from_config(cfg),
        }

    def prepare_training(self) -> None:
        """
        Builds the teacher at the first call, and fills the heads from it if the config says so.

        Raises:
            FileNotFoundError, ValueError: the teacher's files are missing or do not fit.
        """
        if self.teacher is None:
            teacher = self.build_teacher().to(self.device)
            if self._load_heads is not None and not self._has_loaded_heads:
                self._load_heads(head_modules(self.detector))
                self._has_loaded_heads = True
            self.teacher = teacher

    @torch.no_grad()
    def compare_on(self, batched_inputs: List[Dict[str, Tensor]], boxes: List[Boxes]) -> Dict[str, FeatureComparison]:
        """
        How alike student and teacher are inside given regions, in the detector's present mode.

        We compare r of the student's map before its quantizer, as the mimic loss does.

        Args:
            batched_inputs: N dicts as Detectron2's ``DatasetMapper`` makes them; "image" is read.
            boxes: N Boxes in pixels of these images.

        Returns:
            By name of the student's map.

        Raises:
            ValueError: there is no teacher yet; ``train()`` builds it.
        """
        if self.teacher is None:
            raise ValueError("this model has no teacher to be compared with; call train() first, which loads it")
        maps = self.student_maps(batched_inputs)
        return self.compare(self.pairs(maps, self.teacher.features(batched_inputs), boxes))

    def student_maps(self, batched_inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        """The backbone's maps of these images before any quantizer, by name, shape (N, C, H, W)."""
        model = self.detector
        self.record.begin()
        try:
            if hasattr(model, "preprocess_image"):
                model.backbone(model.preprocess_image(batched_inputs).tensor)
            else:  # not model(...): the mimic's own hooks would end the record
                model.forward(batched_inputs)
            return self.record.maps
        finally:
            self.record.clear()

    @property
    def device(self) -> torch.device:
        """Of the detector's backbone."""
        return next(self.detector.backbone.parameters()).device

    def _apply(self, *args, **kwargs):
        module = super()._apply(*args, **kwargs)
        if self.teacher is not None and self._held:
            # the backbone stands before the mimic among the detector's modules and has moved already
            self.teacher.to(self.device)
        return module

    def _hooks(self, model: nn.Module) -> List[RemovableHandle]:
        check_detector(model, self.settings)
        heads = head_modules(model).values()
        return [
            *super()._hooks(model),
            *self.record.watch(model),
            *(head._register_load_state_dict_pre_hook(self._note_loaded_heads) for head in heads),
            # also after an error, so that nothing of a failed step is kept
            model.register_forward_hook(self._on_end, with_kwargs=True, always_call=True),
        ]

    def _note_loaded_heads(self, state: Dict[str, Tensor], prefix: str, *rest) -> None:
        # Weights that were loaded before training begins, such as a checkpoint's, stay.
        self._has_loaded_heads = self._has_loaded_heads or any(name.startswith(prefix) for name in state)

    def _on_begin(self, model: nn.Module, inputs) -> None:
        super()._on_begin(model, inputs)
        if model.training:
            self.record.begin()

    def _on_end(self, model: nn.Module, inputs, named_inputs, losses) -> Optional[Dict[str, Tensor]]:
        if not self.record.is_recording or not model.training:
            return None
        try:
            if losses is None:  # the forward pass has raised an error
                return None
            if not isinstance(losses, dict):
                raise ValueError(
                    f"{type(model).__name__} returned a {type(losses).__name__} in training; the mimic adds its losses "
                    "to a dict of losses"
                )
            batched_inputs = inputs[0] if inputs else next(iter(named_inputs.values()))
            return {**losses, **self._losses(batched_inputs, losses)}
        finally:
            self.record.clear()

    def _losses(self, batched_inputs: List[Dict[str, Tensor]], detection: Dict[str, Tensor]) -> Dict[str, Tensor]:
        storage = get_event_storage()
        iteration = storage.iter
        weight = self.weight.at(iteration)
        measure = _is_due(self.settings.diagnostics_period, iteration)
        losses = {}
        if weight > 0.0 or measure:
            with torch.set_grad_enabled(weight > 0.0 and torch.is_grad_enabled()):
                pairs = self._pairs_of_step(batched_inputs)
                if measure:
                    self.write_diagnostics(pairs)
                losses = self.loss(pairs)
            for name, value in self.teacher.scalars().items():
                storage.put_scalar(name, value, smoothing_hint=False)
        if weight > 0.0 and torch.is_grad_enabled():
            weight = self._measure_gradients(detection, losses, weight)
        storage.put_scalar("qmimic/weight", weight, smoothing_hint=False)
        if weight > 0.0:
            self.weight.warn_of_scale(detection, losses, self.normalize_by)
            return {name: loss * weight for name, loss in losses.items()}
        return self.zeros(named(self.record.maps, self.student_features))

    def _pairs_of_step(self, batched_inputs: List[Dict[str, Tensor]]) -> List[Pair]:
        settings, maps = self.settings, self.record.maps
        image_sizes = [tuple(each["image"].shape[-2:]) for each in batched_inputs]
        if WHOLE_MAP in settings.roi_source:
            return self.whole_map_pairs(maps, self.teacher.features(batched_inputs), image_sizes)
        regions = self.record.regions
        regions.image_sizes = image_sizes
        regions.ground_truth = [each["instances"].gt_boxes.to(self.device) for each in batched_inputs]
        regions.jitter, regions.num_neighbours = settings.jitter, settings.num_neighbours
        regions.seed = get_event_storage().iter
        if "teacher_proposals" in settings.roi_source:
            teacher_maps, regions.teacher_proposals = self.teacher.features_and_proposals(batched_inputs)
        else:
            teacher_maps = self.teacher.features(batched_inputs)
        boxes = select_rois(settings.roi_source, regions, settings.max_rois_per_image)
        return self.pairs(maps, teacher_maps, boxes)

    def _measure_gradients(self, detection: Dict[str, Tensor], losses: Dict[str, Tensor], weight: float) -> float:
        """Writes the mimic's share of the gradient if that is due. Returns lambda, balanced if that is due."""
        storage = get_event_storage()
        schedule = self.weight
        maps = named(self.record.maps, self.student_features)
        if not all(each.requires_grad for each in maps.values()):
            self._gradient_meter.check_frozen(maps, balances=isinstance(schedule, BalancedWeight))
        writes = _is_due(self.settings.gradient_period, storage.iter)
        balances = schedule.wants_balance(storage.iter)
        if not (writes or balances):
            return weight
        shares = self._gradient_meter.measure(
            self.detector, maps, detection, losses, writes=writes, balances=balances
        )
        if balances:
            schedule.balance(shares["map"].detection, shares["map"].mimic)
            weight = schedule.at(storage.iter)
        for place, share in shares.items():
            for name, value in share.scaled(weight).scalars(place).items():
                storage.put_scalar(name, value, smoothing_hint=False)
        return weight


def _is_due(period: int, iteration: int) -> bool:
    return period > 0 and iteration % period == 0


def check_detector(model: nn.Module, settings: MimicSettings) -> None:
    """
    Raises:
        ValueError: the detector has not the regions that the settings name, or its boxes are rotated.
    """
    heads = {name: getattr(model, name, None) for name in ("proposal_generator", "roi_heads")}
    given = own_regions(model)
    available = [each for each in roi_source_names() if each not in DETECTOR_REGIONS or each in given]
    check_roi_source(settings.roi_source, available)
    if isinstance(heads["proposal_generator"], RRPN) or isinstance(heads["roi_heads"], RROIHeads):
        raise ValueError(
            "MODEL.PROPOSAL_GENERATOR.NAME or MODEL.ROI_HEADS.NAME gives rotated boxes "
            f"({type(heads['proposal_generator']).__name__}, {type(heads['roi_heads']).__name__}), and the mimic pools "
            "upright ones; set them to 'RPN' and 'StandardROIHeads', or train without a teacher: "
            "MODEL.QMIMIC.TEACHER.CONFIG_FILE ''"
        )
    if "sampled" in settings.roi_source and isinstance(heads["roi_heads"], Res5ROIHeads):
        raise ValueError(
            "MODEL.QMIMIC.MIMIC.ROI_SOURCE has 'sampled', but Res5ROIHeads keeps its sampled proposals to itself; set "
            "it to ['proposals'] or ['ground_truth']"
        )
