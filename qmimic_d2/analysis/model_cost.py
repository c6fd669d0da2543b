"""Parameters and FLOPs of the detector that a config builds and that ships, without teacher and adapter."""

import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterator, Optional, Union

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from torch import Tensor, nn

from qmimic_d2.config_files import changed
from qmimic_d2.modeling.family import HEAD_MODULES
from qmimic_d2.modeling.trunk_adapter import without_teacher

__all__ = ["ModelCost", "PartCost", "measure_cost"]

# The parts of a detector; everything else counts as OTHER.
PARTS = ("backbone", *HEAD_MODULES)
OTHER = "other"

# The adapter r of the mimic loss: trained with the student, and not shipped.
_TRAINING_ONLY = ("mimic",)


@dataclass(frozen=True)
class PartCost:
    """
    Attributes:
        parameters: number of learned values.
        flops: for one image, as :func:`measure_cost` counts them.
    """

    parameters: int
    flops: int


@dataclass(frozen=True)
class ModelCost:
    """
    What one image costs.

    Attributes:
        height, width: of the image as it enters the model, in pixels, before padding.
        num_proposals: proposals that the RoI heads read; None if there are none, or no limit to fix them at.
        parameters, flops: of the whole detector, the sums over ``parts``.
        parts: by "backbone", "proposal_generator" and "roi_heads" (of a one-stage detector by "backbone" and "head"),
            and "other" for everything else.
        uncounted_ops: operators without a count, with the number of their calls.
    """

    height: int
    width: int
    num_proposals: Optional[int]
    parameters: int
    flops: int
    parts: Dict[str, PartCost]
    uncounted_ops: Dict[str, int]

    def to_dict(self) -> Dict[str, Any]:
        """As plain numbers, strings and dicts, for JSON."""
        return asdict(self)


def measure_cost(cfg_or_model: Union[CfgNode, nn.Module], height: int, width: int) -> ModelCost:
    """
    Counts parameters, and the FLOPs of one inference on an image of the given size.

    FLOPs are those of ``fvcore.nn.FlopCountAnalysis`` with Detectron2's list of ignored operators: one
    multiply-add of a convolution, a linear layer or a matrix product is one FLOP, and BatchNorm has two per
    value; element-wise operators, pooling, RoIAlign and NMS do not count. The RoI heads' share is
    proportional to the number of proposals, which depends on the image. It is fixed at the most that
    inference allows (``MODEL.RPN.POST_NMS_TOPK_TEST``), so that the cost belongs to the architecture and is
    the same for any weights and image.

    Args:
        cfg_or_model: a config, whose model is built on the CPU with random weights and no teacher; or a
            Detectron2 detector, which is left as it was.
        height, width: of the image as it enters the model, after ``INPUT.MIN_SIZE_TEST`` and
            ``MAX_SIZE_TEST``, in pixels.

    Raises:
        ValueError: height or width is not a positive whole number.
    """
    for name, length in (("height", height), ("width", width)):
        if isinstance(length, bool) or length != int(length) or length < 1:
            raise ValueError(f"{name} is {length!r}; give the image's size in whole pixels, 1 or more")
    model = build_for_measurement(cfg_or_model) if isinstance(cfg_or_model, CfgNode) else cfg_or_model
    image = torch.full((3, int(height), int(width)), 128.0)
    num_proposals = most_proposals(model)
    with inference_context(model), fixed_proposals(model, num_proposals, image):
        analysis = FlopCountAnalysis(model, [{"image": image, "height": int(height), "width": int(width)}])
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flops = analysis.by_module()
        uncounted = dict(sorted(analysis.unsupported_ops().items()))
    parameters = _parameters_by_part(model)
    # The analysis wraps the model, hence the prefix.
    flops_by_part = {part: int(flops.get(f"model.{part}", 0)) for part in parameters if part != OTHER}
    flops_by_part[OTHER] = int(flops[""]) - sum(flops_by_part.values())
    parts = {part: PartCost(parameters[part], flops_by_part[part]) for part in parameters}
    return ModelCost(
        height=int(height),
        width=int(width),
        num_proposals=num_proposals,
        parameters=sum(part.parameters for part in parts.values()),
        flops=sum(part.flops for part in parts.values()),
        parts=parts,
        uncounted_ops=uncounted,
    )


def build_for_measurement(cfg: CfgNode) -> nn.Module:
    cfg = changed(without_teacher(cfg), "MODEL.DEVICE", "cpu")
    if "QMIMIC" in cfg.MODEL:  # which a training measures; a stride changes no size
        cfg = changed(cfg, "MODEL.QMIMIC.QUANTIZER.RELATIVE_STRIDE", 0.0)
    with torch.random.fork_rng(devices=[]):
        return build_model(cfg).eval()


def _parameters_by_part(model: nn.Module) -> Dict[str, int]:
    counts = dict.fromkeys((*(part for part in PARTS if hasattr(model, part)), OTHER), 0)
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if part not in _TRAINING_ONLY:
            counts[part if part in counts else OTHER] += parameter.numel()
    return counts


def most_proposals(model: nn.Module) -> Optional[int]:
    limits = getattr(getattr(model, "proposal_generator", None), "post_nms_topk", None)
    return None if limits is None else int(limits[False])


@contextmanager
def fixed_proposals(model: nn.Module, count: Optional[int], image: Tensor) -> Iterator[None]:
    """In the block the proposal generator runs, but the heads read ``count`` fixed boxes instead of its proposals."""
    if count is None:
        yield
        return
    height, width = image.shape[-2:]
    # A quarter of the image's height and width, in its middle: boxes that suit every pooler.
    box = torch.tensor([0.375 * width, 0.375 * height, 0.625 * width, 0.625 * height])
    device = next(model.parameters()).device
    boxes, logits = box.repeat(count, 1).to(device), torch.zeros(count, device=device)

    def replace(generator: nn.Module, inputs, output):
        (proposals,), losses = output
        return [Instances(proposals.image_size, proposal_boxes=Boxes(boxes), objectness_logits=logits)], losses

    handle = model.proposal_generator.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
