"""
The student alone as Detectron2's own two files: weights and a YAML.

With backbone, proposal generator and heads of Detectron2 and without a quantizer, both load in a Detectron2
that has never heard of this package; whether that is so is not deduced but tried: the stock model is built,
loaded and run beside the student.
"""

import logging
import os
from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from qmimic_d2.checkpoint.training_entries import TRAINING_ONLY
from qmimic_d2.config import default_config
from qmimic_d2.config_files import changed
from qmimic_d2.export.network import detect
from qmimic_d2.files import whole_file, write_text
from qmimic_d2.modeling.checkpointer import build_checkpointer
from qmimic_d2.modeling.family import QUANT_MIMIC, quantized_name
from qmimic_d2.modeling.quantizer_hook import attached_quantizer
from qmimic_d2.modeling.trunk_adapter import is_in_trunk, trunk_channels, without_teacher
from qmimic_d2.run_folder import CONFIG as CONFIG_NAME

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "StudentExport", "build_student", "export_student", "student_config"]

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.pth"

# Where the modules of a stock model come from.
_STOCK_PACKAGES = ("detectron2", "fvcore", "torch", "torchvision")

# Backbones of this package that one of Detectron2's may equal, once its widths are written out.
_STOCK_BACKBONES = {
    "build_divided_resnet_backbone": "build_resnet_backbone",
    "build_divided_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_divided_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
}
_BASIC_DEPTHS = (18, 34)

# Height and width of the picture on which the stock model must give what the student gives.
_TRIAL_SIZE = (96, 128)


@dataclass(frozen=True)
class StudentExport:
    """
    Attributes:
        cfg: as written to the YAML, without ``MODEL.WEIGHTS``.
        needs_package: why stock Detectron2 cannot load it, one sentence each; empty where it can.
    """

    cfg: CfgNode
    needs_package: Tuple[str, ...]

    @property
    def is_stock(self) -> bool:
        """Whether Detectron2 loads it without this package."""
        return not self.needs_package


def build_student(cfg: CfgNode, *, weights_key: str = "MODEL.WEIGHTS", device: str = "") -> nn.Module:
    """
    Builds the detector of a training's config alone, in evaluation mode, with its weights.

    Args:
        cfg: of the training; no file of a teacher is needed.
        weights_key: where the user gave ``cfg.MODEL.WEIGHTS``, for error messages.
        device: in place of MODEL.DEVICE; "" leaves it.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing, cut short, or of another config.
    """
    cfg = changed(without_teacher(cfg), *(("MODEL.DEVICE", device) if device else ()))
    model = build_model(cfg).eval()
    build_checkpointer(model, "").load_for_evaluation(cfg.MODEL.WEIGHTS, weights_key)
    return model


def export_student(cfg: CfgNode, model: nn.Module, folder: str) -> StudentExport:
    """
    Writes ``model.pth`` and ``config.yaml``; each appears when it is complete, the YAML last.

    ``MODEL.WEIGHTS`` in the YAML is the absolute path of the weights; the two files may be moved together
    for ``python -m qmimic_d2 predict --model``, which then looks beside the YAML. Detectron2 itself needs
    ``MODEL.WEIGHTS`` to be corrected.

    Args:
        cfg: of the training, with the sizes of ``INPUT`` to ship.
        model: of this config, from :func:`build_student`.
        folder: that exists.

    Returns:
        The config, and what of it needs this package.
    """
    student = student_config(cfg, model)
    weights = os.path.join(folder, WEIGHTS_NAME)
    written = changed(student.cfg, "MODEL.WEIGHTS", os.path.abspath(weights))
    with whole_file(weights) as partial:
        torch.save({"model": model.state_dict(), "__author__": "qmimic_d2"}, partial)
    write_text(os.path.join(folder, CONFIG_NAME), written.dump())
    logger.info("Wrote %s and %s", weights, CONFIG_NAME)
    return student


def student_config(cfg: CfgNode, model: nn.Module) -> StudentExport:
    """
    The config of the student alone: a stock one where Detectron2 can build it, else one of this package.

    Args:
        cfg: of the training.
        model: the detector, with its quantizer kept or dropped.
    """
    reasons = _foreign_parts(model)
    if not reasons:
        candidate = _stock_config(cfg, model)
        reason = _difference_from_stock(candidate, model)
        if reason is None:
            return StudentExport(candidate, ())
        reasons.append(f"the backbone {cfg.MODEL.BACKBONE.NAME} (MODEL.BACKBONE.NAME): {reason}")
    return StudentExport(_package_config(cfg, model), tuple(reasons))


def _foreign_parts(model: nn.Module) -> List[str]:
    """The parts of a model that are not Detectron2's, the outermost module of each."""
    reasons, inside = [], ()
    hook = attached_quantizer(model.backbone)
    if hook is not None:
        reasons.append(f"the quantizer of {', '.join(hook.features)} (--quantizer drop leaves it out)")
    for name, module in model.named_modules():
        owner = type(module).__module__.partition(".")[0]
        is_shipped = bool(name) and not f"{name}.".startswith(TRAINING_ONLY)
        if not is_shipped or owner in _STOCK_PACKAGES or name.startswith(inside):
            continue
        inside = (*inside, name + ".")
        reasons.append(f"{name} is a {type(module).__name__} of {type(module).__module__}")
    return reasons


def _stock_config(cfg: CfgNode, model: nn.Module) -> CfgNode:
    """The keys of ``cfg`` that Detectron2 has, with the widths of a divided backbone written out."""
    stock = get_cfg()
    _copy_known(cfg, stock)
    stock.MODEL.META_ARCHITECTURE = _registered_ancestor(model)
    stock.MODEL.WEIGHTS = ""
    stock.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    if cfg.MODEL.BACKBONE.NAME in _STOCK_BACKBONES:
        stock.MODEL.BACKBONE.NAME = _STOCK_BACKBONES[cfg.MODEL.BACKBONE.NAME]
        node, divisor = stock.MODEL.RESNETS, cfg.MODEL.RESNETS.WIDTH_DIVISOR
        if node.DEPTH in _BASIC_DEPTHS:
            node.RES2_OUT_CHANNELS = 64
        for key in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP"):
            node[key] //= divisor
    return stock


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    """Overwrites every value of ``target`` for which ``source`` has one."""
    for key in target:
        if key not in source:
            continue
        if isinstance(target[key], CfgNode):
            _copy_known(source[key], target[key])
        else:
            target[key] = source[key]


def _registered_ancestor(model: nn.Module) -> str:
    """The nearest of Detectron2's registered meta-architectures that a model's class derives from."""
    for each in type(model).__mro__:
        name = each.__name__
        is_registered = name in META_ARCH_REGISTRY and META_ARCH_REGISTRY.get(name) is each
        if is_registered and each.__module__.partition(".")[0] == "detectron2":
            return name
    return ""


def _difference_from_stock(candidate: CfgNode, model: nn.Module) -> Optional[str]:
    """Why the stock model of a config is not this one; None where they are the same to the last bit."""
    try:
        with torch.random.fork_rng(devices=[]):
            stock = build_model(changed(candidate, "MODEL.DEVICE", "cpu")).eval()
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        depth = candidate.MODEL.RESNETS.DEPTH
        if depth in _BASIC_DEPTHS and candidate.MODEL.RESNETS.RES2_OUT_CHANNELS != 64:
            return f"Detectron2 fixes the widths of ResNet-{depth}, and this one's are divided"
        return f"Detectron2 does not build it ({type(error).__name__}: {error})"
    own, other = model.state_dict(), stock.state_dict()
    if list(own) != list(other) or any(own[name].shape != other[name].shape for name in own):
        return "Detectron2's has other parameters"
    stock.load_state_dict(own)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *_TRIAL_SIZE), generator=generator).float()
    with torch.no_grad():
        try:
            outputs = _everything
            ours = outputs(model, image)
        except ValueError:  # masks and keypoints, which detect() refuses: the features tell enough
            outputs = _features
            ours = outputs(model, image)
        try:
            theirs = outputs(stock, image)
        except Exception as error:  # whatever it is that Detectron2 cannot do with these keys
            return f"Detectron2's fails on an image ({type(error).__name__}: {error})"
    return None if all(map(_equal, ours, theirs)) else "Detectron2's computes something else from the same parameters"


def _features(model: nn.Module, image: torch.Tensor) -> List[torch.Tensor]:
    return list(model.backbone(model.preprocess_image([{"image": image}]).tensor).values())


def _everything(model: nn.Module, image: torch.Tensor) -> List[torch.Tensor]:
    return [*_features(model, image), *detect(model, image)]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _package_config(cfg: CfgNode, model: nn.Module) -> CfgNode:
    """The config with the detector's meta-architecture of this package, and nothing about a teacher."""
    fresh = default_config()
    student = cfg.clone()
    student.defrost()
    node = student.MODEL.QMIMIC
    for key in fresh.MODEL.QMIMIC:
        if key != "QUANTIZER":
            node[key] = fresh.MODEL.QMIMIC[key]
    if is_in_trunk(cfg):  # then the adapter ships
        for key in ("IN_FEATURES", "ADAPTER", "ADAPTER_PLACEMENT"):
            node.MIMIC[key] = cfg.MODEL.QMIMIC.MIMIC[key]
        node.MIMIC.TRUNK_CHANNELS = list(trunk_channels(cfg).values())
    if attached_quantizer(model.backbone) is None:
        node.QUANTIZER = fresh.MODEL.QMIMIC.QUANTIZER
        node.QUANTIZER.NAME = ""
    node.QUANTIZER.ON_BACKBONE = True
    student.MODEL.META_ARCHITECTURE = _package_architecture(model)
    if student.MODEL.META_ARCHITECTURE == QUANT_MIMIC:
        node.META_ARCHITECTURE = type(model).__name__
    student.MODEL.WEIGHTS = ""
    student.OUTPUT_DIR = fresh.OUTPUT_DIR
    return student


def _package_architecture(model: nn.Module) -> str:
    """
    The model's own without the mimic; for one of Detectron2's, the class of this package that derives from it
    and adds a quantizer alone (which may be none). Any other detector is built by QuantMimic if it has a quantizer.
    """
    other = type(model).__name__ if attached_quantizer(model.backbone) is None else QUANT_MIMIC
    return quantized_name(model) or other
