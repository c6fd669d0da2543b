"""The two hooks of the method, for any detector: a quantizer on its maps, and the mimic."""

import functools
import logging
from typing import Any, Callable, Dict, Optional, Sequence, Union

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from qmimic_d2.modeling.family import head_features
from qmimic_d2.modeling.mimic.attachment import NAME, AbsentMimic, Attachment, check_attachable
from qmimic_d2.modeling.mimic.cached_teacher import build_teacher
from qmimic_d2.modeling.mimic.loss import Pair
from qmimic_d2.modeling.mimic.mimic import Mimic, MimicSettings, check_detector
from qmimic_d2.modeling.mimic.teacher import teacher_shapes
from qmimic_d2.modeling.mimic.teacher_config import TeacherConfigError
from qmimic_d2.modeling.quantizer import Quantizer, build_quantizer
from qmimic_d2.modeling.quantizer_hook import attach_quantizer, check_features
from qmimic_d2.modeling.trunk_adapter import is_in_trunk

__all__ = [
    "attach_mimic",
    "attach_parts",
    "attach_quantizer",
    "attached_mimic",
    "mimic_arguments",
    "quantizer_arguments",
    "takes_a_teacher",
    "warn_of_unused_teacher",
]


def attach_mimic(
    model: nn.Module, cfg: CfgNode, *, distance: Optional[Callable[[Pair], Tensor]] = None
) -> Union[Mimic, AbsentMimic]:
    """
    Makes a detector imitate the teacher that ``cfg.MODEL.QMIMIC`` names: its training losses then hold ``loss_mimic``.

    Call it before the optimizer is built: the adapters have parameters. Attaching again replaces the first.

    Args:
        model: any detector whose maps come from ``model.backbone``, and whose training forward takes a list of dicts
            with "image" and "instances" and returns a dict of losses.
        cfg: of the student. With ``TEACHER.CONFIG_FILE`` "" the losses do not change.
        distance: gives the scalar loss of one level's :class:`Pair`; None for L_m as ``cfg`` describes it.

    Returns:
        ``model.mimic``; its ``remove()`` undoes this.

    Raises:
        ValueError: an option is unknown or out of range, or the maps or regions do not fit the detector.
    """
    mimic = _build(model, cfg, distance)
    mimic.attach(model)
    return mimic


def attach_parts(
    model: nn.Module,
    *,
    quantizer: Optional[Quantizer] = None,
    quantized_features: Sequence[str] = (),
    mimic: Union[Mimic, Callable[[nn.Module], Any], None] = None,
) -> None:
    """
    Attaches the quantizer, then the mimic.

    Args:
        quantizer: of the named maps, so that all heads read codes; None: full precision.
        quantized_features: names among the backbone's outputs.
        mimic: a mimic that is not attached yet, or a function that attaches one to the detector; None: no mimic.

    Raises:
        ValueError: a name is not among the backbone's outputs, or as :func:`attach_mimic`.
    """
    if quantizer is not None:
        attach_quantizer(model.backbone, quantizer, quantized_features)
    if mimic is not None:
        attach = mimic.attach if isinstance(mimic, Mimic) else mimic
        attach(model)


def quantizer_arguments(cfg: CfgNode) -> Dict[str, Any]:
    """The arguments of :func:`attach_parts` for the quantizer that a config describes."""
    quantizer, node = build_quantizer(cfg), cfg.MODEL.QMIMIC.QUANTIZER
    return {
        "quantizer": quantizer if node.ON_BACKBONE else None,
        "quantized_features": tuple(node.IN_FEATURES or head_features(cfg)),
    }


def mimic_arguments(cfg: CfgNode) -> Dict[str, Any]:
    """The argument of :func:`attach_parts` for the mimic that a config describes."""
    return {"mimic": functools.partial(attach_mimic, cfg=cfg)}


def attached_mimic(model: nn.Module) -> Optional[Mimic]:
    """The mimic of a detector; None if it imitates no teacher."""
    mimic = getattr(model, NAME, None)
    return mimic if isinstance(mimic, Mimic) else None


def takes_a_teacher(model: nn.Module) -> bool:
    """Whether :func:`attach_mimic` was called with this detector, with or without a teacher in its config."""
    return isinstance(getattr(model, NAME, None), Attachment)


def warn_of_unused_teacher(cfg: CfgNode, model: nn.Module) -> None:
    """Warns if a config names a teacher but its model imitates none."""
    if cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE and not takes_a_teacher(model):
        logging.getLogger(__name__).warning(
            "MODEL.QMIMIC.TEACHER.CONFIG_FILE names a teacher, which nothing uses: MODEL.META_ARCHITECTURE is %r "
            "and none of those that imitate one, such as 'QuantMimicRCNN'",
            cfg.MODEL.META_ARCHITECTURE,
        )


def _build(
    model: nn.Module, cfg: CfgNode, distance: Optional[Callable[[Pair], Tensor]]
) -> Union[Mimic, AbsentMimic]:
    check_attachable(model)
    settings = MimicSettings.from_config(cfg)
    if not cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE:
        return AbsentMimic()
    check_detector(model, settings)
    names = cfg.MODEL.QMIMIC.MIMIC.IN_FEATURES or head_features(cfg)
    available = model.backbone.output_shape()
    check_features(names, available, "MODEL.QMIMIC.MIMIC.IN_FEATURES")
    try:
        shapes = teacher_shapes(cfg)
    except (FileNotFoundError, TeacherConfigError) as error:
        # An evaluation needs no teacher. A training raises this error again.
        logging.getLogger(__name__).info("no teacher, so this model can only evaluate: %s", error)
        return AbsentMimic(functools.partial(build_teacher, cfg))
    args = {"adapter": ""} if is_in_trunk(cfg) else {}
    # The adapter's initial weights must not change the random numbers of the rest of the training.
    with torch.random.fork_rng(devices=[]):
        return Mimic(cfg, {name: available[name] for name in names}, shapes, distance=distance, **args)
