"""Training hooks: repeatable randomness, a checkpoint on interruption, the best checkpoint on resume."""

import logging
import signal
import threading
from typing import Dict, Optional

import numpy as np
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

__all__ = ["ResumableBestCheckpointer", "SaveOnInterrupt", "SeedEachIteration"]


class SeedEachIteration(HookBase):
    """
    Seeds every random generator from (seed, process, iteration) before each step.

    So a resumed training draws what an uninterrupted one would have drawn, an evaluation in between
    changes nothing, and variants of one seed sample alike, whatever each of them draws besides.

    Args:
        seed: of the training, >= 0.
    """

    def __init__(self, seed: int):
        self._seed = seed

    def before_step(self) -> None:
        words = np.random.SeedSequence([self._seed, comm.get_rank(), self.trainer.iter])
        seed_all_rng(int(words.generate_state(1)[0]))


class SaveOnInterrupt(HookBase):
    """
    Saves a checkpoint and stops when Ctrl-C (SIGINT) or SIGTERM arrives.

    The step under way is finished first, so that the checkpoint is a whole iteration and ``--resume``
    continues from it. A second signal stops at once. Several processes stop at the same iteration:
    they agree every ``sync_period`` iterations.

    Raises (from the training loop):
        SystemExit: with status 128 + the signal's number, as a shell reports it.
    """

    def __init__(self, sync_period: int = 10):
        self._sync_period = sync_period
        self._received = 0
        self._previous: Dict[int, object] = {}

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals; a trainer in another thread runs without
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)

    def after_train(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def after_step(self) -> None:
        number = self._agreed_signal()
        if number == 0 or self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        logger = logging.getLogger(__name__)
        if comm.is_main_process():
            iteration = self.trainer.iter
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            logger.warning(
                "Stopped by %s after iteration %d and saved; continue with --resume",
                signal.Signals(number).name,
                iteration,
            )
        comm.synchronize()
        raise SystemExit(128 + number)

    def _on_signal(self, number: int, frame) -> None:
        if self._received:
            raise SystemExit(128 + number)
        self._received = number
        logging.getLogger(__name__).warning(
            "%s: finishing this iteration and saving; once more to stop at once",
            signal.Signals(number).name,
        )

    def _agreed_signal(self) -> int:
        if comm.get_world_size() == 1:
            return self._received
        if self.trainer.iter % self._sync_period:
            return 0
        return max(comm.all_gather(self._received))


class ResumableBestCheckpointer(BestCheckpointer):
    """Detectron2's, which also remembers the best figure across ``--resume``."""

    def state_dict(self) -> Dict[str, Optional[float]]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: Dict[str, Optional[float]]) -> None:
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]


