"""
Checks that stop a wrong setting before anything is written or trained.

Everything a run needs is looked at once, in the launching process: values, data sets, the model, its
weights and the teacher's files. What only construction can tell is told by constructing and throwing away.
"""

import difflib
import warnings
from typing import Iterable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from qmimic_d2.engine.data_checks import check_datasets, model_classes
from qmimic_d2.engine.data_order import SAMPLERS
from qmimic_d2.engine.mimic_evaluator import MimicEvaluator
from qmimic_d2.engine.resuming import check_resuming
from qmimic_d2.engine.trainer import (
    OPTIMIZERS,
    Trainer,
    build_checkpointer,
    build_evaluator,
    load_evaluated_weights,
)
from qmimic_d2.modeling.mimic_student import warn_of_unused_teacher

__all__ = ["check_run"]


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
            if resume:
                check_resuming(cfg, Trainer.build_optimizer(on_cpu, model))
    # Last, since looking for the embedded data makes them.
    check_datasets(cfg, model_classes(cfg, model), eval_only=eval_only)


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
