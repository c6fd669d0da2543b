"""The training hooks, on trainers whose steps cost nothing."""

import logging
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, hooks
from detectron2.engine.train_loop import TrainerBase

from qmimic_d2.engine.hooks import ResumableBestCheckpointer, SaveOnInterrupt, SeedEachIteration


class Checkpointer:
    """Notes what it is asked to save."""

    def __init__(self):
        self.saved = []

    def save(self, name, **kwargs):
        self.saved.append((name, kwargs))


class Loop(TrainerBase):
    """A trainer whose step calls a function."""

    def __init__(self, *hook_list, step=lambda iteration: None):
        super().__init__()
        self.checkpointer = Checkpointer()
        self._step = step
        self.register_hooks(list(hook_list))

    def run_step(self):
        self._step(self.iter)


class After(HookBase):
    """Calls a function behind a step, as an evaluation or a writer does."""

    def __init__(self, function):
        self._function = function

    def after_step(self):
        self._function(self.trainer.iter)


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def drawn_by_iteration(seed, start=0, count=4, extra_draws=0):
    drawn = {}

    def step(iteration):
        drawn[iteration] = draws()
        for _ in range(extra_draws):
            draws()

    Loop(SeedEachIteration(seed), step=step).train(start, count)
    return drawn


class TestSeedEachIteration:
    def test_draws_do_not_depend_on_what_was_drawn_before(self):
        plain = drawn_by_iteration(1)
        assert drawn_by_iteration(1, extra_draws=3) == plain
        assert drawn_by_iteration(1, start=2) == {2: plain[2], 3: plain[3]}
        assert len({each for values in plain.values() for each in values}) == 12

    def test_seed_and_process_change_them(self, monkeypatch):
        plain = drawn_by_iteration(1)
        assert drawn_by_iteration(2)[0] != plain[0]
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
        assert drawn_by_iteration(1)[0] != plain[0]

    def test_negative_seed_is_refused(self):
        with pytest.raises(ValueError, match="SEED is -1.*>= 0"):
            SeedEachIteration(-1)


def send(number):
    return lambda iteration: os.kill(os.getpid(), number) if iteration == 1 else None


class TestSaveOnInterrupt:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_finishes_the_step_saves_and_stops(self, number, caplog):
        done = []
        trainer = Loop(SaveOnInterrupt(), After(done.append), step=send(number))
        with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as stopped:
            trainer.train(0, 5)
        assert stopped.value.code == 128 + number
        assert trainer.checkpointer.saved == [("model_0000001", {"iteration": 1})]
        assert done == [0]  # an evaluation behind the interrupted step is not waited for
        assert f"{number.name}: stopping when this iteration is done" in caplog.text
        assert f"{number.name}: saved after iteration 1; continue with --resume" in caplog.text

    def test_does_not_wait_for_the_end_of_an_evaluation(self):
        reached = []

        def evaluate(iteration):
            send(signal.SIGTERM)(iteration)
            reached.append(iteration)

        trainer = Loop(SaveOnInterrupt(), After(evaluate))
        with pytest.raises(SystemExit) as stopped:
            trainer.train(0, 5)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert trainer.checkpointer.saved == [("model_0000001", {"iteration": 1})]
        assert reached == [0]

    def test_second_signal_stops_at_once(self):
        def step(iteration):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still running")

        trainer = Loop(SaveOnInterrupt(merge_seconds=0.0), step=step)
        with pytest.raises(SystemExit) as stopped:
            trainer.train(0, 5)
        assert stopped.value.code == 128 + signal.SIGINT
        assert trainer.checkpointer.saved == []

    def test_one_signal_that_comes_twice_counts_once(self):
        def step(iteration):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

        trainer = Loop(SaveOnInterrupt(), step=step)
        with pytest.raises(SystemExit):
            trainer.train(0, 5)
        assert [name for name, _ in trainer.checkpointer.saved] == ["model_0000000"]

    def test_in_the_last_step_only_the_last_evaluation_is_left_out(self):
        ended = []

        class LastEvaluation(HookBase):
            def after_train(self):
                ended.append(True)

        trainer = Loop(SaveOnInterrupt(), LastEvaluation(), step=send(signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            trainer.train(0, 2)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert trainer.checkpointer.saved == []  # PeriodicCheckpointer has saved model_final
        assert not ended

    def test_handlers_are_put_back(self):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        within = []

        def step(iteration):
            within.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))

        Loop(SaveOnInterrupt(), step=step).train(0, 1)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        assert within != before

        def fail(iteration):
            raise RuntimeError("the step failed")

        with pytest.raises(RuntimeError):
            Loop(SaveOnInterrupt(), step=fail).train(0, 1)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def test_a_data_loader_worker_that_inherits_the_handler_goes_on(self, monkeypatch):
        def step(iteration):
            with monkeypatch.context() as patch:
                patch.setattr("os.getpid", lambda: -1)
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)

        trainer = Loop(SaveOnInterrupt(), step=step)
        trainer.train(0, 2)
        assert trainer.checkpointer.saved == []

    def test_a_trainer_in_another_thread_runs_without(self):
        trainer = Loop(SaveOnInterrupt())
        thread = threading.Thread(target=trainer.train, args=(0, 2))
        thread.start()
        thread.join()
        assert trainer.iter == 2

    def test_several_processes_stop_at_the_iteration_they_agree_on(self, monkeypatch):
        asked = []

        def all_gather(received):
            asked.append(received)
            return [received, int(signal.SIGTERM)] if len(asked) == 2 else [received, 0]

        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.utils.comm.all_gather", all_gather)
        monkeypatch.setattr("detectron2.utils.comm.synchronize", lambda: None)
        trainer = Loop(SaveOnInterrupt(sync_period=3))
        with pytest.raises(SystemExit) as stopped:
            trainer.train(0, 20)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert asked == [0, 0]
        assert trainer.checkpointer.saved == [("model_0000005", {"iteration": 5})]


    def test_several_processes_save_before_an_evaluation_is_finished(self, monkeypatch):
        reached = []

        def evaluate(iteration):
            send(signal.SIGTERM)(iteration)
            reached.append(iteration)

        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda received: [received])
        monkeypatch.setattr("detectron2.utils.comm.synchronize", lambda: None)
        trainer = Loop(SaveOnInterrupt(sync_period=4), After(evaluate))
        with pytest.raises(SystemExit):
            trainer.train(0, 20)
        assert reached == [0, 1, 2]
        assert [name for name, _ in trainer.checkpointer.saved] == ["model_0000001", "model_0000003"]


class StatefulCheckpointer:
    """Keeps the hook's state as it is saved with every model."""

    def __init__(self):
        self.saved = []
        self.hook = None

    def save(self, name, **kwargs):
        self.saved.append((name, kwargs["iteration"], dict(self.hook.state_dict())))


def best_loop(values, earlier=None):
    """A training that evaluates every second iteration and finds ``values``, the last one at its end."""
    checkpointer = StatefulCheckpointer()
    best = ResumableBestCheckpointer(2, checkpointer, "bbox/AP")
    checkpointer.hook = best
    figures = iter(values)
    trainer = Loop(hooks.EvalHook(2, lambda: {"bbox": {"AP": next(figures)}}), best)
    if earlier is not None:
        trainer.load_state_dict({"iteration": 0, "hooks": {"ResumableBestCheckpointer": earlier}})
    trainer.train(0, 2 * len(values))
    return checkpointer.saved, trainer


class TestResumableBestCheckpointer:
    def test_every_saved_model_tells_its_own_figure(self):
        saved, trainer = best_loop([10.0, 20.0, 15.0, 30.0])
        assert saved == [
            ("model_best", 1, {"best_metric": 10.0, "best_iter": 1}),
            ("model_best", 3, {"best_metric": 20.0, "best_iter": 3}),
            ("model_best", 8, {"best_metric": 30.0, "best_iter": 8}),
        ]
        assert trainer.state_dict()["hooks"]["ResumableBestCheckpointer"] == {"best_metric": 30.0, "best_iter": 8}

    def test_a_resumed_training_keeps_the_better_earlier_model(self):
        saved, _ = best_loop([10.0, 20.0], earlier={"best_metric": 15.0, "best_iter": 3})
        assert [name_and_iteration[:2] for name_and_iteration in saved] == [("model_best", 4)]
        assert best_loop([10.0, 12.0], earlier={"best_metric": 15.0, "best_iter": 3})[0] == []

    def test_no_figure_yet(self):
        hook = ResumableBestCheckpointer(2, StatefulCheckpointer(), "bbox/AP")
        trainer = Loop(hook)
        assert trainer.state_dict()["hooks"]["ResumableBestCheckpointer"] == {"best_metric": None, "best_iter": None}
        hook.load_state_dict(hook.state_dict())
        assert hook.best_metric is None

    def test_nan_is_never_best(self):
        saved, trainer = best_loop([float("nan"), 5.0, float("nan")])
        assert [each[1] for each in saved] == [3]
        assert trainer.state_dict()["hooks"]["ResumableBestCheckpointer"]["best_metric"] == 5.0
