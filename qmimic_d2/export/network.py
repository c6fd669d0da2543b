"""
The student alone as one function of one image, ready to be traced.

Shape letters:
    h, w: height and width of the network's input, in pixels.
    N: number of detections.
"""

import os
import warnings
from typing import Any, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.structures import Instances
from torch import Tensor, nn

from qmimic_d2.export.description import ModelDescription
from qmimic_d2.export.finite import watch_outputs
from qmimic_d2.export.preprocessing import InputSpec
from qmimic_d2.modeling.family import family_of, head_node, head_node_key
from qmimic_d2.modeling.quantizer_hook import attached_quantizer

__all__ = [
    "OUTPUT_NAMES",
    "describe_model",
    "drop_quantizer",
    "example_image",
    "input_spec_of",
    "quantizer_text",
    "trace",
    "traceable",
]

OUTPUT_NAMES = ("boxes", "scores", "classes")


def drop_quantizer(model: nn.Module) -> bool:
    """Gives a model full-precision features for good; says whether it had a quantizer."""
    hook = attached_quantizer(model.backbone)
    if hook is None:
        return False
    hook.remove()
    return True


def quantizer_text(model: nn.Module) -> str:
    """The quantizer on a model's features, in words; "" for none."""
    hook = attached_quantizer(model.backbone)
    return "" if hook is None else f"{hook.quantizer} on {', '.join(hook.features)}"


def input_spec_of(cfg: CfgNode, model: nn.Module, fixed_size: Tuple[int, int] = (0, 0)) -> InputSpec:
    """
    How the detector of a config takes its images.

    Args:
        cfg: whose ``INPUT`` says how images are resized for a test.
        model: of this config.
        fixed_size: height and width of every input; (0, 0) for inputs of any size.
    """
    backbone = model.backbone
    strides = [shape.stride for shape in backbone.output_shape().values()]
    return InputSpec(
        format=cfg.INPUT.FORMAT,
        min_size=int(cfg.INPUT.MIN_SIZE_TEST),
        max_size=int(cfg.INPUT.MAX_SIZE_TEST),
        fixed_height=int(fixed_size[0]),
        fixed_width=int(fixed_size[1]),
        # an FPN pads by itself
        least=1 if backbone.size_divisibility > 1 else int(max(strides)),
        pixel_mean=tuple(float(each) for each in cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(float(each) for each in cfg.MODEL.PIXEL_STD),
    )


def describe_model(
    cfg: CfgNode,
    model: nn.Module,
    classes: Sequence[Tuple[int, str]],
    *,
    has_names: bool = True,
    config_file: str = "",
    fixed_size: Tuple[int, int] = (0, 0),
) -> ModelDescription:
    """
    What an exported file tells about itself.

    Args:
        cfg: of the training.
        model: as it is exported.
        classes: (id in the data set, name) of every class, in the order of the detector's indices.
        has_names: whether the classes' names are the data set's; False where they stand for unknown ones.
        config_file: for the record.
        fixed_size: see :func:`input_spec_of`.
    """
    return ModelDescription(
        classes=tuple(classes),
        has_names=has_names,
        input_spec=input_spec_of(cfg, model, fixed_size),
        score_threshold=float(head_node(cfg).SCORE_THRESH_TEST),
        quantizer=quantizer_text(model),
        source={
            "config_file": _shown_path(config_file),
            "weights": _shown_path(cfg.MODEL.WEIGHTS),
            "meta_architecture": cfg.MODEL.META_ARCHITECTURE,
            "score_threshold_key": f"{head_node_key(cfg)}.SCORE_THRESH_TEST",
        },
    )


def _shown_path(path: str) -> str:
    """Below the working directory, or the file's name: what ships says nothing about the folders of its maker."""
    if "://" in path or not os.path.isabs(path):
        return path
    folder = os.path.join(os.path.realpath(os.curdir), "")
    real = os.path.realpath(path)
    return real[len(folder) :] if real.startswith(folder) else os.path.basename(path)


def detect(model: nn.Module, image: Tensor) -> List[Tensor]:
    """
    Args:
        model: a GeneralizedRCNN or a one-stage DenseDetector, or of a class derived from them.
        image: shape (3, h, w), float32, in grey levels.

    Returns:
        Boxes (N, 4), scores (N,) and classes (N,), in pixels of the image; at last a detection of NaN where the
        heads gave numbers that are not finite.

    Raises:
        ValueError: a model of another kind, or one that predicts more than boxes.
    """
    with watch_outputs(model) as watch:
        return watch.mark(_tensors(_instances(model, image)))


def _instances(model: nn.Module, image: Tensor) -> Instances:
    family = family_of(type(model))
    if family is None or family.infer is None:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {type(model).__name__!r}; GeneralizedRCNN, DenseDetector and classes derived "
            "from them are exported"
        )
    (found,) = family.infer(model, [{"image": image}])
    return found


def _tensors(found: Instances) -> List[Tensor]:
    beyond = sorted(set(found.get_fields()) & {"pred_masks", "pred_keypoints"})
    if beyond:
        raise ValueError(
            f"the model predicts {', '.join(beyond)}, and an exported file gives boxes alone; set MODEL.MASK_ON and "
            "MODEL.KEYPOINT_ON False"
        )
    return [found.pred_boxes.tensor, found.scores, found.pred_classes]


def traceable(model: nn.Module, image: Tensor) -> TracingAdapter:
    """A module of tensors alone: image (3, h, w) in, :data:`OUTPUT_NAMES` out, in evaluation mode."""
    return TracingAdapter(model, image, inference_func=detect).eval()


def example_image(spec: InputSpec) -> Tensor:
    """
    What a model is traced with: noise (always the same), since no branch of a detector depends on the picture.

    Returns:
        shape (3, h, w), float32: of the fixed size, or of a landscape photograph.
    """
    height, width = spec.resized(300, 400)
    height, width = max(height, spec.least), max(width, spec.least)
    if spec.is_fixed:
        height, width = spec.fixed_height, spec.fixed_width
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator).float()


def trace(adapter: TracingAdapter, image: Tensor) -> Any:
    """The TorchScript module of an adapter; sizes in it follow the image, and nothing is printed."""
    with warnings.catch_warnings(), torch.no_grad():
        # Detectron2's checks of shapes, and the deprecation of the tracer.
        warnings.simplefilter("ignore")
        return torch.jit.trace(adapter, (image,), check_trace=False)
