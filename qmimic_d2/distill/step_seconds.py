"""How long a training step takes on this machine."""

import statistics
import time
from typing import Any, Callable, Dict, List

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from qmimic_d2.modeling.mimic.teacher import FrozenTeacher

__all__ = ["measure_step_seconds", "measure_teacher_seconds"]

_STEPS = 3


def measure_step_seconds(cfg: CfgNode) -> float:
    """
    Seconds of one training step, the median of three after a first one, on images of noise.

    Args:
        cfg: of a detector without a mimic; its input sizes and batch count.
    """
    with torch.random.fork_rng(devices=[]), EventStorage():
        torch.manual_seed(0)
        model, inputs = build_model(cfg).train(), _images(cfg)
        return _median_seconds(lambda: sum(model(inputs).values()).backward(), model.device)


def measure_teacher_seconds(cfg: CfgNode, teacher: FrozenTeacher) -> float:
    """
    Seconds that a teacher takes for one batch of its student, as :func:`measure_step_seconds` measures.

    Args:
        cfg: of the student; its input sizes and batch count.
    """
    images = _images(cfg)
    return _median_seconds(lambda: teacher.features(images), teacher.device)


def _median_seconds(step: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + _STEPS):
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _images(cfg: CfgNode) -> List[Dict]:
    """A batch with a few boxes in each image. "image": shape (3, H, W), uint8."""
    short, long = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    found = []
    for _ in range(cfg.SOLVER.IMS_PER_BATCH):
        instances = Instances((short, long))
        corner = torch.rand(8, 2) * torch.tensor([long * 0.6, short * 0.6])
        instances.gt_boxes = Boxes(torch.cat([corner, corner + torch.rand(8, 2) * short * 0.3 + 8.0], dim=1))
        instances.gt_classes = torch.zeros(8, dtype=torch.long)
        image = torch.randint(0, 256, (3, short, long), dtype=torch.uint8)
        found.append({"image": image, "instances": instances, "height": short, "width": long})
    return found
