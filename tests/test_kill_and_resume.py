"""A training that is killed at any moment and resumed: no row of metrics.json and no file is missing."""

import json
import os

import pytest
import torch
from tiny_training import Recorder, registered_data, training_cfg

from qmimic_d2.engine import Trainer
from qmimic_d2.engine.metrics_file import MetricsWriter
from qmimic_d2.run_folder import has_metric

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """As SIGKILL: nothing runs after it."""


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with registered_data(tmp_path_factory.mktemp("data"), "tiny_killed") as name:
        yield name
    torch.set_num_threads(threads)


def figure_of_weights(cls, cfg, model, evaluators=None):
    """An evaluation in no time, whose figure tells the weights apart."""
    return {"bbox": {"AP": sum(parameter.double().abs().sum().item() for parameter in model.parameters())}}


@pytest.fixture(autouse=True)
def quick_evaluation(monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(figure_of_weights))


def cfg_of(folder, data, *options):
    periods = ("SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
    return training_cfg(folder, data, *periods, *options, evaluate=True)


def trained(cfg, resume=False, dies=False):
    # without a checkpoint it begins anew, with the weights of the run's seed
    torch.manual_seed(99 if resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")) else 0)
    recorder = Recorder()
    trainer = Trainer(cfg)
    trainer._hooks.insert(0, recorder)
    recorder.trainer = trainer._hooks[1].trainer
    trainer.resume_or_load(resume=resume)
    if dies:
        after_train, killed = trainer.after_train, []
        trainer.after_train = lambda: None if killed else after_train()
        after_step_of_all = trainer.after_step

        def after_step():
            try:
                after_step_of_all()
            except Killed:
                killed.append(True)
                raise

        trainer.after_step = after_step
        with pytest.raises(Killed):
            trainer.train()
    else:
        trainer.train()
    return trainer, recorder.losses


def rows(folder):
    """By iteration, of each figure the later line; without times, and of medians, which begin anew, the names."""
    found = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        row = json.loads(line)
        figures = found.setdefault(row["iteration"], {})
        figures.update({key: row[key] if key in ("lr", "bbox/AP") else "a figure" for key in row if "time" not in key})
        figures.pop("eta_seconds", None)
    return found


def kill_after(monkeypatch, count):
    """Kills when so many files have taken their names; returns a function that says how many have."""
    replace, done = os.replace, []

    def replaced(source, target):
        replace(source, target)
        done.append(os.path.basename(target))
        if len(done) == count:
            raise Killed

    monkeypatch.setattr(os, "replace", replaced)
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "test", classmethod(figure_of_weights))
        named = kill_after(monkeypatch, 10**6)
        trainer, losses = trained(cfg_of(folder, data))
    return folder, losses, trainer.model.state_dict(), named


# Files that take their names: the checkpoints after iterations 1, 3 and 4, the best ones, each with its tag.
NAMES = 12


@pytest.mark.parametrize("count", range(1, NAMES + 1))
def test_killed_after_any_file(tmp_path, data, monkeypatch, whole, count):
    folder, expected, weights, named = whole
    assert len(named) == NAMES
    with monkeypatch.context() as patch:
        kill_after(patch, count)
        trained(cfg_of(tmp_path, data), dies=True)
    _, losses = trained(cfg_of(tmp_path, data), resume=True)
    assert losses == {iteration: expected[iteration] for iteration in losses}
    assert rows(tmp_path) == rows(folder)
    assert sorted(rows(tmp_path)) == [1, 3, 4, 5]
    files = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events")}
    assert {"model_final.pth", "model_best.pth", "last_checkpoint", "metrics.json"} <= files
    for name in ("model_final.pth", "model_best.pth"):
        content, other = (torch.load(each / name, weights_only=True) for each in (tmp_path, folder))
        assert content["iteration"] == other["iteration"]
        assert all(torch.equal(content["model"][key], value) for key, value in other["model"].items())
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert all(torch.equal(final["model"][name], weights[name]) for name in weights)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_in_an_evaluation(tmp_path, data, monkeypatch, whole, number):
    folder, _, _, _ = whole
    calls = []

    def dies(cls, cfg, model, evaluators=None):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return figure_of_weights(cls, cfg, model)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", classmethod(dies))
        trained(cfg_of(tmp_path, data), dies=True)
    trained(cfg_of(tmp_path, data), resume=True)
    assert rows(tmp_path) == rows(folder)
    best, expected = (torch.load(each / "model_best.pth", weights_only=True) for each in (tmp_path, folder))
    states = [content["trainer"]["hooks"]["ResumableBestCheckpointer"] for content in (best, expected)]
    assert states[0] == states[1]


def test_a_longer_training_replaces_the_last_checkpoint_of_the_shorter(tmp_path, data, monkeypatch):
    constant = ("SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0)
    trained(cfg_of(tmp_path, data, *constant, "SOLVER.MAX_ITER", 2))
    with monkeypatch.context() as patch:
        done = kill_after(patch, 2)  # model_0000003 and its tag
        trained(cfg_of(tmp_path, data, *constant, "SOLVER.MAX_ITER", 4), resume=True, dies=True)
    assert "model_0000003.pth" in done and "model_final.pth" not in done
    trained(cfg_of(tmp_path, data, *constant, "SOLVER.MAX_ITER", 4), resume=True)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3


def test_half_a_line_at_the_end_is_removed(tmp_path, caplog):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1, "bbox/AP": 2.0}\n{"iteration": 3, "bb')
    MetricsWriter(str(path)).close()
    assert path.read_text() == '{"iteration": 1, "bbox/AP": 2.0}\n'
    assert "ends in half a line, left by a kill" in caplog.text
    path.write_text('{"iteration": 1}')
    MetricsWriter(str(path)).close()
    assert path.read_text() == ""


def test_rows_are_looked_up_among_damaged_ones(tmp_path):
    path = tmp_path / "metrics.json"
    assert not has_metric(str(tmp_path), 1, "bbox/AP")
    path.write_text('[]\n{\n' + "[" * 100_000 + '\n{"iteration": 1, "bbox/AP": NaN}\n{"iteration": 3}\n')
    assert has_metric(str(tmp_path), 1, "bbox/AP")
    assert not has_metric(str(tmp_path), 1, "lr") and not has_metric(str(tmp_path), 3, "bbox/AP")
