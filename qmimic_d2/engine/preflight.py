"""
Checks that stop a wrong setting before anything is written or trained.

Everything a run needs is looked at once, in the launching process: values, data sets, the model, its
weights and the teacher's files. What only construction can tell is told by constructing and throwing away.
"""

import difflib
import json
import logging
import os
import warnings
from typing import Any, Dict, Iterable, NamedTuple, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.file_io import PathManager
from torch import nn

from qmimic_d2.data.pascal_voc import check_pascal_voc
from qmimic_d2.engine.data_order import SAMPLERS
from qmimic_d2.engine.mimic_evaluator import MimicEvaluator
from qmimic_d2.engine.trainer import (
    OPTIMIZERS,
    Trainer,
    build_checkpointer,
    build_evaluator,
    load_evaluated_weights,
)
from qmimic_d2.modeling.mimic_student import warn_of_unused_teacher

__all__ = ["check_run"]

# What detectron2.data.datasets.load_coco_json reads of every image and every annotation.
_COCO_ENTRIES = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


class _Classes(NamedTuple):
    """How many classes a model has, and the key that says so."""

    key: str
    number: int


def check_run(cfg: CfgNode, num_processes: int, *, eval_only: bool = False, resume: bool = False) -> None:
    """
    Raises where a run of this config could not go well.

    Args:
        cfg: frozen.
        num_processes: of the whole run, all machines together.
        eval_only: the run evaluates and trains nothing.
        resume: the run continues the one in OUTPUT_DIR, if there is one.

    Raises:
        ValueError, KeyError, FileNotFoundError: names the key, its value and the fix.
    """
    if not eval_only:
        cfg = _scaled(cfg, num_processes)
        _check_solver(cfg, num_processes)
    known = sorted(name for name, _ in META_ARCH_REGISTRY)
    _check_choice("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, known)
    _check_registered(cfg, eval_only)
    for name in cfg.DATASETS.TEST:
        _check_evaluator(cfg, name)
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    on_cpu.freeze()
    with torch.random.fork_rng(devices=[]):
        model = build_model(on_cpu)
        if eval_only:
            load_evaluated_weights(model, on_cpu, resume=resume)
        else:
            _check_optimizer(on_cpu, model)
            MimicEvaluator(on_cpu)  # raises at a wrong MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES
            model.train()  # a MimicStudent builds its teacher, and audits the weights
            warn_of_unused_teacher(cfg, model)
            build_checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    # Last, since looking for the embedded data makes them.
    if not eval_only:
        classes = _classes(cfg, model)
        for name in cfg.DATASETS.TRAIN:
            _check_annotations("DATASETS.TRAIN", name, classes)
    for name in cfg.DATASETS.TEST:
        _check_annotations("DATASETS.TEST", name)


def _classes(cfg: CfgNode, model: nn.Module) -> Optional[_Classes]:
    """None for a model of another project that keeps its number of classes elsewhere."""
    if hasattr(model, "roi_heads"):
        return _Classes("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    if isinstance(model, RetinaNet):
        return _Classes("MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES)
    if isinstance(model, FCOS):
        return _Classes("MODEL.FCOS.NUM_CLASSES", cfg.MODEL.FCOS.NUM_CLASSES)
    return None


def _scaled(cfg: CfgNode, num_processes: int) -> CfgNode:
    """The config as Detectron2 adapts it to the number of processes."""
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference < 0 or (reference > 0 and cfg.SOLVER.IMS_PER_BATCH % reference):
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, which {cfg.SOLVER.IMS_PER_BATCH} images of "
            "SOLVER.IMS_PER_BATCH cannot be shared by; set it to a divisor, or to 0 for no scaling"
        )
    return Trainer.auto_scale_workers(cfg, num_processes)


def _check_solver(cfg: CfgNode, num_processes: int) -> None:
    _check_choice("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, OPTIMIZERS)
    _check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS)
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}; give a number of iterations >= 1")
    images = cfg.SOLVER.IMS_PER_BATCH
    if images < 1 or images % num_processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {num_processes} process(es) cannot share equally; "
            f"set it to a multiple of {num_processes}, or change --num-gpus / --num-processes"
        )
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ValueError(
            f"SOLVER.AMP.ENABLED is True and MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; Detectron2 trains with "
            "mixed precision on CUDA alone. Set SOLVER.AMP.ENABLED False"
        )


def _check_choice(key: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{key} is {value!r}; choose one of {list(options)}")


def _check_optimizer(cfg: CfgNode, model: nn.Module) -> None:
    try:
        scheduler = Trainer.build_lr_scheduler(cfg, Trainer.build_optimizer(cfg, model))
        # behind the last step, where fvcore's schedule of NUM_DECAYS steps has no value
        scheduler.last_epoch = cfg.SOLVER.MAX_ITER - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no optimizer stepped before it
            scheduler.step()
    except Exception as error:  # fvcore and PyTorch assert, divide and raise, and name no key
        node = cfg.SOLVER
        raise ValueError(
            f"SOLVER gives no optimizer and schedule: {type(error).__name__}: {error}. Correct "
            f"SOLVER.OPTIMIZER {node.OPTIMIZER!r}, LR_SCHEDULER_NAME {node.LR_SCHEDULER_NAME!r}, BASE_LR "
            f"{node.BASE_LR}, BASE_LR_END {node.BASE_LR_END}, STEPS {node.STEPS}, MAX_ITER {node.MAX_ITER} "
            "or the WARMUP_ and CLIP_GRADIENTS keys"
        ) from error


def _check_registered(cfg: CfgNode, eval_only: bool) -> None:
    key, names = ("DATASETS.TEST", cfg.DATASETS.TEST) if eval_only else ("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError(f"{key} is {names}; name a registered data set")
    known = DatasetCatalog.list()
    for key, name in [(key, name) for name in names] + [("DATASETS.TEST", name) for name in cfg.DATASETS.TEST]:
        if name not in known:
            raise KeyError(_unknown_dataset(key, name, known))


def _unknown_dataset(key: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)
    hint = f"near names are {near}" if near else f"registered are {sorted(known)}"
    return (
        f"{key} names {name!r}, which is not registered; {hint}. Register your own with "
        "detectron2.data.datasets.register_coco_instances before the training starts"
    )


def _check_evaluator(cfg: CfgNode, name: str) -> None:
    kind = MetadataCatalog.get(name).get("evaluator_type", "")
    if kind not in ("coco", "pascal_voc"):
        build_evaluator(cfg, name)  # raises, and says what to do


def _check_annotations(key: str, name: str, classes: Optional[_Classes] = None) -> None:
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file", "")
    is_coco = bool(path)
    kind = metadata.get("evaluator_type", "")
    if kind == "pascal_voc":
        _check_pascal_voc(key, name, metadata)
        if classes:
            _check_classes(key, name, metadata.thing_classes, len(metadata.thing_classes), classes)
    elif kind == "wider_face":
        path = metadata.get("annotation_file", "")
    if not path:
        return
    path = PathManager.get_local_path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{key} names {name!r}, whose annotations are looked for in {os.path.abspath(path)}, and there is "
            "no such file. Put the data there; for Detectron2's own data sets, set the environment variable "
            "DETECTRON2_DATASETS to the folder that holds them"
        )
    if is_coco:
        content = _read_coco_json(key, name, path)
        if classes:
            by_id = {each["id"]: each["name"] for each in content["categories"]}
            order = sorted(by_id)  # as load_coco_json numbers them
            found = {each.get("category_id") for each in content["annotations"] if not each.get("iscrowd", 0)}
            used = [index for index, category in enumerate(order, 1) if category in found]
            _check_classes(key, name, [by_id[each] for each in order], max(used, default=0), classes)


def _check_classes(key: str, name: str, names: Sequence[str], used: int, classes: _Classes) -> None:
    """
    Args:
        names: of the data set's classes, in the order of their labels.
        used: number of them up to the last that an annotation has.
    """
    if used > classes.number:
        raise ValueError(
            f"{classes.key} is {classes.number}, and {key} names {name!r}, which has {len(names)} classes, "
            f"{names[used - 1]!r} the last that is annotated; set it to {len(names)}. With too few, a label is out of "
            "bounds, or is that of the background"
        )
    if len(names) < classes.number:
        logging.getLogger(__name__).warning(
            "%s is %d, and %s names %r, which has %d classes: the others are never learned",
            *(classes.key, classes.number, key, name, len(names)),
        )


def _check_pascal_voc(key: str, name: str, metadata: Metadata) -> None:
    folder = PathManager.get_local_path(metadata.dirname)
    try:
        check_pascal_voc(folder, metadata.split, metadata.year)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{key} names {name!r}, and {error}") from error


def _read_coco_json(key: str, name: str, path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        # Test sets without annotations exist: their detections are only written.
        is_optional = key == "DATASETS.TEST" and "annotations" not in content
        for part, entries in _COCO_ENTRIES.items():
            if not (part == "annotations" and is_optional):
                _check_coco_part(content, part, entries)
        if not content["images"]:
            raise ValueError("its list of images is empty")
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{key} names {name!r}, whose annotation file {os.path.abspath(path)} is not in COCO's "
            f"format: {type(error).__name__}: {error}. It must be JSON with the lists images (id, "
            "file_name, height, width), annotations (id, image_id, category_id, bbox) and categories (id, name)"
        ) from error


def _check_coco_part(content: Dict[str, Any], part: str, entries: Iterable[str]) -> None:
    if not isinstance(content.get(part) if isinstance(content, dict) else None, list):
        raise ValueError(f"it has no list {part!r}")
    for item in content[part][:1]:
        missing = [entry for entry in entries if entry not in item]
        if missing:
            raise ValueError(f"the first of its {part} has no {missing}")
