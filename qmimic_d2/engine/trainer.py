"""The trainer of train_net.py: Detectron2's, with exact resuming and evaluators chosen by metadata."""

import logging
import os
import weakref
from typing import Callable, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter
from torch import nn

from qmimic_d2.checkpoint.checkpointer import DivergedError
from qmimic_d2.checkpoint.reader import read_mapping
from qmimic_d2.data.loading import build_coco_evaluator, repaired
from qmimic_d2.data.mapper import FileNamingMapper, ImageMapper
from qmimic_d2.data.resumable_loader import build_resumable_train_loader, resumable_sampler
from qmimic_d2.diagnostics.mimic_summary import MimicSummary
from qmimic_d2.engine.hooks import (
    ResumableBestCheckpointer,
    ResumableLossNormalizer,
    SaveOnInterrupt,
    SeedEachIteration,
    TeacherCacheSummary,
)
from qmimic_d2.engine.metrics_file import MetricsWriter, WriteMetrics
from qmimic_d2.engine.mimic_evaluator import add_mimic_hook
from qmimic_d2.engine.resuming import check_trainer_state
from qmimic_d2.engine.trackers import Tracker, build_trackers
from qmimic_d2.evaluation import PascalVOCEvaluator, WiderFaceEvaluator
from qmimic_d2.modeling.checkpointer import build_checkpointer
from qmimic_d2.orphans import tie_worker
from qmimic_d2.run_folder import FINAL_CHECKPOINT, INFERENCE, METRICS, TAG, has_metric, write_evaluation

__all__ = ["Trainer", "build_evaluator", "load_evaluated_weights"]

OPTIMIZERS = ("SGD", "AdamW")

_EVALUATION = (hooks.EvalHook, hooks.BestCheckpointer)


class Trainer(DefaultTrainer):
    """
    Trains any model of a config and evaluates it as its data sets ask.

    Differences from :class:`DefaultTrainer`:

    * A resumed training repeats the uninterrupted one. It makes up for an evaluation or a last checkpoint that a kill
      cut off. A signal saves first.
    * Checkpoints are written whole or not at all, and read without running code.
    * A diverged training ends and leaves the last finite checkpoint.
    * CPU processes may share a training. ``SOLVER.OPTIMIZER`` chooses the optimizer.

    Methods are overridden as there: ``build_train_loader`` for images of another mapper, and so on.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: frozen, with ``SEED`` >= 0.

        Raises:
            ValueError: a negative seed, or a sampler that cannot be resumed.
        """
        # DefaultTrainer.__init__ wraps the model in a DDP for GPUs only, so its steps stand here.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_cpu = next(model.parameters()).device.type == "cpu"
        model = create_ddp_model(model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {}))
        make_inner = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = make_inner(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = build_checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self._metrics: Optional[MetricsWriter] = None
        self._trackers: List[Tracker] = []
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As :meth:`DefaultTrainer.resume_or_load`; the order of images resumes too."""
        if resume != self.checkpointer.has_checkpoint():
            logging.getLogger(__name__).warning(
                "OUTPUT_DIR %s holds no checkpoint: there is nothing to resume, the training begins anew"
                if resume
                else "OUTPUT_DIR %s holds the checkpoint of another training, which this one will overwrite: continue "
                "it with --resume, or choose another folder",
                self.cfg.OUTPUT_DIR,
            )
        super().resume_or_load(resume)
        sampler = resumable_sampler(self.data_loader)
        if sampler is not None:
            sampler.num_used_batches = self.start_iter
        elif self.start_iter:
            logging.getLogger(__name__).warning(
                "The training data come from another loader than build_resumable_train_loader's: their "
                "order begins anew"
            )

    def load_state_dict(self, state_dict: Dict) -> None:
        """
        As :meth:`DefaultTrainer.load_state_dict`; the optimizer's settings are those of the config.

        Raises:
            ValueError: the state does not belong to this training; see :func:`check_trainer_state`.
        """
        check_trainer_state(state_dict, self.optimizer, self.max_iter, f"OUTPUT_DIR {self.cfg.OUTPUT_DIR!r}")
        # The current rate is left to the schedule, which multiplies "initial_lr".
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        inner = dict(state_dict["_trainer"])
        if isinstance(self._trainer, AMPTrainer):  # mixed precision may begin in the middle
            inner.setdefault("grad_scaler", self._trainer.grad_scaler.state_dict())
        super().load_state_dict({**state_dict, "_trainer": inner})
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)
        self.scheduler.base_lrs = [group["initial_lr"] for group in settings]
        if self.scheduler.last_epoch < self.max_iter:
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
                group["lr"] = rate

    def before_train(self) -> None:
        """As :meth:`DefaultTrainer.before_train`; then the evaluation that a kill has cut off."""
        for tracker in self._trackers:
            tracker.start(resume=self.start_iter > 0)
        super().before_train()
        if not self._evaluation_is_missing():
            return
        logging.getLogger(__name__).info("Evaluating after iteration %d, as the stop prevented", self.iter - 1)
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks:
            if isinstance(hook, (*_EVALUATION, SaveOnInterrupt, WriteMetrics)):
                hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def _evaluation_is_missing(self) -> bool:
        done = self.start_iter
        if not self._is_evaluation_due(done, self.max_iter):
            return False
        # The first process decides: it has written the file.
        return comm.all_gather(not has_metric(self.cfg.OUTPUT_DIR, done - 1, self._best_metric()))[0]

    def run_step(self) -> None:
        """
        As :meth:`DefaultTrainer.run_step`.

        Raises:
            DivergedError: a loss is no finite number; says how to go on.
        """
        try:
            super().run_step()
        except FloatingPointError as error:
            # Detectron2 looks at the losses before the step, so the last checkpoint may already be the best one.
            text = " ".join(str(error).split())
            raise DivergedError(f"the training has diverged: {text}. {self.checkpointer.advice()}") from error

    def train(self) -> Optional[Dict]:
        """As :meth:`DefaultTrainer.train`; a resumed training that lacks its last checkpoint alone writes it."""
        if self.start_iter == self.max_iter and self.start_iter and comm.is_main_process():
            self._complete_final_checkpoint()
        log = logging.getLogger("detectron2.engine.train_loop")
        log.addFilter(_is_no_divergence)  # which its message describes; a traceback adds nothing
        try:
            return super().train()
        finally:
            log.removeFilter(_is_no_divergence)

    def _complete_final_checkpoint(self) -> None:
        """Writes ``model_final.pth`` where a kill came before it; a longer training may have left an earlier one."""
        path = os.path.join(self.cfg.OUTPUT_DIR, FINAL_CHECKPOINT)
        try:
            done = read_mapping(path, path, "").get("iteration")
        except (OSError, ValueError):
            done = None
        if done != self.max_iter - 1:
            self.checkpointer.save(os.path.splitext(FINAL_CHECKPOINT)[0], iteration=self.max_iter - 1)

    def after_train(self) -> None:
        """As :meth:`DefaultTrainer.after_train`; data-loader workers end here, not when the process does."""
        # Where nothing was left to do, the loop counts one too far.
        self.iter = min(self.iter, self.max_iter)
        if self.iter < self.max_iter:  # after a failure in the last iteration, Detectron2 would evaluate
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, _EVALUATION)]
        try:
            super().after_train()
        finally:
            loader = self.data_loader
            self._trainer.reset_data_loader(lambda: loader)

    def state_dict(self) -> Dict:
        """As :meth:`DefaultTrainer.state_dict`; ``iteration`` is the last step that was done."""
        state = super().state_dict()
        # After the loop, where the last evaluation saves the best model, the counter is one further.
        state["iteration"] = min(state["iteration"], self.max_iter - 1)
        return state

    def build_hooks(self) -> List[Optional[HookBase]]:
        """
        Detectron2's hooks and this project's.

        A signal saves before the evaluation. After it come the comparison of student and teacher and the best
        checkpoint. metrics.json is written before a checkpoint and after an evaluation.
        """
        built = [SeedEachIteration(self.cfg.SEED), ResumableLossNormalizer(self.model)]
        for hook in super().build_hooks():
            if isinstance(hook, hooks.PeriodicCheckpointer):
                built.append(self._write_metrics(self._is_checkpoint_due))
            if isinstance(hook, hooks.EvalHook):
                built.append(SaveOnInterrupt())
            built.append(hook)
            if isinstance(hook, hooks.EvalHook) and comm.is_main_process():
                built += [self._build_best_checkpointer(), self._write_metrics(self._is_evaluation_due)]
        return [*add_mimic_hook(built, self.cfg, self.model), MimicSummary(self.cfg), TeacherCacheSummary()]

    def build_writers(self) -> List[EventWriter]:
        """As :meth:`DefaultTrainer.build_writers`, with TRACKERS; a resumed training loses no row of metrics.json."""
        writers = super().build_writers()
        for index, writer in enumerate(writers):
            if isinstance(writer, JSONWriter):
                writer.close()
                self._metrics = writers[index] = MetricsWriter(os.path.join(self.cfg.OUTPUT_DIR, METRICS))
        self._trackers = build_trackers(self.cfg)
        return [*writers, *self._trackers]

    def _write_metrics(self, is_due: Callable[[int, int], bool]) -> Optional[HookBase]:
        return WriteMetrics(self._metrics, is_due) if self._metrics is not None else None

    def _is_checkpoint_due(self, done: int, max_iter: int) -> bool:
        return done % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or done >= max_iter

    def _is_evaluation_due(self, done: int, max_iter: int) -> bool:
        period = self.cfg.TEST.EVAL_PERIOD
        return period > 0 and bool(self.cfg.DATASETS.TEST) and 0 < done < max_iter and done % period == 0

    def _build_best_checkpointer(self) -> Optional[HookBase]:
        period = self.cfg.TEST.EVAL_PERIOD
        if period <= 0 or not self.cfg.DATASETS.TEST:
            return None
        return ResumableBestCheckpointer(period, self.checkpointer, self._best_metric())

    def _best_metric(self) -> str:
        names = self.cfg.DATASETS.TEST
        # with several test sets Detectron2 puts the set's name in front
        return f"{names[0]}/bbox/AP" if len(names) > 1 else "bbox/AP"

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> Dict:
        """As :meth:`DefaultTrainer.test`; the figures are also written to ``OUTPUT_DIR/evaluation.json``."""
        _share_buffers(model)
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and cfg.OUTPUT_DIR and cfg.DATASETS.TEST:
            write_evaluation(cfg.OUTPUT_DIR, cfg.DATASETS.TEST, results)
        return results

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """See :func:`build_resumable_train_loader`, which also takes a mapper."""
        loader, _ = build_resumable_train_loader(cfg, cfg.SEED)
        return loader

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """As :meth:`DefaultTrainer.build_test_loader`, with repaired data; an image that cannot be read is named."""
        mapper = FileNamingMapper(ImageMapper(cfg, is_train=False))
        with repaired([dataset_name]):
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = tie_worker
        return loader

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


def _is_no_divergence(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], DivergedError))


def _share_buffers(model: nn.Module) -> None:
    """Gives every process the first one's BatchNorm statistics, so that what is evaluated is what is saved."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """
    The evaluator that a data set's metadata (``evaluator_type``) asks for.

    Raises:
        ValueError: there is none for that type.
        FileNotFoundError: WIDER FACE's ground truth is missing.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "")
    output_dir = os.path.join(cfg.OUTPUT_DIR, INFERENCE)
    if kind == "coco":
        return build_coco_evaluator(dataset_name, output_dir, cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if kind == "pascal_voc":
        return PascalVOCEvaluator(dataset_name)
    if kind == "wider_face":
        return WiderFaceEvaluator(dataset_name, output_dir=output_dir)
    raise ValueError(
        f"DATASETS.TEST names {dataset_name!r}, whose metadata has evaluator_type {kind!r}; set "
        "MetadataCatalog.get(name).evaluator_type to 'coco', 'pascal_voc' or 'wider_face', or override "
        "Trainer.build_evaluator"
    )


def load_evaluated_weights(model: nn.Module, cfg: CfgNode, *, resume: bool = False) -> None:
    """
    Fills a model that is to be evaluated from MODEL.WEIGHTS; with ``resume`` from the last checkpoint in
    OUTPUT_DIR, if there is one.

    Raises:
        FileNotFoundError, ValueError: as :meth:`SafeCheckpointer.load_for_evaluation`.
    """
    checkpointer = build_checkpointer(model, cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        tag = os.path.join(cfg.OUTPUT_DIR, TAG)
        checkpointer.load_for_evaluation(checkpointer.get_checkpoint_file(), key=tag)
    else:
        checkpointer.load_for_evaluation(cfg.MODEL.WEIGHTS)
