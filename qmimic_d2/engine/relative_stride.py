"""The quantizer's stride from the teacher: a multiple of its features' root mean square inside annotated boxes."""

import logging
import math
from typing import Any, Dict, Iterable, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from torch import Tensor

from qmimic_d2.analysis.calibration import evenly_spaced
from qmimic_d2.config_files import changed
from qmimic_d2.data.loading import load_dataset_dicts
from qmimic_d2.engine.mimic_evaluator import annotated_mapper, has_box
from qmimic_d2.engine.resuming import saved_config
from qmimic_d2.modeling.mimic.cached_teacher import Teacher, build_teacher
from qmimic_d2.modeling.mimic.teacher import teacher_shapes
from qmimic_d2.randomness import own_randomness
from qmimic_d2.run_folder import CONFIG
from qmimic_d2.yaml.config import value_of

__all__ = ["squares_inside", "with_measured_stride"]

_KEY = "MODEL.QMIMIC.QUANTIZER.RELATIVE_STRIDE"
_STRIDE = "MODEL.QMIMIC.QUANTIZER.STRIDE"
_NUM_IMAGES = 100


def with_measured_stride(cfg: CfgNode, *, resume: bool = False, eval_only: bool = False) -> CfgNode:
    """
    The config with the number that ``QUANTIZER.RELATIVE_STRIDE`` stands for.

    Call it once, before anything is built from the config. The result has ``RELATIVE_STRIDE`` 0.0 and repeats the run.

    Args:
        cfg: of the student, frozen; its data sets are registered.
        resume: the run continues the one in OUTPUT_DIR; its ``config.yaml`` has the number.
        eval_only: nothing is measured; the number is that of OUTPUT_DIR, too.

    Returns:
        The same config where ``RELATIVE_STRIDE`` is 0.0.

    Raises:
        FileNotFoundError, ValueError: there is no teacher, no annotated box, or no number; names the key and the fix.
    """
    node = cfg.MODEL.QMIMIC.QUANTIZER
    relative = node.RELATIVE_STRIDE
    if not (relative >= 0.0 and math.isfinite(relative)):
        raise ValueError(f"{_KEY} is {relative}; give a positive number, or 0.0 for QUANTIZER.STRIDE as it is")
    if relative == 0.0 or not node.NAME:
        return cfg
    stride = _earlier_stride(cfg.OUTPUT_DIR) if resume or eval_only else 0.0
    if not stride and eval_only:
        raise ValueError(
            f"{_KEY} is {relative}, and its number is in {CONFIG} of the training's OUTPUT_DIR; evaluate with that "
            "file, or set QUANTIZER.STRIDE and RELATIVE_STRIDE 0.0"
        )
    if not stride:
        stride = _measure(cfg)
    return changed(cfg, _STRIDE, stride, _KEY, 0.0)


def squares_inside(feature: Tensor, boxes: Boxes, stride: float) -> Tuple[float, int]:
    """
    The sum of squares of a map's entries in the cells whose center lies in a box, and the number of these entries.

    Args:
        feature: shape (C, H, W).
        boxes: in pixels.
        stride: pixels of a cell.
    """
    height, width = feature.shape[-2:]
    y = (torch.arange(height, device=feature.device) + 0.5) * stride
    x = (torch.arange(width, device=feature.device) + 0.5) * stride
    x0, y0, x1, y1 = boxes.tensor.to(feature.device).unbind(dim=1)
    rows = (y0[:, None] <= y) & (y < y1[:, None])
    columns = (x0[:, None] <= x) & (x < x1[:, None])
    inside = (rows[:, :, None] & columns[:, None, :]).any(dim=0)
    chosen = feature[:, inside].double()
    return chosen.square().sum().item(), chosen.numel()


def _measure(cfg: CfgNode) -> float:
    if not cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE:
        raise ValueError(
            f"{_KEY} is {cfg.MODEL.QMIMIC.QUANTIZER.RELATIVE_STRIDE}, and MODEL.QMIMIC.TEACHER.CONFIG_FILE names no "
            "teacher, whose features it would measure; name one, or set QUANTIZER.STRIDE and RELATIVE_STRIDE 0.0"
        )
    images = [each for each in load_dataset_dicts(list(cfg.DATASETS.TRAIN), filter_empty=False) if has_box(each)]
    if not images:
        raise ValueError(f"{_KEY}: DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no annotated box to measure in")
    images = evenly_spaced(images, _NUM_IMAGES)
    plain = changed(cfg, "MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False)
    strides = [shape.stride for shape in teacher_shapes(plain).values()]  # in pixels of the student's image
    teacher = build_teacher(plain)
    with own_randomness(0):
        total, number, num_boxes = _squares(teacher, map(annotated_mapper(cfg), images), strides)
    rms = math.sqrt(total / number) if number else 0.0
    if not (rms > 0.0 and math.isfinite(rms)):
        raise ValueError(
            f"{_KEY}: inside the {num_boxes} boxes of {len(images)} images the teacher's features have the root mean "
            f"square {rms}; give another teacher, or boxes that are larger than its cells of {min(strides):g} pixels"
        )
    stride = float(f"{cfg.MODEL.QMIMIC.QUANTIZER.RELATIVE_STRIDE * rms:.3g}")
    logging.getLogger(__name__).info(
        "QUANTIZER.STRIDE is %g: %g times %.4g, the root mean square of the teacher's features inside the %d boxes of "
        "%d training images",
        *(stride, cfg.MODEL.QMIMIC.QUANTIZER.RELATIVE_STRIDE, rms, num_boxes, len(images)),
    )
    return stride


def _squares(
    teacher: Teacher, inputs: Iterable[Dict[str, Any]], strides: List[float]
) -> Tuple[float, int, int]:
    """Over all images and compared maps: the sum of squares, the number of entries, and the number of boxes."""
    total, number, num_boxes = 0.0, 0, 0
    for each in inputs:
        boxes = each["instances"].gt_boxes
        num_boxes += len(boxes)
        for feature, stride in zip(teacher.features([each]).values(), strides):
            squares, count = squares_inside(feature[0], boxes, stride)
            total, number = total + squares, number + count
    return total, number, num_boxes


def _earlier_stride(output_dir: str) -> float:
    """The stride that the run in a folder was trained with; 0.0 where there is none, or it was never measured."""
    saved = saved_config(output_dir)
    stride = None if value_of(saved, _KEY) else value_of(saved, _STRIDE)
    return float(stride) if isinstance(stride, (int, float)) and stride > 0.0 else 0.0
