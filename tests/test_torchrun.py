"""Processes that torchrun starts, on one machine and as two: the weights are those of Detectron2's launcher."""

import signal
import socket

import pytest
import torch
from helpers import write_teacher
from tiny_training import BUILTIN_DATASET, Run, training_cfg, write_builtin_data

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

# Iterations: one machine is killed in the second.
LENGTH = 30
STANDALONE = ("--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with data, a teacher's two files, and a student's YAML."""
    folder = tmp_path_factory.mktemp("project")
    write_builtin_data(folder / "datasets")
    options = ("MODEL.ROI_HEADS.NUM_CLASSES", 80, "SOLVER.BASE_LR", 0.001, "SOLVER.CHECKPOINT_PERIOD", 1)
    cfg = training_cfg(folder / "mimic", BUILTIN_DATASET, *options, teacher=write_teacher(folder))
    (folder / "mimic.yaml").write_text(cfg.dump())
    return folder


def train_net(project, output, *flags, launcher=()):
    launcher = ("-m", "torch.distributed.run", *launcher) if launcher else ()
    pairs = ("OUTPUT_DIR", output, "SOLVER.MAX_ITER", LENGTH)
    places = {"cwd": project, "datasets": project / "datasets"}
    return Run("--config-file", "mimic.yaml", *flags, *pairs, launcher=launcher, **places)


def finished(*arguments, **options):
    with train_net(*arguments, **options) as process:
        assert process.finish() == 0, process.texts()


@pytest.fixture(scope="module")
def expected(project, tmp_path_factory):
    """Trained weights of two processes that Detectron2's launcher starts, by name."""
    output = tmp_path_factory.mktemp("launched")
    finished(project, output, "--num-processes=2", "--dist-url=auto")
    return trained_weights(output)


def trained_weights(output):
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == LENGTH - 1
    return {name: each for name, each in checkpoint["model"].items() if isinstance(each, torch.Tensor)}


def assert_equal(weights, others):
    assert weights.keys() == others.keys() and "backbone.conv1.conv1.weight" in weights
    assert all(torch.equal(each, others[name]) for name, each in weights.items())


def test_torchrun_trains_as_the_launcher_does(project, expected, tmp_path):
    finished(project, tmp_path / "output", launcher=STANDALONE)
    assert_equal(trained_weights(tmp_path / "output"), expected)
    assert (tmp_path / "output" / "log.txt.rank1").exists()


def test_one_of_two_machines_is_killed_and_both_resume(project, expected, tmp_path):
    output = tmp_path / "output"

    def machines():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--max-restarts=0")
        launcher = ("--nnodes=2", "--nproc-per-node=1", *place)
        return [train_net(project, output, "--resume", launcher=launcher) for _ in range(2)]

    first, second = machines()
    with first, second:
        first.wait_for(output / "model_0000001.pth")
        second.send(signal.SIGKILL)
        second.finish()
        assert first.finish() != 0  # it cannot go on alone, and ends by itself
    assert not (output / "model_final.pth").exists()
    first, second = machines()
    with first, second:
        assert [first.finish(), second.finish()] == [0, 0], (first.texts(), second.texts())
    assert_equal(trained_weights(output), expected)


def test_two_ways_to_start_processes_are_one_too_many(project, tmp_path):
    output = tmp_path / "output"
    with train_net(project, output, "--num-processes=2", launcher=STANDALONE) as process:
        assert process.finish() == 1
        printed = "".join(process.texts())
    assert "ValueError: torchrun has started the processes of this run; leave out --num-processes" in printed
    assert not output.exists()
