"""How long a training step takes on this machine."""

import statistics
import time
from typing import Dict, List

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

__all__ = ["measure_step_seconds"]

_STEPS = 3


def measure_step_seconds(cfg: CfgNode, *, backward: bool = True) -> float:
    """
    Seconds of one step, the median of three after a first one, on images of noise.

    Args:
        cfg: of a detector without a mimic; its input sizes and batch count.
        backward: False measures the backbone's forward pass alone, as a teacher runs it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(cfg).train(backward)
        inputs = _images(cfg)
        seconds = []
        with EventStorage():
            for _ in range(1 + _STEPS):
                begun = time.perf_counter()
                if backward:
                    sum(model(inputs).values()).backward()
                else:
                    with torch.no_grad():
                        model.backbone(model.preprocess_image(inputs).tensor)
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
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
