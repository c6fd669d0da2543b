"""Training hooks: repeatable randomness, a checkpoint on interruption, what a resumed training has to remember."""

import logging
import math
import os
import signal
import threading
import time
from typing import Any, Dict, Optional

from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qmimic_d2.modeling.mimic.cached_teacher import CachedTeacher
from qmimic_d2.randomness import mixed_seed

__all__ = [
    "ResumableBestCheckpointer",
    "ResumableLossNormalizer",
    "SaveOnInterrupt",
    "SeedEachIteration",
    "TeacherCacheSummary",
    "unwrapped",
]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel, or the model."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class SeedEachIteration(HookBase):
    """
    Seeds every random generator from (seed, process, iteration) before each step.

    So a resumed training draws what an uninterrupted one would have drawn, an evaluation in between
    changes nothing, and variants of one seed sample alike, whatever each of them draws besides.

    Args:
        seed: of the training, >= 0.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, seed: int):
        if seed < 0:
            raise ValueError(
                f"SEED is {seed}; this trainer needs one >= 0 (qmimic_d2.engine.load_config draws one)"
            )
        self._seed = seed

    def before_step(self) -> None:
        seed_all_rng(mixed_seed(self._seed, comm.get_rank(), self.trainer.iter))


class SaveOnInterrupt(HookBase):
    """
    Saves a checkpoint and stops when Ctrl-C (SIGINT) or SIGTERM arrives.

    The running step is finished first, so that the checkpoint is a whole iteration and ``--resume`` continues from it.
    It belongs after the hooks that change what is saved and before the evaluation's: it does not wait for an
    evaluation. A second signal stops at once.

    Several processes stop at the same iteration: they agree on it every ``sync_period`` iterations. If an evaluation
    is running, they have saved before it, and finish it. A signal that comes twice within ``merge_seconds``, from the
    terminal or the scheduler and once more from the launching process, counts once.

    Raises (from the training loop):
        SystemExit: with status 128 + the signal's number, as a shell reports it.
    """

    def __init__(self, sync_period: int = 10, merge_seconds: float = 2.0):
        self._sync_period = sync_period
        self._merge_seconds = merge_seconds
        self._received = 0
        self._received_at = 0.0
        # between two steps, when the last one is done completely
        self._is_between_steps = False
        self._pid = 0
        self._previous: Dict[int, object] = {}

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals; a trainer in another thread runs without
        self._pid = os.getpid()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)

    def before_step(self) -> None:
        self._is_between_steps = False

    def after_step(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            return  # model_final is saved; after_train stops
        self._is_between_steps = True
        number = self._agreed_signal() if (self.trainer.iter + 1) % self._period() == 0 else 0
        if number:
            self._save(number)
            comm.synchronize()
            raise SystemExit(128 + number)

    def after_train(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
        self._previous.clear()
        is_complete = self.trainer.iter >= self.trainer.max_iter
        number = self._agreed_signal() if is_complete else 0
        if number:  # all that would follow is the last evaluation
            raise SystemExit(128 + number)

    def _on_signal(self, number: int, frame) -> None:
        if os.getpid() != self._pid:
            return  # a data-loader worker, which inherits the handler; the training decides
        now = time.monotonic()
        if self._received:
            if now - self._received_at < self._merge_seconds:
                return
            raise SystemExit(128 + number)
        self._received, self._received_at = number, now
        if self._is_between_steps:
            self._save(number)
            if comm.get_world_size() == 1:
                raise SystemExit(128 + number)
        logging.getLogger(__name__).warning(
            "%s: stopping when this iteration is done and saved; once more to stop at once",
            signal.Signals(number).name,
        )

    def _save(self, number: int) -> None:
        if comm.is_main_process():
            iteration = self.trainer.iter
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            logging.getLogger(__name__).warning(
                "%s: saved after iteration %d; continue with --resume",
                signal.Signals(number).name,
                iteration,
            )

    def _period(self) -> int:
        return self._sync_period if comm.get_world_size() > 1 else 1

    def _agreed_signal(self) -> int:
        return max(comm.all_gather(self._received))


class ResumableLossNormalizer(HookBase):
    """
    Saves the running mean of positive cells that RetinaNet and FCOS divide their losses by.

    Detectron2 keeps it in an attribute of the model that no checkpoint holds, so that a resumed training would begin
    with another one. Each of several processes has its own; all of them resume with the first one's.

    Args:
        model: that is trained, wrapped in a DDP or not. One without such a mean is left alone.
    """

    def __init__(self, model: nn.Module):
        self._model = unwrapped(model)

    def state_dict(self) -> Dict[str, Any]:
        mean = getattr(self._model, "loss_normalizer", None)
        return {} if mean is None else {"loss_normalizer": float(mean)}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._model.loss_normalizer = state_dict["loss_normalizer"]


class ResumableBestCheckpointer(BestCheckpointer):
    """Detectron2's, which also remembers the best figure across ``--resume``."""

    def state_dict(self) -> Dict[str, Optional[float]]:
        best = (self.best_metric, self.best_iter)
        # Detectron2 saves a better model before it notes its figure; the file has to tell its own,
        # or a worse model would replace it after --resume.
        storage = getattr(self.trainer, "storage", None)
        latest = storage.latest().get(self._val_metric) if storage is not None else None
        if latest is not None and math.isfinite(latest[0]):
            if best[0] is None or self._compare(latest[0], best[0]):
                best = latest
        return {"best_metric": best[0], "best_iter": best[1]}

    def load_state_dict(self, state_dict: Dict[str, Optional[float]]) -> None:
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]


class TeacherCacheSummary(HookBase):
    """Says at the end of a training what its teacher cache did."""

    def after_train(self) -> None:
        teacher = getattr(getattr(unwrapped(self.trainer.model), "mimic", None), "teacher", None)
        if isinstance(teacher, CachedTeacher):
            logging.getLogger(__name__).info(teacher.summary())
