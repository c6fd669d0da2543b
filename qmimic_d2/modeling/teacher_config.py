"""The teacher's own config, YAML or LazyConfig, read into what a frozen teacher is built from."""

import logging
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    ProposalNetwork,
    build_backbone,
    build_proposal_generator,
)
from detectron2.utils.logger import log_first_n
from torch import nn

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.config_files import find_config_file
from qmimic_d2.modeling.head_features import is_meta_architecture
from qmimic_d2.modeling.quantized_detector import QuantizedDetector

__all__ = ["TeacherConfig", "load_teacher_config"]

_KEY = "MODEL.QMIMIC.TEACHER.CONFIG_FILE"


@dataclass
class TeacherConfig:
    """
    What of a teacher's config matters to the mimic.

    Attributes:
        path: absolute path of the config file.
        build_backbone: builds the backbone with random weights.
        build_proposal_generator: the same of the proposal generator, from the backbone's output shapes; gives None
            where the detector has none.
        weights: checkpoint that the config names; "" when it names none.
        pixel_mean, pixel_std: of the teacher's own preprocessing, in units of the pixel values.
        input_format: channel order, for example "BGR".
        dump: the whole config as YAML, OPTS applied; "" for a LazyConfig, whose Python is its only form.
    """

    path: str
    build_backbone: Callable[[], Backbone]
    build_proposal_generator: Callable[[Dict[str, ShapeSpec]], Optional[nn.Module]]
    weights: str
    pixel_mean: Tuple[float, ...]
    pixel_std: Tuple[float, ...]
    input_format: str
    dump: str = ""


def load_teacher_config(cfg: CfgNode) -> TeacherConfig:
    """
    Reads the teacher's config that a student's ``cfg.MODEL.QMIMIC.TEACHER`` names.

    Raises:
        FileNotFoundError: the file, or one it builds on, does not exist; names the key and where it
            was looked for.
        ValueError: it cannot be read, or an entry of TEACHER.OPTS does not fit it.
    """
    node = cfg.MODEL.QMIMIC.TEACHER
    path = find_config_file(node.CONFIG_FILE, _KEY)
    read = _read_lazy if path.endswith(".py") else _read_yaml
    try:
        return read(path, list(node.OPTS), cfg)
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"{_KEY} is {path!r}, which cannot be read as a Detectron2 config with "
            f"MODEL.QMIMIC.TEACHER.OPTS {list(node.OPTS)}: {type(error).__name__}: {error}. Give the YAML "
            "or LazyConfig .py that the teacher was trained with"
        ) from error


def _read_yaml(path: str, opts: List[str], student_cfg: CfgNode) -> TeacherConfig:
    teacher = get_cfg()
    add_qmimic_config(teacher)
    teacher.merge_from_file(path)
    teacher.merge_from_list(opts)
    _warn_of_other_codes(path, teacher, student_cfg)
    teacher.MODEL.DEVICE = student_cfg.MODEL.DEVICE
    teacher.freeze()
    return TeacherConfig(
        path=path,
        build_backbone=lambda: build_backbone(teacher),
        build_proposal_generator=lambda shapes: _build_generator(teacher, shapes),
        weights=teacher.MODEL.WEIGHTS,
        pixel_mean=tuple(teacher.MODEL.PIXEL_MEAN),
        pixel_std=tuple(teacher.MODEL.PIXEL_STD),
        input_format=teacher.INPUT.FORMAT,
        dump=teacher.dump(),
    )


def _read_lazy(path: str, opts: List[str], student_cfg: CfgNode) -> TeacherConfig:
    teacher = LazyConfig.load(path)
    teacher = LazyConfig.apply_overrides(teacher, opts)
    model = teacher.model
    return TeacherConfig(
        path=path,
        build_backbone=lambda: instantiate(model.backbone),
        build_proposal_generator=lambda shapes: instantiate(model.get("proposal_generator", None)),
        weights=str(teacher.get("train", {}).get("init_checkpoint", "") or ""),
        pixel_mean=tuple(_numbers(model.pixel_mean)),
        pixel_std=tuple(_numbers(model.pixel_std)),
        input_format=model.get("input_format", None) or "BGR",
    )


def _build_generator(teacher: CfgNode, shapes: Dict[str, ShapeSpec]) -> Optional[nn.Module]:
    # RPN is the default of the key even of a one-stage detector, which has none
    has_one = issubclass(META_ARCH_REGISTRY.get(teacher.MODEL.META_ARCHITECTURE), (GeneralizedRCNN, ProposalNetwork))
    return build_proposal_generator(teacher, shapes) if has_one else None


def _numbers(values: Sequence[float]) -> List[float]:
    return [float(value) for value in values]


def _warn_of_other_codes(path: str, teacher: CfgNode, student: CfgNode) -> None:
    """The student's node decides on codes; a teacher that was trained with others should be known."""
    if not is_meta_architecture(teacher, QuantizedDetector):
        return
    theirs, ours = teacher.MODEL.QMIMIC.QUANTIZER, student.MODEL.QMIMIC.QUANTIZER
    names = ("NAME", "STRIDE", "NUM_CODES", "SIGNED")
    differing = {name: (theirs[name], ours[name]) for name in names if theirs[name] != ours[name]}
    if differing:
        # once: a config is read for its shapes, for its copy in OUTPUT_DIR and for the teacher itself
        log_first_n(
            logging.WARNING,
            f"MODEL.QMIMIC.QUANTIZER of the teacher's config {path} differs from the student's, which is "
            f"in force (teacher's value, student's value): {differing}",
            name=__name__,
            key="message",
        )
