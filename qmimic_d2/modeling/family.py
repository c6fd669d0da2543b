"""Which part of a config describes the detector's heads, whatever its family, and the maps that they read."""

import contextlib
import inspect
from typing import Any, Iterator, List, Mapping

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet

__all__ = [
    "QUANT_MIMIC",
    "detector_name",
    "head_features",
    "head_node",
    "head_node_key",
    "head_section",
    "is_derived",
    "is_meta_architecture",
    "named_head_features",
]


# The meta-architecture that builds the one named by MODEL.QMIMIC.META_ARCHITECTURE.
QUANT_MIMIC = "QuantMimic"


def detector_name(model: Mapping[str, Any]) -> str:
    """The meta-architecture of the detector itself, of the node ``MODEL`` or a dict like it."""
    name = model["META_ARCHITECTURE"]
    return model["QMIMIC"]["META_ARCHITECTURE"] if name == QUANT_MIMIC else name


def is_derived(meta_architecture: str, *classes: type) -> bool:
    """Whether the class of this registered name is one of these or derived from one; False for an unregistered name."""
    found = META_ARCH_REGISTRY.get(meta_architecture) if meta_architecture in META_ARCH_REGISTRY else None
    return inspect.isclass(found) and issubclass(found, classes)


def is_meta_architecture(cfg: CfgNode, *classes: type) -> bool:
    """:func:`is_derived` of the config's model."""
    return is_derived(detector_name(cfg.MODEL), *classes)


def head_section(meta_architecture: str) -> str:
    """The name of :func:`head_node` below ``MODEL``."""
    if is_derived(meta_architecture, RetinaNet):
        return "RETINANET"
    return "FCOS" if is_derived(meta_architecture, FCOS) else "ROI_HEADS"


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


@contextlib.contextmanager
def named_head_features(cfg: CfgNode, *nodes: str) -> Iterator[None]:
    """
    Says which key names a map that the backbone does not give, where Detectron2's own ``from_config`` in the block
    raises a bare ``KeyError``.

    Args:
        nodes: those below MODEL whose IN_FEATURES are read, such as "RPN".

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
