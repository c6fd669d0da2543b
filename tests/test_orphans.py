"""Children of a process that was killed."""

import signal
import subprocess
import sys

import pytest
from tiny_training import ROOT, registered_data, training_cfg

from qmimic_d2 import orphans
from qmimic_d2.analysis.calibration import build_calibration_loader
from qmimic_d2.engine import average_precision
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.engine.trainer import Trainer

pytestmark = pytest.mark.slow

SLEEP = "print('started', flush=True); import time; time.sleep(600)"

TIED = f"""
import sys, time
import orphans
if sys.argv[1] == "portable":
    sys.platform = "other"
process = orphans.start_tied([sys.executable, "-c", {SLEEP!r}])
time.sleep(600)
"""

SPAWNED = f"""
import multiprocessing, sys, time
import orphans

def child(kind):
    if kind == "portable":
        sys.platform = "other"
    orphans.die_with_parent()
    exec({SLEEP!r})

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1],))
    process.start()
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["native", "portable"])
@pytest.mark.parametrize("script", [TIED, SPAWNED], ids=["tied", "spawned"])
def test_they_end_with_it(tmp_path, script, kind):
    """The pipe ends when every process that holds it has ended."""
    path = tmp_path / "parent.py"
    path.write_text(script)
    command = [sys.executable, str(path), kind]
    package = {"PYTHONPATH": str(ROOT / "qmimic_d2")}  # the module alone, which starts at once
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=package, text=True)
    try:
        assert parent.stdout.readline() == "started\n"
    finally:
        parent.kill()
    rest, _ = parent.communicate(timeout=60)
    assert rest == "" and parent.returncode == -signal.SIGKILL


def test_a_tied_command_that_ends_is_any_other():
    process = orphans.start_tied([sys.executable, "-c", "print('done'); raise SystemExit(3)"], stdout=subprocess.PIPE)
    assert process.communicate(timeout=60)[0] == b"done\n" and process.returncode == 3


def test_a_process_of_its_own_lives_on():
    orphans.die_with_parent()  # multiprocessing did not start it


def test_workers_of_every_loader_end_with_the_process_that_started_them(tmp_path, monkeypatch):
    loaders = []
    build = average_precision.build_image_loader

    def recording(*args, **options):
        loaders.append(build(*args, **options))
        return loaders[-1]

    monkeypatch.setattr(average_precision, "build_image_loader", recording)
    with registered_data(tmp_path) as name:
        cfg = training_cfg(tmp_path, name, evaluate=True)
        APEvaluation(cfg, name)
        loaders += [Trainer.build_test_loader(cfg, name), build_calibration_loader(cfg, [name], 1)[0]]
    assert [each.worker_init_fn for each in loaders] == [orphans.tie_worker] * 3
