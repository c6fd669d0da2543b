"""
Checks that stop a wrong setting before anything is written or trained.

The launching process looks at everything that a run needs: values, data sets, the model, its weights and the teacher's
files. What only shows in construction is built here and thrown away.
"""

from typing import Sequence, Type

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from qmimic_d2.checkpoint.reader import local_path, read_mapping
from qmimic_d2.data.resumable_loader import SAMPLERS
from qmimic_d2.engine.checks.data import check_datasets, model_classes
from qmimic_d2.engine.checks.key_values import check_values
from qmimic_d2.engine.checks.output_folder import check_output_dir
from qmimic_d2.engine.checks.rehearsal import Rehearsal, without_a_trace
from qmimic_d2.engine.resuming import check_resuming
from qmimic_d2.engine.trackers import check_trackers
from qmimic_d2.engine.trainer import (
    OPTIMIZERS,
    Trainer,
    build_evaluator,
    load_evaluated_weights,
)
from qmimic_d2.error_text import one_line
from qmimic_d2.modeling.attach import warn_of_unused_teacher
from qmimic_d2.modeling.checkpointer import build_checkpointer
from qmimic_d2.near_names import check_registered
from qmimic_d2.yaml.config import flat_keys

__all__ = ["check_run"]


def check_run(
    cfg: CfgNode,
    num_processes: int,
    *,
    eval_only: bool = False,
    resume: bool = False,
    trainer: Type[Trainer] = Trainer,
) -> None:
    """
    Raises where a run of this config could not go well.

    Args:
        cfg: frozen.
        num_processes: of the whole run, all machines together.
        eval_only: the run evaluates and trains nothing.
        resume: the run continues the one in OUTPUT_DIR, if there is one.
        trainer: class of the run's trainer; its ``build_`` methods are rehearsed.

    Raises:
        ValueError, KeyError, FileNotFoundError: names the key, its value and the fix.
    """
    check_values(cfg, num_processes)
    check_output_dir(cfg.OUTPUT_DIR)
    _check_device(cfg)
    if not eval_only:
        cfg = _scaled(cfg, num_processes)
        _check_solver(cfg, num_processes)
        check_trackers(cfg)
    known = sorted(name for name, _ in META_ARCH_REGISTRY)
    _check_choice("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, known)
    _check_registered(cfg, eval_only)
    for name in cfg.DATASETS.TEST:
        _check_evaluator(cfg, name)
    _check_proposals(cfg, eval_only)
    rehearsal = Rehearsal(cfg, num_processes, trainer)
    with without_a_trace():
        model = rehearsal.build()
    if eval_only:
        load_evaluated_weights(model, cfg, resume=resume)
    else:
        with without_a_trace():
            rehearsal.optimize(model)
            model.train()  # the mimic builds its teacher, and audits the weights
        _check_norms(cfg, model, num_processes)
        warn_of_unused_teacher(cfg, model)
        build_checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        if resume:
            check_resuming(cfg, trainer.build_optimizer(cfg, model))
    # After the model, since looking for the embedded data makes them.
    check_datasets(cfg, model_classes(cfg, model), eval_only=eval_only)
    with without_a_trace():
        if not eval_only:
            rehearsal.train(model)
        rehearsal.evaluate(model)


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


def _check_device(cfg: CfgNode) -> None:
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.zeros(1, device=device).item()  # "meta" has no values
        elif (device.index or 0) >= torch.cuda.device_count():  # counting occupies no GPU, a tensor would
            raise RuntimeError(f"this machine has {torch.cuda.device_count()} CUDA device(s) that PyTorch sees")
    except Exception as error:  # each kind of device raises its own
        raise ValueError(
            f"MODEL.DEVICE is {name!r}, which cannot be used: {one_line(error)}. Give 'cpu' or 'cuda'"
        ) from error


def _check_proposals(cfg: CfgNode, eval_only: bool) -> None:
    """Detectron2 reads these files by pickle, which runs code in them. A reader that runs none reads them first."""
    if not cfg.MODEL.LOAD_PROPOSALS:
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
            raise ValueError(
                "MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals' and MODEL.LOAD_PROPOSALS is False; set it to "
                "True, and name a file for each data set in DATASETS.PROPOSAL_FILES_TRAIN and _TEST"
            )
        return
    for part in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        key, names = f"DATASETS.PROPOSAL_FILES_{part}", cfg.DATASETS[part]
        files = cfg.DATASETS[f"PROPOSAL_FILES_{part}"]
        if len(files) != len(names):
            raise ValueError(
                f"{key} is {files}, and MODEL.LOAD_PROPOSALS is True; give one file for each of DATASETS.{part} {names}"
            )
        for path in files:
            proposals = read_mapping(local_path(path, key), path, key)
            if "boxes" not in proposals or not {"ids", "indexes"} & set(proposals):
                raise ValueError(
                    f"{key} names {path!r}, which holds {sorted(proposals)}; a file of proposals is a pickled dict of "
                    "ids, boxes, objectness_logits and bbox_mode"
                )


def _check_norms(cfg: CfgNode, model: nn.Module, num_processes: int) -> None:
    if num_processes > 1 and cfg.MODEL.DEVICE.startswith("cpu"):
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                keys = [key for key, value in flat_keys(cfg).items() if value == "SyncBN"]
                raise ValueError(
                    f"{', '.join(keys)} is 'SyncBN' (layer {name}), which PyTorch has for GPUs only, and "
                    f"{num_processes} processes are to train on the CPU; set it to 'BN'"
                )


def _check_registered(cfg: CfgNode, eval_only: bool) -> None:
    key, names = ("DATASETS.TEST", cfg.DATASETS.TEST) if eval_only else ("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError(f"{key} is {names}; name a registered data set")
    advice = "Register your own with detectron2.data.datasets.register_coco_instances before the training starts"
    check_registered(key, names, advice)
    check_registered("DATASETS.TEST", cfg.DATASETS.TEST, advice)


def _check_evaluator(cfg: CfgNode, name: str) -> None:
    kind = MetadataCatalog.get(name).get("evaluator_type", "")
    if kind not in ("coco", "pascal_voc"):
        build_evaluator(cfg, name)  # raises, and says what to do
