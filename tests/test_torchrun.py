"""Processes that torchrun starts, here as two machines: the weights are those of Detectron2's launcher."""

import signal
import socket

import pytest
import torch
from helpers import write_teacher
from tiny_training import BUILTIN_DATASET, Run, training_cfg, write_builtin_data

from qmimic_d2.engine import argument_parser, is_first_of_machine, num_processes

# Iterations: one machine is killed in the second.
LENGTH = 20


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


@pytest.mark.slow
@pytest.mark.ddp
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
    assert (output / "log.txt.rank1").exists()


@pytest.mark.parametrize("flags", [["--num-processes=2"], ["--num-gpus=2"], ["--num-machines=2"]])
def test_two_ways_to_start_processes_are_one_too_many(monkeypatch, flags):
    assert num_processes(argument_parser().parse_args([])) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert num_processes(argument_parser().parse_args([])) == 6
    with pytest.raises(ValueError, match="torchrun has started the processes of this run; leave out --num-processes"):
        num_processes(argument_parser().parse_args(flags))


def test_one_process_of_a_machine_speaks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert is_first_of_machine()  # a variable of somebody else's
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert not is_first_of_machine()
