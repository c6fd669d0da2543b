"""Detector families: the only place that knows which family a detector is, and what follows from it."""

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Instances
from torch import nn

__all__ = [
    "DETECTOR_REGIONS",
    "FAMILIES",
    "HEAD_MODULES",
    "QUANT_MIMIC",
    "Family",
    "detector_name",
    "family_of",
    "features_read_by",
    "has_quantizer_keys",
    "head_features",
    "head_modules",
    "head_node",
    "head_node_key",
    "head_outputs",
    "head_section",
    "imitates",
    "named_head_features",
    "num_classes_section",
    "output_layers",
    "own_regions",
    "quantized_name",
]

# The meta-architecture that builds the one named by MODEL.QMIMIC.META_ARCHITECTURE.
QUANT_MIMIC = "QuantMimic"

# The node of every detector whose family has none of its own.
_DEFAULT_SECTION = "ROI_HEADS"


def _infer_rcnn(model: nn.Module, inputs: List[Dict[str, Any]]) -> List[Instances]:
    return model.inference(inputs, do_postprocess=False)


def _infer_dense(model: nn.Module, inputs: List[Dict[str, Any]]) -> List[Instances]:
    images = model.preprocess_image(inputs)
    by_name = model.backbone(images.tensor)
    features = [by_name[name] for name in model.head_in_features]
    return model.forward_inference(images, features, model.head(features))


@dataclass(frozen=True)
class Family:
    """
    What follows from the class of a detector.

    Attributes:
        name: with "Quant" or "QuantMimic" before it, the registered class of this package, if there is one.
        detector: Detectron2's class; subclasses of it belong to the family.
        section: node below MODEL with IN_FEATURES, NUM_CLASSES and SCORE_THRESH_TEST; "" if no YAML describes it.
        heads: names of the modules after the backbone.
        outputs: layers that give logits and box offsets, as paths from the model. A path may end in a ModuleList.
        infer: gives the detections of a batch in pixels of the network's input; None for a family without detections.
        takes_input_format: whether the class has an argument ``input_format``.
        head_outputs: see :func:`head_outputs`.
    """

    name: str
    detector: type
    section: str
    heads: Tuple[str, ...]
    outputs: Tuple[str, ...]
    infer: Optional[Callable[[nn.Module, List[Dict[str, Any]]], List[Instances]]]
    takes_input_format: bool = True
    head_outputs: Tuple[str, ...] = ()


# A class belongs to the first family that fits.
FAMILIES = (
    Family(
        "RCNN",
        GeneralizedRCNN,
        _DEFAULT_SECTION,
        heads=("proposal_generator", "roi_heads"),
        outputs=("proposal_generator.rpn_head", "roi_heads.box_predictor"),
        infer=_infer_rcnn,
    ),
    Family("RetinaNet", RetinaNet, "RETINANET", ("head",), ("head",), _infer_dense, head_outputs=("logits", "deltas")),
    Family(
        "FCOS",
        FCOS,
        "FCOS",
        ("head",),
        ("head",),
        _infer_dense,
        takes_input_format=False,
        head_outputs=("logits", "deltas", "centerness"),
    ),
    Family("DenseDetector", DenseDetector, "", ("head",), ("head",), _infer_dense),
    Family("ProposalNetwork", ProposalNetwork, "", ("proposal_generator",), ("proposal_generator.rpn_head",), None),
)

# Every name that a family's head module has.
HEAD_MODULES = tuple(dict.fromkeys(head for family in FAMILIES for head in family.heads))
_OUTPUTS = tuple(dict.fromkeys(path for family in FAMILIES for path in family.outputs))

# Methods with which a one-stage detector makes detections of what its head gives.
_DENSE_INFERENCE = (
    *("preprocess_image", "forward_inference", "inference_single_image", "_transpose_dense_predictions"),
    *("_decode_multi_level_predictions", "_decode_per_level_predictions"),
)

# Sources of regions, as MODEL.QMIMIC.MIMIC.ROI_SOURCE names them, that need one of these modules of the detector.
DETECTOR_REGIONS = {"sampled": ("roi_heads",), "proposals": ("proposal_generator", "roi_heads")}


# --------------------------------------------------------------------------------------------------- of a config


def detector_name(model: Mapping[str, Any]) -> str:
    """The meta-architecture of the detector itself, of the node ``MODEL`` or a dict like it."""
    name = model["META_ARCHITECTURE"]
    return model["QMIMIC"]["META_ARCHITECTURE"] if name == QUANT_MIMIC else name


def family_of(detector: Union[str, type]) -> Optional[Family]:
    """The family of a registered name or a class; None for an unregistered name, or a detector of another kind."""
    kind = _registered_class(detector) if isinstance(detector, str) else detector
    return next((each for each in FAMILIES if kind is not None and issubclass(kind, each.detector)), None)


def has_quantizer_keys(meta_architecture: str) -> bool:
    """Whether a model of this name reads ``MODEL.QMIMIC.QUANTIZER``."""
    return meta_architecture == QUANT_MIMIC or _is_ours(meta_architecture, "Quant", "QuantMimic")


def imitates(meta_architecture: str) -> bool:
    """Whether a model of this name imitates the teacher that ``MODEL.QMIMIC.TEACHER`` names."""
    return meta_architecture == QUANT_MIMIC or _is_ours(meta_architecture, "QuantMimic")


def head_section(meta_architecture: str) -> str:
    """The name of :func:`head_node` below ``MODEL``."""
    family = family_of(meta_architecture)
    return family.section if family and family.section else _DEFAULT_SECTION


def head_node(cfg: CfgNode) -> CfgNode:
    """
    The node of the heads that give the boxes: ``MODEL.RETINANET``, ``MODEL.FCOS``, or ``MODEL.ROI_HEADS`` for every
    other detector. Each has IN_FEATURES, NUM_CLASSES and SCORE_THRESH_TEST.
    """
    return cfg.MODEL[head_section(detector_name(cfg.MODEL))]


def head_node_key(cfg: CfgNode) -> str:
    """The key of :func:`head_node`, such as "MODEL.ROI_HEADS", for messages."""
    return f"MODEL.{head_section(detector_name(cfg.MODEL))}"


def head_features(cfg: CfgNode) -> List[str]:
    """Names of the backbone's maps that these heads read, in their order."""
    return list(head_node(cfg).IN_FEATURES)


def _registered_class(meta_architecture: str) -> Optional[type]:
    found = META_ARCH_REGISTRY.get(meta_architecture) if meta_architecture in META_ARCH_REGISTRY else None
    return found if inspect.isclass(found) else None


def _is_ours(meta_architecture: str, *prefixes: str) -> bool:
    names = {prefix + family.name for prefix in prefixes for family in FAMILIES}
    kind = _registered_class(meta_architecture)
    return kind is not None and any(each.__name__ in names for each in kind.__mro__)


# --------------------------------------------------------------------------------------------------- of a model


def num_classes_section(model: nn.Module) -> str:
    """The node below MODEL with a detector's NUM_CLASSES; "" if another project has the number elsewhere."""
    if hasattr(model, "roi_heads"):
        return _DEFAULT_SECTION
    family = family_of(type(model))
    return family.section if family else ""


def quantized_name(model: nn.Module) -> str:
    """
    The registered class of this package that builds such a detector without a mimic; "" if there is none.
    """
    family = family_of(type(model))
    name = f"Quant{family.name}" if family else ""
    is_plain = family is not None and type(model) is family.detector
    is_ours = name in (each.__name__ for each in type(model).__mro__)
    return name if name in META_ARCH_REGISTRY and (is_plain or is_ours) else ""


def features_read_by(model: nn.Module) -> List[str]:
    """Names of the backbone's maps that a detector's heads read; [] if the heads do not say."""
    owner = model if hasattr(model, "head_in_features") else getattr(model, "roi_heads", None)
    return list(getattr(owner, "head_in_features", None) or getattr(owner, "in_features", ()))


def head_modules(model: nn.Module) -> Dict[str, nn.Module]:
    """The detector's head modules by name; with precomputed proposals there is no proposal generator."""
    heads = {name: getattr(model, name, None) for name in HEAD_MODULES}
    return {name: head for name, head in heads.items() if isinstance(head, nn.Module)}


def output_layers(model: nn.Module) -> List[nn.Module]:
    """The layers that give logits and box offsets."""
    layers = []
    for path in _OUTPUTS:
        found = functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), model)
        layers += list(found) if isinstance(found, nn.ModuleList) else [found]
    return [each for each in layers if isinstance(each, nn.Module)]


def head_outputs(model: nn.Module) -> Tuple[str, ...]:
    """
    What the head gives of every level, in order; () unless the detections are made of it by Detectron2's own methods.
    """
    family = family_of(type(model))
    if family is None or not family.head_outputs:
        return ()
    is_stock = all(getattr(type(model), name) is getattr(family.detector, name) for name in _DENSE_INFERENCE)
    return family.head_outputs if is_stock else ()


def own_regions(model: nn.Module) -> List[str]:
    """The :data:`DETECTOR_REGIONS` that the detector gives."""
    return [
        source
        for source, modules in DETECTOR_REGIONS.items()
        if any(getattr(model, name, None) is not None for name in modules)
    ]


@contextlib.contextmanager
def named_head_features(cfg: CfgNode, *nodes: str) -> Iterator[None]:
    """
    Within the block, Detectron2's ``from_config`` raises a bare ``KeyError`` if the backbone does not give a map. This
    names the key.

    Args:
        nodes: below MODEL, with the IN_FEATURES in question, such as "RPN".

    Raises:
        ValueError: names the key, its value and the backbone.
    """
    try:
        yield
    except KeyError as error:
        for node in nodes:
            names = list(cfg.MODEL[node].IN_FEATURES)
            if error.args and error.args[0] in names:
                raise ValueError(
                    f"MODEL.{node}.IN_FEATURES is {names}, and the backbone {cfg.MODEL.BACKBONE.NAME!r} gives no map "
                    f"{error.args[0]!r}. Name maps that it gives, or choose another MODEL.BACKBONE.NAME: an FPN with "
                    "RetinaNet's last two levels is build_divided_retinanet_resnet_fpn_backbone or "
                    "build_retinanet_vgg_fpn_backbone"
                ) from error
        raise
