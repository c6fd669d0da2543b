"""
The RoI mimic loss: adapter, pooling of both maps, L_m, and how alike both sides are.

Shape letters:
    N: number of images.
    M: number of regions of all images (the paper's N).
    C, T: channels of the student's and of the teacher's map.
    P: pooler resolution, in bins.

With f_t and f_s the features of a region in teacher and student, r the adapter and Q the quantizer::

    L_m = 1 / (2M) * sum_i || Q(f_t^i) - Q(r(f_s^i)) ||_2^2

Source: Wei et al., "Quantization Mimic", ECCV 2018, section 3.3
(https://arxiv.org/abs/1805.02152v3); without Q it is the plain mimic of Li et al., "Mimicking Very
Efficient Network for Object Detection", CVPR 2017, equation 2, which divides by the region's number
of elements as well (``normalize_by="element"``).
"""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from qmimic_d2.diagnostics.feature_comparison import FeatureComparison, compare_features, write_comparison
from qmimic_d2.modeling.mimic.adapter import build_adapter
from qmimic_d2.modeling.mimic.pair import MapPair, Pair, sum_of_squares
from qmimic_d2.modeling.mimic.region_sources import check_boxes
from qmimic_d2.modeling.mimic.step_record import check_maps, named
from qmimic_d2.modeling.quantizer import (
    CONSTANT_QUANTIZERS,
    CodeQuantizer,
    Quantizer,
    build_code_quantizer,
    build_quantizer,
)
from qmimic_d2.modeling.roi_pooling import LevelPooler

__all__ = ["NORMALIZERS", "Pair", "RoIMimicLoss"]

# Values of MODEL.QMIMIC.MIMIC.NORMALIZE_BY.
NORMALIZERS = ("roi", "element", "target")


class RoIMimicLoss(nn.Module):
    """
    Compares the student's with the teacher's features inside regions of interest.

    The student's map is pooled first, then the adapter is applied. This is the equation's order, r(f_s^i), and it is
    cheap because the student has few channels. For a linear adapter the order makes no difference: a 1x1 convolution
    commutes with ROIAlign's averaging.

    ROIAlign averages the codes of a teacher's quantized map, so its output lies between codes. It is quantized again,
    so that both sides of the difference are codes.

    Attributes:
        distance: a function that gives the scalar loss of a :class:`Pair` with regions; by default
            :meth:`mimic_distance`.
    """

    @configurable
    def __init__(
        self,
        *,
        student_shapes: Dict[str, ShapeSpec],
        teacher_shapes: Dict[str, ShapeSpec],
        pooler_type: str = "ROIAlignV2",
        pooler_resolution: int = 7,
        pooler_sampling_ratio: int = 0,
        adapter: str = "conv1x1",
        normalize_by: str = "roi",
        student_quantizer: Optional[Quantizer] = None,
        teacher_quantizer: Optional[Quantizer] = None,
        code_quantizer: Optional[CodeQuantizer] = None,
        distance: Optional[Callable[[Pair], Tensor]] = None,
    ):
        """
        Args:
            student_shapes: channels and stride of the compared student maps, by name, in order.
            teacher_shapes: the same of the teacher's maps, in the same order; strides in pixels of
                the student's input image.
            pooler_type, pooler_resolution, pooler_sampling_ratio: see :class:`LevelPooler`.
            adapter: one of :data:`qmimic_d2.modeling.mimic.adapter.ADAPTERS`.
            normalize_by: one of :data:`NORMALIZERS`.
            student_quantizer: Q around r(f_s); None for none.
            teacher_quantizer: Q around f_t; None for none.
            code_quantizer: the dictionary of :meth:`compare`; None: no comparison.
            distance: see the attribute; None for L_m.

        Raises:
            ValueError: an unknown option, or maps whose number, strides or channels do not fit.
        """
        super().__init__()
        if normalize_by not in NORMALIZERS:
            raise ValueError(
                f"MODEL.QMIMIC.MIMIC.NORMALIZE_BY is {normalize_by!r}; choose one of {list(NORMALIZERS)}"
            )
        _check_shapes(student_shapes, teacher_shapes, has_adapter=bool(adapter))
        self.student_features = list(student_shapes)
        self.teacher_features = list(teacher_shapes)
        self.pooler = LevelPooler(
            student_shapes, pooler_type, pooler_resolution, pooler_sampling_ratio
        )
        self.normalize_by = normalize_by
        self.student_quantizer = student_quantizer
        self.teacher_quantizer = teacher_quantizer
        self.code_quantizer = code_quantizer
        self.distance: Callable[[Pair], Tensor] = distance or self.mimic_distance
        self.adapters = nn.ModuleDict()
        for student_name, teacher_name in zip(self.student_features, self.teacher_features):
            self.adapters[student_name] = build_adapter(
                adapter, student_shapes[student_name].channels, teacher_shapes[teacher_name].channels
            )

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student_shapes: Dict[str, ShapeSpec],
        teacher_shapes: Dict[str, ShapeSpec],
    ):
        quantizer = build_quantizer(cfg)
        node = cfg.MODEL.QMIMIC
        return {
            "student_shapes": student_shapes,
            "teacher_shapes": teacher_shapes,
            "pooler_type": node.MIMIC.POOLER_TYPE,
            "pooler_resolution": node.MIMIC.POOLER_RESOLUTION,
            "pooler_sampling_ratio": node.MIMIC.POOLER_SAMPLING_RATIO,
            "adapter": node.MIMIC.ADAPTER,
            "normalize_by": node.MIMIC.NORMALIZE_BY,
            "student_quantizer": quantizer if node.MIMIC.QUANTIZE_STUDENT else None,
            "teacher_quantizer": quantizer if node.MIMIC.QUANTIZE_TEACHER else None,
            "code_quantizer": build_code_quantizer(cfg),
        }

    def forward(
        self, student_maps: Dict[str, Tensor], teacher_maps: Dict[str, Tensor], boxes: List[Boxes]
    ) -> Dict[str, Tensor]:
        """The :meth:`loss` of the :meth:`pairs`."""
        return self.loss(self.pairs(student_maps, teacher_maps, boxes))

    def pairs(
        self, student_maps: Dict[str, Tensor], teacher_maps: Dict[str, Tensor], boxes: Sequence[Boxes]
    ) -> List[Pair]:
        """
        Args:
            student_maps: the student's maps before any quantizer, by name, shape (N, C, H, W).
            teacher_maps: the teacher's maps, by name, shape (N, T, H', W').
            boxes: N Boxes in pixels of the student's input image.

        Returns:
            One for each level, also for levels without a region.

        Raises:
            ValueError: maps and boxes are not of the same images, or boxes are rotated.
        """
        self._check_maps(student_maps, teacher_maps, len(boxes))
        check_boxes(boxes)
        device = student_maps[self.student_features[0]].device
        rois_of_level = self.pooler.assign([each.to(device) for each in boxes])
        num_regions = sum(len(rois) for rois in rois_of_level)
        pairs = []
        for level, rois in enumerate(rois_of_level):
            name = self.student_features[level]
            maps = (student_maps[name], teacher_maps[self.teacher_features[level]])
            if MapPair.fits(maps, self.adapters[name], self.pooler, rois):
                pairs.append(MapPair(name, num_regions, maps, self.adapters[name], self.pooler, level, rois))
                continue
            with torch.no_grad():
                target = self.pooler.pool(level, maps[1], rois)
            if len(rois):
                student = self.adapters[name](self.pooler.pool(level, maps[0], rois))
            else:
                student = self._zero(name, maps[0]).expand(target.shape)
            pairs.append(Pair(name, student, target, num_regions))
        return pairs

    def whole_map_pairs(
        self,
        student_maps: Dict[str, Tensor],
        teacher_maps: Dict[str, Tensor],
        image_sizes: List[Tuple[int, int]],
    ) -> List[Pair]:
        """
        Plain feature mimic, for comparison: as :meth:`pairs`, but every cell inside an image is a region of one bin.

        Args:
            image_sizes: N heights and widths in pixels of the student's input image, without padding.

        Raises:
            ValueError: maps and sizes are not of the same images.
        """
        self._check_maps(student_maps, teacher_maps, len(image_sizes))
        cells = [
            self._cells(student_maps[name], teacher_maps[other], image_sizes, level)
            for level, (name, other) in enumerate(zip(self.student_features, self.teacher_features))
        ]
        num_cells = sum(len(each) for each, _ in cells)
        return [
            Pair(name, self.adapters[name](student), teacher, num_cells)
            for name, (student, teacher) in zip(self.student_features, cells)
        ]

    def loss(self, pairs: Sequence[Pair]) -> Dict[str, Tensor]:
        """
        Returns:
            The :attr:`distance` of each pair, without lambda, as ``loss_mimic``; with several levels as
            ``loss_mimic_<map>``. Without a region it is a zero that still reaches every parameter.
        """
        return {
            f"loss_mimic{self.suffix(pair.name)}": pair.student.sum() if pair.is_empty else self.distance(pair)
            for pair in pairs
        }

    def mimic_distance(self, pair: Pair) -> Tensor:
        """L_m of one level, divided by the M regions of all levels ("target": by the level's own energy)."""
        quantizers = (self.student_quantizer, self.teacher_quantizer)
        # another quantizer may want whole regions, or have a gradient of its own
        if isinstance(pair, MapPair) and all(each is None or type(each) in CONSTANT_QUANTIZERS for each in quantizers):
            squares, energy = pair.squares(quantizers)
            return self._divided(squares, energy, pair.num_entries, pair.num_regions)
        adapted, target = pair.student, pair.teacher
        if self.teacher_quantizer is not None:
            target = self.teacher_quantizer.quantize(target)
        if self.student_quantizer is not None:
            adapted = self.student_quantizer(adapted)
        return self.normalized(adapted, target, pair.num_regions)

    def compare(self, pairs: Sequence[Pair]) -> Dict[str, FeatureComparison]:
        """
        How alike both sides are.

        Returns:
            By name of the student's map, also for maps without a region.

        Raises:
            ValueError: there is no ``code_quantizer``.
        """
        if self.code_quantizer is None:
            raise ValueError("this RoIMimicLoss has no code_quantizer to compare features with; give it one")
        return {pair.name: compare_features(pair.student, pair.teacher, self.code_quantizer) for pair in pairs}

    def write_diagnostics(self, pairs: Sequence[Pair]) -> None:
        """
        Writes how alike both sides are to the event storage (see :func:`write_comparison`). Without a storage or a
        ``code_quantizer`` it writes nothing.
        """
        if self.code_quantizer is None or not has_event_storage():
            return
        for name, comparison in self.compare([pair for pair in pairs if not pair.is_empty]).items():
            write_comparison(get_event_storage(), comparison, self.code_quantizer, self.suffix(name))

    def zeros(self, student_maps: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """The losses if lambda is 0: zeros that still reach every parameter."""
        return {
            f"loss_mimic{self.suffix(name)}": self._zero(name, student_maps[name])
            for name in self.student_features
        }

    def _check_maps(
        self, student_maps: Dict[str, Tensor], teacher_maps: Dict[str, Tensor], num_images: int
    ) -> None:
        # the pooling would read beyond a map's memory for a region of an image that the map does not cover
        maps_of = {
            "student": named(student_maps, self.student_features),
            "teacher": named(teacher_maps, self.teacher_features),
        }
        check_maps(maps_of, num_images)

    def _cells(
        self, student_map: Tensor, teacher_map: Tensor, image_sizes: List[Tuple[int, int]], level: int
    ) -> Tuple[Tensor, Tensor]:
        """Cells inside the images as regions: (cells, C, 1, 1) of the student and (cells, T, 1, 1) of the teacher."""
        stride = self.pooler.strides[level]
        height = min(student_map.shape[-2], teacher_map.shape[-2])
        width = min(student_map.shape[-1], teacher_map.shape[-1])
        sizes = torch.tensor(image_sizes, device=student_map.device)
        # the cell of pixel 0 begins at pixel 0
        is_inside = (torch.arange(height, device=sizes.device) * stride < sizes[:, :1])[:, :, None] & (
            torch.arange(width, device=sizes.device) * stride < sizes[:, 1:]
        )[:, None, :]
        rows = [each[..., :height, :width].permute(0, 2, 3, 1)[is_inside] for each in (student_map, teacher_map)]
        return rows[0][:, :, None, None], rows[1][:, :, None, None]

    def suffix(self, name: str) -> str:
        """The suffix of a level's loss and figures; "" if there is one level."""
        return f"_{name}" if len(self.student_features) > 1 else ""

    def _zero(self, name: str, student_map: Tensor) -> Tensor:
        # It reaches the adapter, because DDP wants every process to use every parameter in every step.
        zero = student_map.flatten()[:0].sum()
        return sum((parameter.sum() * 0.0 for parameter in self.adapters[name].parameters()), zero)

    def normalized(self, adapted: Tensor, target: Tensor, num_regions: int) -> Tensor:
        """The squared difference of two tensors of shape (M of the level, T, P, P), as ``normalize_by`` divides it."""
        # float32 throughout: a sum of a million squares leaves the range of 16 bits
        target = target.float()
        squares = F.mse_loss(adapted.float(), target, reduction="sum")
        return self._divided(squares, sum_of_squares(target), target[0].numel(), num_regions)

    def _divided(self, squares: Tensor, energy: Tensor, num_entries: int, num_regions: int) -> Tensor:
        """``squares``, divided as ``normalize_by`` says: ``energy`` of the target, ``num_entries`` of a region."""
        if self.normalize_by == "roi":
            return squares / (2 * num_regions)
        if self.normalize_by == "element":
            return squares / (2 * num_regions * num_entries)
        # A teacher that is 0 in every region gives no loss instead of a huge one.
        return squares * torch.where(energy > 0.0, 0.5 / energy, 0.0)


def _check_shapes(
    student_shapes: Dict[str, ShapeSpec], teacher_shapes: Dict[str, ShapeSpec], has_adapter: bool
) -> None:
    if len(student_shapes) != len(teacher_shapes) or not student_shapes:
        raise ValueError(
            f"MODEL.QMIMIC.MIMIC.IN_FEATURES gives {len(student_shapes)} student maps "
            f"{list(student_shapes)} and MIMIC.TEACHER_IN_FEATURES {len(teacher_shapes)} teacher maps "
            f"{list(teacher_shapes)}; give one teacher map for each student map"
        )
    for (student_name, student), (teacher_name, teacher) in zip(
        student_shapes.items(), teacher_shapes.items()
    ):
        if student.stride != teacher.stride:
            raise ValueError(
                f"the student's map {student_name!r} has stride {student.stride} and the teacher's "
                f"{teacher_name!r} has {teacher.stride:g} in pixels of the student's image; set "
                "MODEL.QMIMIC.TEACHER.INPUT_SCALE to the teacher's own stride divided by the "
                "student's, or name other maps in MODEL.QMIMIC.MIMIC.IN_FEATURES and "
                "TEACHER_IN_FEATURES"
            )
        if not has_adapter and student.channels != teacher.channels:
            raise ValueError(
                f"the student's map {student_name!r} has {student.channels} channels and the teacher's "
                f"{teacher_name!r} has {teacher.channels}, and MODEL.QMIMIC.MIMIC.ADAPTER is ''; set it "
                "to 'conv1x1' (or 'conv1x1_relu')"
            )
