"""Weights & Biases and MLflow, by stand-ins: what is written, one run per folder, a failure that stops nothing."""

import importlib.machinery
import logging
import sys
import types

import pytest
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tiny_training import registered_data, training_cfg, written_losses

from qmimic_d2.engine import Trainer, check_run
from qmimic_d2.engine.trackers import MlflowTracker, WandbTracker, check_trackers
from qmimic_d2.run_folder import read_tracked_run, write_tracked_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with registered_data(tmp_path_factory.mktemp("data"), "tiny_trackers") as name:
        yield name


def install(monkeypatch, name, **content):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="made up")
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


class Service:
    """The runs of a stand-in; a call whose name is in ``fails`` raises."""

    def __init__(self):
        self.runs, self.calls, self.fails = {}, [], ()

    def call(self, name):
        self.calls.append(name)
        if name in self.fails:
            raise ConnectionError(f"{name}: no\nnetwork")


class WandbRun:
    def __init__(self, service, config):
        self._service, self.config, self.rows, self.status = service, config, [], None

    def define_metric(self, name, step_metric=None):
        self._service.call("define_metric")

    def log(self, row):
        self._service.call("log")
        self.rows.append(row)

    def finish(self, exit_code):
        self._service.call("finish")
        self.status = exit_code


@pytest.fixture
def wandb(monkeypatch):
    service = Service()

    def init(*, project, dir, id, name, config, resume, allow_val_change):
        service.call("init")
        assert resume == "allow" and allow_val_change
        run = service.runs.setdefault((project, id), WandbRun(service, config))
        run.name, run.folder = name, dir
        return run

    install(monkeypatch, "wandb", init=init)
    for name in WandbTracker.environment:
        monkeypatch.setenv(name, "1")
    return service


class MlflowClient:
    service = None

    def __init__(self, tracking_uri):
        self.service.call("client")
        self._runs = self.service.runs.setdefault(tracking_uri, {})

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment, run_name):
        self.service.call("create_run")
        run = types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=f"run {len(self._runs)}", experiment=experiment, name=run_name),
            data=types.SimpleNamespace(params={}),
            rows=[],
            status="RUNNING",
        )
        self._runs[run.info.run_id] = run
        return run

    def get_run(self, run_id):
        return self._runs[run_id]

    def update_run(self, run_id, status):
        self._runs[run_id].status = status

    def set_terminated(self, run_id, status):
        self.service.call("set_terminated")
        self._runs[run_id].status = status

    def log_batch(self, run_id, metrics=(), params=()):
        self.service.call("log_batch")
        assert len(metrics) <= 1000 and len(params) <= 100
        run = self._runs[run_id]
        for key, value in params:
            assert run.data.params.setdefault(key, value) == value, "MLflow refuses another value"
        run.rows += [(key, value, step) for key, value, _, step in metrics]


@pytest.fixture
def mlflow(monkeypatch):
    service = Service()
    monkeypatch.setattr(MlflowClient, "service", service)
    install(monkeypatch, "mlflow")
    install(monkeypatch, "mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values)
    install(monkeypatch, "mlflow.tracking", MlflowClient=MlflowClient)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for name in MlflowTracker.environment:
        monkeypatch.setenv(name, "1")
    return service


KEYS = ("TRACKERS.WANDB", "digits", "TRACKERS.MLFLOW", "http://host")


def trained(cfg, resume=False, hook=None):
    trainer = Trainer(cfg)
    if hook is not None:
        trainer.register_hooks([hook])
    trainer.resume_or_load(resume=resume)
    trainer.train()


def test_a_training_and_its_resume_are_one_run(tmp_path, data, wandb, mlflow):
    folder = tmp_path / "first"
    trained(training_cfg(folder, data, *KEYS, "SOLVER.MAX_ITER", 5))
    (run,) = wandb.runs.values()
    (other,) = mlflow.runs["http://host"].values()
    assert run.config["SOLVER.MAX_ITER"] == 5 and other.data.params["SOLVER.MAX_ITER"] == "5"
    assert (run.status, other.status) == (0, "FINISHED")
    assert (run.name, run.folder) == ("first", str(folder))
    assert (other.info.name, other.info.experiment) == ("first", "qmimic_d2")
    trained(training_cfg(folder, data, *KEYS, "SOLVER.MAX_ITER", 7), resume=True)
    assert list(wandb.runs.values()) == [run] and list(mlflow.runs["http://host"].values()) == [other]
    assert (run.status, other.status) == (0, "FINISHED")
    expected = written_losses(folder)
    assert sorted(expected) == [4, 6]
    assert {row["iteration"]: row["total_loss"] for row in run.rows if "total_loss" in row} == expected
    assert {step: value for key, value, step in other.rows if key == "total_loss"} == expected
    trained(training_cfg(folder, data, *KEYS, "SOLVER.MAX_ITER", 2))  # begins anew
    assert len(wandb.runs) == len(mlflow.runs["http://host"]) == 2


def test_without_the_keys_nothing_is_imported_or_written(tmp_path, data, wandb, mlflow):
    trained(training_cfg(tmp_path, data, "SOLVER.MAX_ITER", 2))
    assert wandb.calls == mlflow.calls == [] and not (tmp_path / "trackers.json").exists()


def test_other_processes_than_the_first_write_nothing(tmp_path, data, wandb, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    trained(training_cfg(tmp_path, data, *KEYS[:2], "SOLVER.MAX_ITER", 2))
    assert wandb.calls == [] and not (tmp_path / "trackers.json").exists()


FAILURES = [("wandb", name) for name in ("init", "define_metric", "log", "finish")]
FAILURES += [("mlflow", name) for name in ("client", "create_run", "log_batch", "set_terminated")]


@pytest.mark.slow
@pytest.mark.parametrize("package, call", FAILURES)
def test_a_failure_is_one_warning(tmp_path, data, wandb, mlflow, caplog, package, call):
    broken, whole = (wandb, mlflow) if package == "wandb" else (mlflow, wandb)
    broken.fails = (call,)
    with caplog.at_level(logging.WARNING, "qmimic_d2.engine.trackers"):
        trained(training_cfg(tmp_path, data, *KEYS, "SOLVER.MAX_ITER", 21))
    (record,) = [each for each in caplog.records if each.name == "qmimic_d2.engine.trackers"]
    assert record.getMessage() == (
        f"{package} failed and is off for the rest of this run, the training goes on: "
        f"ConnectionError: {call}: no network"
    )
    assert broken.calls.count(call) == 1 and broken.calls[-1] == call
    assert whole.calls[-1] in ("finish", "set_terminated")
    assert sorted(written_losses(tmp_path)) == [19, 20]


def test_a_package_that_cannot_be_imported_is_a_failure(tmp_path, data, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trained(training_cfg(tmp_path, data, *KEYS[:2], "SOLVER.MAX_ITER", 2))
    assert "wandb failed and is off" in caplog.text and written_losses(tmp_path)


def test_a_disk_that_takes_no_file_is_a_failure(tmp_path, data, wandb, caplog):
    (tmp_path / "trackers.json").mkdir()
    trained(training_cfg(tmp_path, data, *KEYS[:2], "SOLVER.MAX_ITER", 2))
    assert "wandb failed and is off" in caplog.text and written_losses(tmp_path)


class Fail(HookBase):
    def after_step(self):
        raise RuntimeError("a user's hook")


def test_a_training_that_fails_is_a_failed_run(tmp_path, data, wandb, mlflow):
    with pytest.raises(RuntimeError, match="a user's hook"):
        trained(training_cfg(tmp_path, data, *KEYS, "SOLVER.MAX_ITER", 2), hook=Fail())
    assert [run.status for run in wandb.runs.values()] == [1]
    assert [run.status for run in mlflow.runs["http://host"].values()] == ["FAILED"]


def test_values_are_written_once_and_late_ones_too(tmp_path, wandb):
    tracker = WandbTracker("digits", str(tmp_path), {})
    tracker.start(resume=False)
    with EventStorage(0) as storage:
        storage.put_scalar("loss", 3.0)
        tracker.write()
        tracker.write()
        storage.put_scalar("bbox/AP", 7.0, smoothing_hint=False)
        tracker.write()
        storage.step()
        storage.put_scalar("loss", 1.0)
        tracker.write()
    (run,) = wandb.runs.values()
    assert run.rows == [{"iteration": 0, "loss": 3.0}, {"iteration": 0, "bbox/AP": 7.0}, {"iteration": 1, "loss": 2.0}]


def test_names_that_mlflow_refuses(tmp_path, mlflow):
    tracker = MlflowTracker("http://host", str(tmp_path), {})
    tracker.start(resume=False)
    with EventStorage(0) as storage:
        storage.put_scalar("bbox/AP-stop sign (new)", 7.0, smoothing_hint=False)
        tracker.write()
    (run,) = mlflow.runs["http://host"].values()
    assert run.rows == [("bbox/AP-stop sign _new_", 7.0, 0)]


def test_a_tracker_that_was_not_started_writes_nothing(tmp_path, wandb):
    tracker = WandbTracker("digits", str(tmp_path), {})
    tracker.write()
    tracker.close()
    assert wandb.calls == []


def test_ids_of_runs(tmp_path):
    assert read_tracked_run(str(tmp_path), "wandb", "digits") == ""
    write_tracked_run(str(tmp_path), "wandb", "digits", "a")
    write_tracked_run(str(tmp_path), "mlflow", "http://host", "b")
    assert read_tracked_run(str(tmp_path), "wandb", "digits") == "a"
    assert read_tracked_run(str(tmp_path), "mlflow", "http://host") == "b"
    assert read_tracked_run(str(tmp_path), "mlflow", "http://other") == ""
    (tmp_path / "trackers.json").write_text("[1")
    assert read_tracked_run(str(tmp_path), "wandb", "digits") == ""


@pytest.mark.parametrize("key, package", [("TRACKERS.WANDB", "wandb"), ("TRACKERS.MLFLOW", "mlflow")])
def test_a_key_without_its_package_is_refused(tmp_path, data, monkeypatch, key, package):
    folder = tmp_path / package  # such as W&B leaves in the working directory: no package
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    cfg = training_cfg(tmp_path / "output", data, key, "x")
    message = rf"{key} is 'x', and the package {package} is not .*'pip install {package}'"
    with pytest.raises(ValueError, match=message):
        check_run(cfg, 1)
    check_trackers(training_cfg(tmp_path / "output", data))
