"""The configs of a distillation, and the commands over them."""

import os
import sys
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.layers import ShapeSpec

from qmimic_d2.config_files import train_net_script
from qmimic_d2.data.sources import Source
from qmimic_d2.distill.choices import Choice, Settings
from qmimic_d2.distill.yaml_text import config_text
from qmimic_d2.run_folder import CONFIG, FINAL_CHECKPOINT

__all__ = ["GivenTeacher", "Step", "config_texts", "plan_steps", "student_maps"]

# Stride in units of the features' rms that cost no AP in the evidence (docs/evidence.md, "The stride").
RELATIVE_STRIDE = 0.55
# By stride of the map in pixels: its name in an FPN.
_LEVELS = {8: "p3", 16: "p4", 32: "p5"}


@dataclass(frozen=True)
class GivenTeacher:
    """
    A teacher that the user has.

    Attributes:
        config_file, weights: absolute paths, or addresses of weights.
        maps: of its backbone, by name.
    """

    config_file: str
    weights: str
    maps: Mapping[str, ShapeSpec]


@dataclass(frozen=True)
class Step:
    """
    Attributes:
        name: of the step.
        command: arguments.
        needs: names of the steps before it.
        folder: of a training; "" for other commands.
    """

    name: str
    command: Tuple[str, ...]
    needs: Tuple[str, ...] = ()
    folder: str = ""


def student_maps(teacher: GivenTeacher) -> Tuple[List[str], List[str]]:
    """
    The maps of a student that meet a given teacher's, and those of the teacher, in the same order.

    Returns:
        (["conv5"], [name]) for a teacher of one map; levels p3 to p5 for an FPN.

    Raises:
        ValueError: no map of the teacher has a stride that a student can have; says what to change.
    """
    if len(teacher.maps) == 1:
        ((name, shape),) = teacher.maps.items()
        if shape.stride not in (8, 16):
            raise ValueError(
                f"--teacher {teacher.config_file} gives its heads the map {name!r} of stride {shape.stride}, and a "
                "student of one map has stride 8 or 16. Train a teacher of such a stride, or one with an FPN"
            )
        return ["conv5"], [name]
    by_stride = {shape.stride: name for name, shape in teacher.maps.items()}
    common = [stride for stride in _LEVELS if stride in by_stride]
    if not common:
        raise ValueError(
            f"--teacher {teacher.config_file} has maps of the strides {sorted(by_stride)}, and a student with an FPN "
            f"has {list(_LEVELS)}. Train a teacher with one of them"
        )
    return [_LEVELS[stride] for stride in common], [by_stride[stride] for stride in common]


def config_texts(
    sources: Sequence[Source], settings: Settings, output: str, teacher: Optional[GivenTeacher], device: str, seed: int
) -> Dict[str, str]:
    """
    The YAML files, by name.

    Args:
        sources: the training set and the test set.
        settings: as :func:`qmimic_d2.distill.choices.choose_settings` gives them.
        output: absolute path of the folder.
        teacher: the user's; None: one is trained.
        device: for MODEL.DEVICE.
        seed: of every training.
    """
    train, test = sources
    texts = {"data.yaml": config_text("What every model has in common.", _common(train, test, settings, device, seed))}
    is_fpn = teacher is not None and len(teacher.maps) > 1
    network = _fpn(settings) if is_fpn else []
    if teacher is None:
        own = [*settings.teacher, _output(output, "teacher")]
        texts["teacher.yaml"] = config_text("The teacher.", own, "data.yaml")
    scratch = [*settings.student, *network, _output(output, "scratch")]
    texts["scratch.yaml"] = config_text("The student without a teacher, to compare with.", scratch, "data.yaml")
    mimic = [*_mimic(settings, teacher, output, is_fpn), _output(output, "student")]
    texts["student.yaml"] = config_text("The student, by quantization mimic.", mimic, "scratch.yaml")
    return texts


def plan_steps(output: str, has_teacher: bool, test: str, compares: bool) -> List[Step]:
    """
    The commands, in their order.

    Args:
        output: absolute path of the folder with the configs.
        has_teacher: whether the user has one; otherwise one is trained.
        test: name of the test set.
        compares: whether a student from scratch is trained as well.
    """
    runs = {} if has_teacher else {"teacher": ()}
    runs["student"] = tuple(runs)
    if compares:
        runs["scratch"] = ()
    steps = [
        Step(
            name,
            (sys.executable, train_net_script(), "--config-file", os.path.join(output, f"{name}.yaml")),
            needs,
            os.path.join(output, name),
        )
        for name, needs in runs.items()
    ]
    package = (sys.executable, "-m", "qmimic_d2")
    student, device = os.path.join(output, "student"), os.path.join(output, "device")
    # the run's own config has the measured stride
    model = ("--config-file", os.path.join(student, CONFIG), "--weights", os.path.join(student, FINAL_CHECKPOINT))
    export = (*package, "export", *model, "--output", device)
    forms = ("--format", "onnx", "onnx-int8", "--verify", test)
    steps.append(Step("export", (*export, *forms), ("student",)))
    page = (*package, "report", *(f"{name}={os.path.join(output, name)}" for name in runs))
    steps.append(Step("page", (*page, "--sources", "--output", os.path.join(output, "report.html")), tuple(runs)))
    return steps


def _common(train: Source, test: Source, settings: Settings, device: str, seed: int) -> List[Choice]:
    entries = [train.to_entry(), test.to_entry()]
    return [
        Choice("DATASETS.SOURCES", entries, ""),
        Choice("DATASETS.TRAIN", [train.name], ""),
        Choice("DATASETS.TEST", [test.name], ""),
        Choice("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "Faster R-CNN"),
        Choice("MODEL.DEVICE", device, "what is here"),
        Choice("MODEL.MASK_ON", False, ""),
        Choice("MODEL.PIXEL_MEAN", [127.5, 127.5, 127.5], "the middle of the grey levels"),
        Choice("MODEL.PIXEL_STD", [64.0, 64.0, 64.0], "about their spread in photographs"),
        Choice("MODEL.BACKBONE.NAME", "build_vgg_backbone", ""),
        Choice("MODEL.VGG.DEPTH", 11, "plain networks of more layers learn more slowly from few images"),
        Choice("MODEL.VGG.NORM", "BN", "it is trained from random weights"),
        Choice("MODEL.VGG.OUT_FEATURES", ["conv5"], ""),
        Choice("MODEL.RPN.IN_FEATURES", ["conv5"], ""),
        Choice("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 128, "enough for small images"),
        Choice("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 600, ""),
        Choice("MODEL.RPN.PRE_NMS_TOPK_TEST", 400, ""),
        Choice("MODEL.RPN.POST_NMS_TOPK_TRAIN", 150, ""),
        Choice("MODEL.RPN.POST_NMS_TOPK_TEST", 100, ""),
        Choice("MODEL.ROI_HEADS.NAME", "StandardROIHeads", ""),
        Choice("MODEL.ROI_HEADS.IN_FEATURES", ["conv5"], ""),
        Choice("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64, ""),
        Choice("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5, ""),
        Choice("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", ""),
        Choice("MODEL.ROI_BOX_HEAD.NUM_FC", 1, ""),
        Choice("MODEL.ROI_BOX_HEAD.FC_DIM", 128, ""),
        Choice("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7, ""),
        *settings.shared,
        Choice("DATALOADER.NUM_WORKERS", 0 if device == "cpu" else 4, "on a CPU they would take its cores"),
        Choice("SOLVER.OPTIMIZER", "AdamW", "needs the least care from random weights"),
        Choice("SOLVER.BASE_LR", 0.004 * settings.batch / 8.0, "0.004 for 8 images did best on the digits"),
        Choice("SOLVER.WEIGHT_DECAY", 0.0001, ""),
        Choice("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "no steps to choose"),
        Choice("SOLVER.CLIP_GRADIENTS.ENABLED", True, "a bad batch does no harm"),
        Choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", ""),
        Choice("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0, ""),
        Choice("SEED", seed, ""),
        Choice("VERSION", 2, ""),
    ]


def _fpn(settings: Settings) -> List[Choice]:
    """A student with the levels p3, p4 and p5."""
    levels = list(_LEVELS.values())
    ((sizes,),) = [choice.value for choice in settings.shared if choice.key == "MODEL.ANCHOR_GENERATOR.SIZES"]
    why = "the teacher has an FPN"
    return [
        Choice("MODEL.BACKBONE.NAME", "build_vgg_fpn_backbone", why),
        Choice("MODEL.VGG.STAGE_STRIDES", [2, 1, 2, 2, 2], "levels of 8, 16 and 32 pixels"),
        Choice("MODEL.VGG.OUT_FEATURES", ["conv4", "conv5"], ""),
        Choice("MODEL.FPN.IN_FEATURES", ["conv4", "conv5"], ""),
        Choice("MODEL.FPN.OUT_CHANNELS", 32, "as narrow as the backbone"),
        Choice("MODEL.FPN.NORM", "BN", ""),
        Choice("MODEL.RPN.IN_FEATURES", levels, ""),
        Choice("MODEL.ROI_HEADS.IN_FEATURES", levels, ""),
        Choice("MODEL.ANCHOR_GENERATOR.SIZES", [[size] for size in sizes], "one for each level"),
    ]


def _mimic(settings: Settings, teacher: Optional[GivenTeacher], output: str, is_fpn: bool) -> List[Choice]:
    node = "MODEL.QMIMIC"
    config, weights = os.path.join(output, "teacher.yaml"), os.path.join(output, "teacher", FINAL_CHECKPOINT)
    choices = [
        Choice("MODEL.META_ARCHITECTURE", "QuantMimicRCNN", ""),
        Choice(f"{node}.TEACHER.CONFIG_FILE", teacher.config_file if teacher else config, ""),
        Choice(f"{node}.TEACHER.WEIGHTS", teacher.weights if teacher else weights, ""),
        Choice(f"{node}.QUANTIZER.NAME", "Uniform", ""),
        Choice(
            f"{node}.QUANTIZER.RELATIVE_STRIDE",
            RELATIVE_STRIDE,
            "times the rms of the teacher's features: measured when the training begins",
        ),
        Choice(f"{node}.MIMIC.SCHEDULE", "balanced", "no loss weight to choose"),
        Choice(f"{node}.MIMIC.NORMALIZE_BY", "target", "a relative error, whatever the teacher's scale"),
        Choice(f"{node}.MIMIC.MAX_ROIS_PER_IMAGE", 32, "foreground first"),
        Choice(f"{node}.MIMIC.POOLER_RESOLUTION", 4, "enough for small objects"),
    ]
    if teacher is not None:
        own, theirs = student_maps(teacher)
        choices.append(Choice(f"{node}.MIMIC.IN_FEATURES", own, "levels that both have" if is_fpn else ""))
        choices.append(Choice(f"{node}.MIMIC.TEACHER_IN_FEATURES", theirs, "of the same strides"))
        if is_fpn:
            choices.append(Choice(f"{node}.QUANTIZER.SIGNED", True, "no ReLU ends an FPN"))
        elif next(iter(teacher.maps.values())).stride == 16:
            choices.append(Choice("MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 1], "the teacher's map has stride 16"))
        else:
            choices.append(Choice("MODEL.VGG.STAGE_STRIDES", [2, 1, 2, 2, 1], "the teacher's map has stride 8"))
    return choices


def _output(output: str, name: str) -> Choice:
    return Choice("OUTPUT_DIR", os.path.join(output, name), "")
