"""The trainer of train_net.py: Detectron2's, with exact resuming and evaluators chosen by metadata."""

import functools
import os
import weakref
from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qmimic_d2.checkpoint import SafeCheckpointer
from qmimic_d2.engine.data_order import build_resumable_train_loader
from qmimic_d2.engine.hooks import ResumableBestCheckpointer, SaveOnInterrupt, SeedEachIteration
from qmimic_d2.json_file import write_json
from qmimic_d2.modeling.backbone.imagenet_names import converted_imagenet_weights

__all__ = ["Trainer", "build_checkpointer", "build_evaluator"]

OPTIMIZERS = ("SGD", "AdamW")


class Trainer(DefaultTrainer):
    """
    Trains any model of a config and evaluates it as its data sets ask.

    Differences from :class:`DefaultTrainer`: a resumed training repeats the uninterrupted one
    (order of images and random numbers), a signal saves first, checkpoints are written whole or not at
    all and read without running code, CPU processes may share a training, and ``SOLVER.OPTIMIZER``.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: frozen, with ``SEED`` >= 0.
        """
        # DefaultTrainer.__init__ wraps the model in a DDP for GPUs only, so its steps stand here.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader, self._sampler = build_resumable_train_loader(cfg, cfg.SEED)
        on_cpu = next(model.parameters()).device.type == "cpu"
        model = create_ddp_model(
            model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {})
        )
        make_inner = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = make_inner(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As :meth:`DefaultTrainer.resume_or_load`; the order of images resumes too."""
        super().resume_or_load(resume)
        self._sampler.num_used_batches = self.start_iter

    def build_hooks(self) -> List[Optional[HookBase]]:
        """Detectron2's hooks with this project's around them; the writers stay last."""
        built = [SeedEachIteration(self.cfg.SEED), *super().build_hooks()]
        period = self.cfg.TEST.EVAL_PERIOD
        extra: List[HookBase] = []
        if comm.is_main_process() and period > 0 and self.cfg.DATASETS.TEST:
            # with several test sets Detectron2 puts the set's name in front
            several = len(self.cfg.DATASETS.TEST) > 1
            metric = f"{self.cfg.DATASETS.TEST[0]}/bbox/AP" if several else "bbox/AP"
            extra.append(ResumableBestCheckpointer(period, self.checkpointer, metric))
        extra.append(SaveOnInterrupt())
        position = next(
            (index for index, hook in enumerate(built) if isinstance(hook, hooks.PeriodicWriter)),
            len(built),
        )
        return built[:position] + extra + built[position:]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> Dict:
        """As :meth:`DefaultTrainer.test`; the figures are also written to ``OUTPUT_DIR/evaluation.json``."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and cfg.OUTPUT_DIR:
            write_json(
                os.path.join(cfg.OUTPUT_DIR, "evaluation.json"),
                {"datasets": list(cfg.DATASETS.TEST), "results": results},
            )
        return results

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's SGD, or AdamW on the same parameter groups, as ``SOLVER.OPTIMIZER`` says."""
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`build_evaluator`."""
        return build_evaluator(cfg, dataset_name)


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """
    The evaluator that a data set's metadata (``evaluator_type``) asks for.

    Raises:
        ValueError: there is none for that type.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "")
    if kind == "coco":
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise ValueError(
        f"DATASETS.TEST names {dataset_name!r}, whose metadata has evaluator_type {kind!r}; set "
        "MetadataCatalog.get(name).evaluator_type to 'coco' or 'pascal_voc', or override "
        "Trainer.build_evaluator"
    )


def build_checkpointer(model: nn.Module, save_dir: str, **checkpointables) -> SafeCheckpointer:
    """
    The checkpointer of this project's models.

    Torchvision's ImageNet weights are renamed on the fly, and an adapter that an evaluation model does
    not have is passed over.
    """
    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    network = getattr(unwrapped.backbone, "bottom_up", unwrapped.backbone)
    rename = functools.partial(converted_imagenet_weights, model_keys=list(network.state_dict()))
    return SafeCheckpointer(
        model, save_dir, name_converters=(rename,), ignored_prefixes=("mimic_loss.",), **checkpointables
    )
