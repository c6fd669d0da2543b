"""
Checks that stop a wrong setting before anything is written or trained.

Everything a training needs is looked at once, in the launching process: values, data sets, the model
and the teacher's files. What only construction can tell is told by constructing and throwing away.
"""

import difflib
import json
import os
from typing import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from qmimic_d2.engine.trainer import OPTIMIZERS, Trainer, build_evaluator
from qmimic_d2.modeling.teacher import FrozenTeacher

__all__ = ["check_run"]


def check_run(cfg: CfgNode, num_processes: int, *, eval_only: bool = False) -> None:
    """
    Raises where a run of this config could not go well.

    Args:
        cfg: frozen.
        num_processes: of the whole run, all machines together.
        eval_only: the run evaluates and trains nothing.

    Raises:
        ValueError, KeyError, FileNotFoundError: names the key, its value and the fix.
    """
    _check_solver(cfg, num_processes, eval_only)
    _check_datasets(cfg, eval_only)
    for name in cfg.DATASETS.TEST:
        _check_evaluator(cfg, name)
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    on_cpu.freeze()
    with torch.random.fork_rng(devices=[]):
        model = build_model(on_cpu)
        if not eval_only:
            Trainer.build_lr_scheduler(on_cpu, Trainer.build_optimizer(on_cpu, model))
        if cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE and not eval_only:
            FrozenTeacher(on_cpu)


def _check_solver(cfg: CfgNode, num_processes: int, eval_only: bool) -> None:
    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; choose one of {list(OPTIMIZERS)}"
        )
    images = cfg.SOLVER.IMS_PER_BATCH
    if not eval_only and (images < 1 or images % num_processes):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {num_processes} process(es) cannot share equally; "
            f"set it to a multiple of {num_processes}, or change --num-gpus / --num-processes"
        )
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ValueError(
            f"SOLVER.AMP.ENABLED is True and MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; Detectron2 trains with "
            "mixed precision on CUDA alone. Set SOLVER.AMP.ENABLED False"
        )


def _check_datasets(cfg: CfgNode, eval_only: bool) -> None:
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a registered data set to train on")
    if eval_only and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name a registered data set to evaluate on")
    used = [("DATASETS.TEST", name) for name in cfg.DATASETS.TEST]
    if not eval_only:
        used += [("DATASETS.TRAIN", name) for name in cfg.DATASETS.TRAIN]
    for key, name in used:
        if name not in DatasetCatalog.list():
            raise KeyError(_unknown_dataset(key, name, DatasetCatalog.list()))
    for key, name in used:
        path = MetadataCatalog.get(name).get("json_file", "")
        if path and PathManager.isfile(path):
            _check_coco_json(key, name, PathManager.get_local_path(path))


def _unknown_dataset(key: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)
    hint = f"near names are {near}" if near else f"registered are {sorted(known)}"
    return (
        f"{key} names {name!r}, which is not registered; {hint}. Register your own with "
        "detectron2.data.datasets.register_coco_instances before the training starts"
    )


def _check_coco_json(key: str, name: str, path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        missing = [part for part in ("images", "annotations", "categories") if part not in content]
        if missing or not all(isinstance(content[part], list) for part in content if part != "info"):
            raise ValueError(f"it has no list of {missing or 'images, annotations and categories'}")
        for image in content["images"][:1]:
            image["id"], image["file_name"], image["height"], image["width"]
        for annotation in content["annotations"][:1]:
            annotation["id"], annotation["image_id"], annotation["category_id"], annotation["bbox"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{key} names {name!r}, whose annotation file {os.path.abspath(path)} is not in COCO's "
            f"format: {type(error).__name__}: {error}. It must be JSON with the lists images (id, "
            "file_name, height, width), annotations (id, image_id, category_id, bbox) and categories"
        ) from error


def _check_evaluator(cfg: CfgNode, name: str) -> None:
    kind = MetadataCatalog.get(name).get("evaluator_type", "")
    if kind not in ("coco", "pascal_voc"):
        build_evaluator(cfg, name)  # raises, and says what to do
