"""Weights & Biases and MLflow, next to TensorBoard. A tracker that fails is switched off; it never stops a training."""

import importlib.util
import logging
import os
import re
import sys
import time
import uuid
from collections import defaultdict
from typing import Any, Dict, List

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from qmimic_d2.engine.metrics_file import WINDOW_SIZE
from qmimic_d2.run_folder import read_tracked_run, write_tracked_run
from qmimic_d2.yaml.config import flat_keys

__all__ = ["MlflowTracker", "Tracker", "WandbTracker", "build_trackers", "check_trackers"]


class Tracker(EventWriter):
    """
    Base class: writes scalars to one run of a tracker. A failure is one warning, and the tracker is off from then on.

    A subclass says how a run is opened, written and closed; it may raise whatever its package raises.

    Args:
        destination: value of the tracker's key.
        folder: OUTPUT_DIR. It keeps the id of the run, so that a resumed training continues it.
        config: the parameters of the run, by their full keys.
    """

    # Name of its package, and what its package reads from the environment. A variable that is there stays.
    package = ""
    environment: Dict[str, str] = {}

    def __init__(self, destination: str, folder: str, config: Dict[str, Any]):
        self._destination = destination
        self._folder = folder
        self._config = config
        self._last_written: Dict[str, int] = {}
        self._is_on = False

    def start(self, resume: bool) -> None:
        """Opens the run: with ``resume`` the one of this folder and destination, if there is one, else a new one."""
        self._is_on = True
        self._attempt(self._start, resume)

    def write(self) -> None:
        """Writes every scalar that is newer than what was written under its name."""
        self._attempt(self._write)

    def close(self) -> None:
        """Ends the run, as a failed one if an exception is being handled."""
        self._attempt(self._close_run, sys.exc_info()[1] is not None)
        self._is_on = False

    def _attempt(self, action, *args) -> None:
        if not self._is_on:
            return
        try:
            action(*args)
        except Exception as error:  # each package raises its own
            self._is_on = False
            logging.getLogger(__name__).warning(
                "%s failed and is off for the rest of this run, the training goes on: %s: %s",
                *(self.package, type(error).__name__, " ".join(str(error).split())[:500]),
            )

    def _start(self, resume: bool) -> None:
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
        earlier = read_tracked_run(self._folder, self.package, self._destination) if resume else ""
        name = os.path.basename(os.path.abspath(self._folder))
        write_tracked_run(self._folder, self.package, self._destination, self._open_run(name, earlier))

    def _write(self) -> None:
        rows: Dict[int, Dict[str, float]] = defaultdict(dict)
        for key, (value, iteration) in get_event_storage().latest_with_smoothing_hint(WINDOW_SIZE).items():
            if iteration > self._last_written.get(key, -1):
                rows[iteration][key] = float(value)
                self._last_written[key] = iteration
        for iteration in sorted(rows):
            self._write_row(iteration, rows[iteration])

    def _open_run(self, name: str, earlier: str) -> str:
        """Opens the run of the id ``earlier``, or a new one of this name for ""; returns its id."""
        raise NotImplementedError

    def _write_row(self, iteration: int, scalars: Dict[str, float]) -> None:
        raise NotImplementedError

    def _close_run(self, has_failed: bool) -> None:
        raise NotImplementedError


class WandbTracker(Tracker):
    """A run of Weights & Biases; the destination is its project. Its own files are in OUTPUT_DIR/wandb."""

    package = "wandb"
    # Seconds. By default W&B waits without end for a login and for the last upload.
    environment = {"WANDB_LOGIN_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT": "300"}

    def _open_run(self, name: str, earlier: str) -> str:
        import wandb

        run_id = earlier or uuid.uuid4().hex
        self._run = wandb.init(
            project=self._destination,
            dir=self._folder,
            id=run_id,
            name=name,
            config=self._config,
            resume="allow",
            allow_val_change=True,
        )
        # W&B refuses a step below its last one. A training resumes from its checkpoint, which may lie before that.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        return run_id

    def _write_row(self, iteration: int, scalars: Dict[str, float]) -> None:
        self._run.log({**scalars, "iteration": iteration})

    def _close_run(self, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


class MlflowTracker(Tracker):
    """
    A run of MLflow; the destination is the tracking URI.

    Its experiment is the one of the variable MLFLOW_EXPERIMENT_NAME, else "qmimic_d2".
    """

    package = "mlflow"
    # A server that does not answer delays the training once. By default MLflow tries for minutes.
    environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}

    def _open_run(self, name: str, earlier: str) -> str:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._make_metric = Metric
        self._client = MlflowClient(tracking_uri=self._destination)
        if earlier:
            self._id = earlier
            self._client.update_run(earlier, status="RUNNING")
            known = self._client.get_run(earlier).data.params
        else:
            self._id, known = self._client.create_run(self._experiment(), run_name=name).info.run_id, {}
        # A parameter keeps its first value in MLflow.
        params = [Param(key, str(value)) for key, value in self._config.items() if key not in known]
        for start in range(0, len(params), 100):  # as many as MLflow takes at once
            self._client.log_batch(self._id, params=params[start : start + 100])
        return self._id

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "qmimic_d2"
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self._client.create_experiment(name)

    def _write_row(self, iteration: int, scalars: Dict[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [
            # MLflow refuses other characters, which the name of a class may have.
            self._make_metric(re.sub(r"[^\w\-./ ]", "_", key), value, now, iteration)
            for key, value in scalars.items()
        ]
        for start in range(0, len(metrics), 1000):  # as many as MLflow takes at once
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def _close_run(self, has_failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if has_failed else "FINISHED")


# By their keys of TRACKERS.
_TRACKERS = {"WANDB": WandbTracker, "MLFLOW": MlflowTracker}


def build_trackers(cfg: CfgNode) -> List[Tracker]:
    """The trackers that TRACKERS names; none of them is open yet."""
    named = [(kind, cfg.TRACKERS[key]) for key, kind in _TRACKERS.items() if cfg.TRACKERS[key]]
    return [kind(destination, cfg.OUTPUT_DIR, flat_keys(cfg)) for kind, destination in named]


def check_trackers(cfg: CfgNode) -> None:
    """
    Raises where a key of TRACKERS is set and its package is missing.

    Raises:
        ValueError: names the key, its value and the command that installs the package.
    """
    for key, kind in _TRACKERS.items():
        value, package = cfg.TRACKERS[key], kind.package
        spec = importlib.util.find_spec(package) if value else None
        # A folder of this name, such as W&B leaves in the working directory, has a spec without an origin.
        if value and (spec is None or spec.origin is None):
            raise ValueError(
                f"TRACKERS.{key} is {value!r}, and the package {package} is not installed; run "
                f"'pip install {package}', or set TRACKERS.{key} to ''"
            )
