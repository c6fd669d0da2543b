"""
Quantizer and mimic on Detectron2's lazy models: the two calls of :mod:`qmimic_d2.modeling.attach` in a LazyConfig.

The settings are those of a YAML, under the same names, so that docs/config.md holds for both.
"""

import copy
from typing import Any, Mapping

from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qmimic_d2.config import default_config
from qmimic_d2.modeling.attach import attach_parts, mimic_arguments, quantizer_arguments
from qmimic_d2.modeling.family import family_of, features_read_by, head_node
from qmimic_d2.modeling.trunk_adapter import TrunkAdapter, is_in_trunk
from qmimic_d2.yaml.config import describe_mismatch

__all__ = ["add_mimic", "add_quantizer", "build_lazy_detector"]


def add_mimic(model: DictConfig, qmimic: Mapping[str, Any], *, max_iter: Any = 0) -> DictConfig:
    """
    Quantizer and mimic on a lazy detector: the student in training.

    Args:
        model: of any detector class with an argument ``backbone``, as a LazyConfig describes it.
        qmimic: the keys of ``MODEL.QMIMIC`` that differ from their defaults, nested as in a YAML:
            ``dict(TEACHER=dict(CONFIG_FILE="teacher.yaml"), QUANTIZER=dict(STRIDE=0.25))``.
        max_iter: length of the training in iterations, for ``MIMIC.SCHEDULE`` "cosine"; ``"${train.max_iter}"`` follows
            the rest of the config.

    Returns:
        Another lazy model of that class, with the settings as ``model.qmimic``; the detector's own arguments stand
        where they were.

    Raises:
        ValueError: the model has no backbone.
    """
    return _extended(model, qmimic, with_mimic=True, max_iter=max_iter)


def add_quantizer(model: DictConfig, qmimic: Mapping[str, Any]) -> DictConfig:
    """
    As :func:`add_mimic`, without a teacher: the quantized teacher, the quantization-only baseline, the shipped student.
    """
    return _extended(model, qmimic, with_mimic=False)


def build_lazy_detector(
    *,
    detector_class: str,
    qmimic: Mapping[str, Any],
    backbone: Backbone,
    with_mimic: bool,
    max_iter: int = 0,
    **detector,
) -> nn.Module:
    """
    Builds the model that :func:`add_mimic` or :func:`add_quantizer` has described.

    Where ``qmimic`` names no maps, they are those that the detector's heads read.

    Args:
        detector_class: path of the class, such as "detectron2.modeling.meta_arch.fcos.FCOS".
        qmimic: keys of ``MODEL.QMIMIC``.
        backbone: with a trunk adapter in front of the heads where ``MIMIC.ADAPTER_PLACEMENT`` is "trunk".
        with_mimic: whether it imitates a teacher.
        max_iter: of the training; 0 = unknown.
        detector: further arguments of the class.

    Raises:
        KeyError, ValueError: an unknown key, or a value of another type or out of range.
        FileNotFoundError: in training, a file of the teacher is not there.
    """
    kind = locate(detector_class)
    cfg = _yacs_config(kind.__name__, qmimic)
    cfg.INPUT.FORMAT = detector.get("input_format") or "BGR"
    family = family_of(kind)
    if family is not None and not family.takes_input_format:  # the teacher wants to know
        detector.pop("input_format", None)
    model = kind(backbone=backbone, **detector)
    head_node(cfg).IN_FEATURES = features_read_by(model)
    _check_maps(cfg, backbone)
    parts = quantizer_arguments(cfg)
    if with_mimic:
        if cfg.MODEL.QMIMIC.MIMIC.SCHEDULE == "cosine" and max_iter < 1:
            raise ValueError(
                f"qmimic.MIMIC.SCHEDULE is 'cosine' and max_iter is {max_iter}; give add_mimic "
                "max_iter=\"${train.max_iter}\""
            )
        cfg.SOLVER.MAX_ITER = max_iter
        parts.update(mimic_arguments(cfg))
    attach_parts(model, **parts)
    return model


def _extended(model: DictConfig, qmimic: Mapping[str, Any], **further) -> DictConfig:
    target = model["_target_"]
    name = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
    if "backbone" not in model:
        raise ValueError(f"the lazy model is of {name} and has no argument 'backbone', whose maps the mimic compares")
    extended = copy.deepcopy(model)
    for key, value in dict(further, _target_=build_lazy_detector, detector_class=name, qmimic=dict(qmimic)).items():
        extended[key] = value
    return extended


def _yacs_config(meta_architecture: str, qmimic: Mapping[str, Any]) -> CfgNode:
    keys = OmegaConf.to_container(qmimic, resolve=True) if isinstance(qmimic, DictConfig) else dict(qmimic)
    cfg = default_config()
    try:
        cfg.merge_from_other_cfg(CfgNode({"MODEL": {"META_ARCHITECTURE": meta_architecture, "QMIMIC": keys}}))
    except ValueError as error:
        raise ValueError(describe_mismatch(error)) from error
    # The teacher follows the student to its device when training begins.
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _check_maps(cfg: CfgNode, backbone: Backbone) -> None:
    node = cfg.MODEL.QMIMIC
    if not head_node(cfg).IN_FEATURES and not (node.QUANTIZER.IN_FEATURES and node.MIMIC.IN_FEATURES):
        raise ValueError(
            "the heads of this detector do not tell which maps they read; name them in qmimic.QUANTIZER.IN_FEATURES "
            "and qmimic.MIMIC.IN_FEATURES"
        )
    if is_in_trunk(cfg) and not isinstance(backbone, TrunkAdapter):
        raise ValueError(
            "qmimic.MIMIC.ADAPTER_PLACEMENT is 'trunk', and the lazy model's backbone is no TrunkAdapter; make it "
            "L(TrunkAdapter)(bottom_up=..., channels=..., kind='conv1x1_relu'), with heads that read these channels"
        )
