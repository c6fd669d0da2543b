"""
The models of this project in a LazyConfig: Detectron2's lazy models with a quantizer, or with a teacher beside them.

The settings are those of a YAML, under the same names, so that docs/config.md holds for both.
"""

import copy
from typing import Any, Dict, List, Mapping

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling.family import head_node
from qmimic_d2.modeling.meta_arch.quant_mimic import MimicStudent
from qmimic_d2.modeling.trunk_adapter import TrunkAdapter, is_in_trunk

__all__ = ["add_mimic", "add_quantizer", "build_lazy_detector"]

# What follows "Quant" or "QuantMimic" in the name of the class that stands for one of Detectron2's.
_FAMILIES = {GeneralizedRCNN: "RCNN", RetinaNet: "RetinaNet", FCOS: "FCOS"}


def add_mimic(model: DictConfig, qmimic: Mapping[str, Any], *, max_iter: Any = 0) -> DictConfig:
    """
    Puts a teacher beside a lazy detector: the training student.

    Args:
        model: of :class:`GeneralizedRCNN`, :class:`RetinaNet` or :class:`FCOS`, as a LazyConfig describes it.
        qmimic: the keys of ``MODEL.QMIMIC`` that differ from their defaults, nested as in a YAML:
            ``dict(TEACHER=dict(CONFIG_FILE="teacher.yaml"), QUANTIZER=dict(STRIDE=0.25))``.
        max_iter: length of the training in iterations, for ``MIMIC.SCHEDULE`` "cosine"; ``"${train.max_iter}"`` follows
            the rest of the config.

    Returns:
        Another lazy model, with the settings as ``model.qmimic``; the detector's own arguments stand where they were.

    Raises:
        ValueError: the model is of another class.
    """
    return _extended(model, "QuantMimic", qmimic, max_iter=max_iter)


def add_quantizer(model: DictConfig, qmimic: Mapping[str, Any]) -> DictConfig:
    """
    As :func:`add_mimic`, without a teacher: the quantized teacher, the quantization-only baseline, the shipped student.
    """
    return _extended(model, "Quant", qmimic)


def build_lazy_detector(
    *, meta_architecture: str, qmimic: Mapping[str, Any], backbone: Backbone, max_iter: int = 0, **detector
) -> nn.Module:
    """
    Builds the model that :func:`add_mimic` or :func:`add_quantizer` has described.

    Where ``qmimic`` names no maps, they are those that the detector's heads read.

    Args:
        meta_architecture: name in ``META_ARCH_REGISTRY``.
        qmimic: keys of ``MODEL.QMIMIC``.
        backbone: with a trunk adapter in front of the heads where ``MIMIC.ADAPTER_PLACEMENT`` is "trunk".
        max_iter: of the training; 0 = unknown.
        detector: further arguments of Detectron2's class.

    Raises:
        KeyError, ValueError: an unknown key, or a value of another type or out of range.
        FileNotFoundError: in training, a file of the teacher is not there.
    """
    kind = META_ARCH_REGISTRY.get(meta_architecture)
    cfg = _yacs_config(meta_architecture, qmimic)
    cfg.INPUT.FORMAT = detector.get("input_format") or "BGR"
    head_node(cfg).IN_FEATURES = _head_features(backbone, detector)
    _check_maps(cfg, backbone)
    if issubclass(kind, FCOS):  # has no such argument; the teacher wants to know
        detector.pop("input_format", None)
    args = {**detector, "backbone": backbone, **kind.quantizer_arguments(cfg)}
    if issubclass(kind, MimicStudent):
        _check_schedule(cfg, max_iter)
        cfg.SOLVER.MAX_ITER = max_iter
        args.update(kind.mimic_arguments(cfg))
    return kind(**args)


def _extended(model: DictConfig, prefix: str, qmimic: Mapping[str, Any], **further) -> DictConfig:
    target = model["_target_"]
    target = locate(target) if isinstance(target, str) else target
    if target not in _FAMILIES:
        raise ValueError(
            f"the lazy model is of {target}; give one of {[each.__name__ for each in _FAMILIES]}, or name the class of "
            "this project and all of its arguments yourself"
        )
    extended = copy.deepcopy(model)
    extended["_target_"] = build_lazy_detector
    extended["meta_architecture"] = prefix + _FAMILIES[target]
    extended["qmimic"] = dict(qmimic)
    for name, value in further.items():
        extended[name] = value
    return extended


def _yacs_config(meta_architecture: str, qmimic: Mapping[str, Any]) -> CfgNode:
    keys = OmegaConf.to_container(qmimic, resolve=True) if isinstance(qmimic, DictConfig) else dict(qmimic)
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.merge_from_other_cfg(CfgNode({"MODEL": {"META_ARCHITECTURE": meta_architecture, "QMIMIC": keys}}))
    # The teacher follows the student to its device when training begins.
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _head_features(backbone: Backbone, detector: Dict[str, Any]) -> List[str]:
    if "roi_heads" in detector:
        return list(getattr(detector["roi_heads"], "in_features", ()))
    names = detector.get("head_in_features")
    if names is None:  # as DenseDetector has it
        shapes = backbone.output_shape()
        return sorted(shapes, key=lambda name: shapes[name].stride)
    return list(names)


def _check_maps(cfg: CfgNode, backbone: Backbone) -> None:
    node = cfg.MODEL.QMIMIC
    if not head_node(cfg).IN_FEATURES and not (node.QUANTIZER.IN_FEATURES and node.MIMIC.IN_FEATURES):
        raise ValueError(
            "these RoI heads do not tell which maps they read; name them in qmimic.QUANTIZER.IN_FEATURES and "
            "qmimic.MIMIC.IN_FEATURES"
        )
    if is_in_trunk(cfg) and not isinstance(backbone, TrunkAdapter):
        raise ValueError(
            "qmimic.MIMIC.ADAPTER_PLACEMENT is 'trunk', and the lazy model's backbone is no TrunkAdapter; make it "
            "L(TrunkAdapter)(bottom_up=..., channels=..., kind='conv1x1_relu'), with heads that read these channels"
        )


def _check_schedule(cfg: CfgNode, max_iter: int) -> None:
    if cfg.MODEL.QMIMIC.MIMIC.SCHEDULE == "cosine" and max_iter < 1:
        raise ValueError(
            f"qmimic.MIMIC.SCHEDULE is 'cosine' and max_iter is {max_iter}; give add_mimic "
            "max_iter=\"${train.max_iter}\""
        )
