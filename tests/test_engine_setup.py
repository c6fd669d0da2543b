"""From arguments to a config and to processes: what is looked up, drawn, saved and passed on."""

import argparse
import builtins
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from helpers import write_teacher
from tiny_training import ROOT, Recorder, registered_data, training_cfg

from qmimic_d2.checkpoint.checkpointer import DivergedError
from qmimic_d2.config_files import get_config_file
from qmimic_d2.engine import (
    Trainer,
    argument_parser,
    check_run,
    describe_error,
    launch_processes,
    load_config,
    num_processes,
    one_teacher,
    set_up_process,
)
from qmimic_d2.folder_lock import FolderInUseError, alone_in
from qmimic_d2.modeling.mimic import teacher, teacher_config

TEACHER = "MODEL.QMIMIC.TEACHER"
LOGGERS = ("detectron2", "fvcore", "qmimic_d2")


@pytest.fixture
def own_logging():
    """Detectron2's logging is set up for the test alone."""
    from detectron2.utils.logger import setup_logger

    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    setup_logger.cache_clear()
    yield
    for logger, handlers, propagate, level in before:
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = propagate
        logger.setLevel(level)
    setup_logger.cache_clear()


def arguments(*argv):
    return argument_parser().parse_args([str(each) for each in argv])


class TestArguments:
    def test_detectron2s_and_num_processes(self):
        args = arguments(
            *("--config-file", "a.yaml", "--resume", "--num-gpus", 2, "--num-machines", 3, "--machine-rank", 1),
            *("--dist-url", "auto", "--num-processes", 4, "SOLVER.MAX_ITER", 5),
        )
        assert (args.config_file, args.resume, args.eval_only, args.dist_url) == ("a.yaml", True, False, "auto")
        assert args.opts == ["SOLVER.MAX_ITER", "5"]

    @pytest.mark.parametrize(
        "argv, expected",
        [
            ((), 1),
            (("--num-gpus", 0), 1),
            (("--num-gpus", 2, "--num-machines", 3), 6),
            (("--num-gpus", 8, "--num-processes", 2), 2),
        ],
    )
    def test_number_of_processes(self, argv, expected):
        assert num_processes(arguments(*argv)) == expected


def test_errors_are_described_without_quotes():
    assert describe_error(KeyError("SEED is 'x'; give a number")) == "KeyError: SEED is 'x'; give a number"
    assert describe_error(ValueError("a\nb")) == "ValueError: a\nb"
    assert describe_error(KeyError()) == "KeyError: "
    assert describe_error(FileNotFoundError(2, "No such file", "x")) == "FileNotFoundError: [Errno 2] No such file: 'x'"


@pytest.fixture
def student(tmp_path):
    """YAMLs of a student and its teacher, which names it by a path from beside it."""
    (tmp_path / "configs").mkdir()
    teacher = write_teacher(tmp_path / "configs", name="the_teacher")
    cfg = training_cfg(tmp_path / "output", "tiny_setup", "SEED", -1, teacher=teacher)
    node = yaml.safe_load(cfg.dump())
    node["MODEL"]["QMIMIC"]["TEACHER"]["CONFIG_FILE"] = "the_teacher.yaml"
    path = tmp_path / "configs" / "student.yaml"
    path.write_text(yaml.safe_dump(node))
    return path


class TestLoadConfig:
    def test_defaults(self):
        cfg = load_config("", ["SEED", "3"])
        stock = get_cfg()
        assert cfg.is_frozen() and cfg.SEED == 3 and cfg.SOLVER.OPTIMIZER == "SGD"
        assert cfg.MODEL.RPN == stock.MODEL.RPN

    def test_teacher_is_found_beside_the_students_config(self, student, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        found = str(student.parent / "the_teacher.yaml")
        assert load_config(str(student)).MODEL.QMIMIC.TEACHER.CONFIG_FILE == found
        assert load_config("configs/student.yaml").MODEL.QMIMIC.TEACHER.CONFIG_FILE == found

    def test_packaged_configs_are_found_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        cfg = load_config("Digits/student_vgg_1_16_qmimic.yaml")
        assert cfg.MODEL.META_ARCHITECTURE == "QuantMimicRCNN"
        folder = Path(get_config_file("Digits/Base-Digits.yaml")).parent
        assert Path(cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE).parent == folder

    def test_an_evaluation_forgets_the_teacher(self, student):
        (student.parent / "the_teacher.yaml").unlink()
        assert load_config(str(student), eval_only=True).MODEL.QMIMIC.TEACHER.CONFIG_FILE == ""
        with pytest.raises(FileNotFoundError, match="TEACHER.CONFIG_FILE is 'the_teacher.yaml'.*Looked for"):
            load_config(str(student))

    def test_missing_config(self):
        with pytest.raises(FileNotFoundError, match="--config-file is 'nowhere.yaml'"):
            load_config("nowhere.yaml")

    def test_device(self, student, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert load_config(str(student), ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cpu"
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert load_config(str(student), ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cuda:1"
        assert load_config(str(student), ["MODEL.DEVICE", "cuda"], device="cpu").MODEL.DEVICE == "cpu"

    def test_a_negative_seed_becomes_a_drawn_one(self, student):
        seeds = {load_config(str(student)).SEED for _ in range(4)}
        assert len(seeds) == 4 and all(0 <= seed < 2**24 for seed in seeds)
        assert load_config(str(student), ["SEED", "7"]).SEED == 7

    def test_resuming_keeps_the_drawn_seed(self, student, tmp_path):
        def seeds(**options):
            return {load_config(str(student), **options).SEED for _ in range(3)}

        assert len(seeds(resume=True)) == 3  # nothing is there to resume
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "config.yaml").write_text("SEED: 11\n")
        assert seeds(resume=True) == {11}
        assert len(seeds()) == 3
        assert load_config(str(student), ["SEED", "7"], resume=True).SEED == 7
        (tmp_path / "output" / "config.yaml").write_text("SEED: -1\n")
        assert len(seeds(resume=True)) == 3


def files(folder):
    return {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix == ".yaml"}


class TestSetUpProcess:
    def test_training_writes_a_config_that_stands_alone(self, student, tmp_path, own_logging, monkeypatch):
        monkeypatch.chdir(tmp_path)
        weights = ("MODEL.WEIGHTS", "configs/the_teacher.pth", f"{TEACHER}.WEIGHTS", "configs/the_teacher.pth")
        opts = [*weights, f"{TEACHER}.OPTS", "['MODEL.VGG.DEPTH', 13]"]
        cfg = load_config("configs/student.yaml", opts)
        assert set_up_process(cfg, arguments("--config-file", "configs/student.yaml")) == cfg
        written = files(tmp_path / "output")
        assert sorted(written) == ["config.yaml", "teacher_config.yaml"]
        assert yaml.safe_load(written["teacher_config.yaml"])["MODEL"]["VGG"]["DEPTH"] == 13
        saved = yaml.safe_load(written["config.yaml"])
        absolute = str(tmp_path / "configs" / "the_teacher.pth")
        node = saved["MODEL"]["QMIMIC"]["TEACHER"]
        assert (node["CONFIG_FILE"], node["WEIGHTS"], node["OPTS"]) == ("teacher_config.yaml", absolute, [])
        assert saved["MODEL"]["WEIGHTS"] == absolute
        assert saved["SEED"] == cfg.SEED
        assert "Command line arguments" in (tmp_path / "output" / "log.txt").read_text()
        # read again, it is what ran
        again = load_config(str(tmp_path / "output" / "config.yaml"))
        assert again.MODEL.QMIMIC.TEACHER.CONFIG_FILE == str(tmp_path / "output" / "teacher_config.yaml")
        assert again.SOLVER == cfg.SOLVER and again.SEED == cfg.SEED

    def test_the_teachers_own_weights_are_named(self, student, tmp_path, own_logging, monkeypatch):
        monkeypatch.chdir(tmp_path)
        teacher = student.parent / "the_teacher.yaml"
        node = yaml.safe_load(teacher.read_text())
        node["MODEL"]["WEIGHTS"] = "configs/the_teacher.pth"
        teacher.write_text(yaml.safe_dump(node))
        set_up_process(load_config(str(student), [f"{TEACHER}.WEIGHTS", ""]), arguments())
        saved = yaml.safe_load(files(tmp_path / "output")["config.yaml"])
        assert saved["MODEL"]["QMIMIC"]["TEACHER"]["WEIGHTS"] == str(student.parent / "the_teacher.pth")

    def test_a_lazy_teacher_is_named_where_it_is(self, student, tmp_path, own_logging):
        lazy = student.parent / "lazy.py"
        lazy.write_text(
            "model = dict(backbone=None, pixel_mean=[1.0, 1.0, 1.0], pixel_std=[1.0, 1.0, 1.0])\n"
            "train = dict(init_checkpoint='detectron2://x.pkl')\n"
        )
        opts = [f"{TEACHER}.CONFIG_FILE", "lazy.py", f"{TEACHER}.WEIGHTS", "", f"{TEACHER}.OPTS", "['train.a=1']"]
        set_up_process(load_config(str(student), opts), arguments())
        written = files(tmp_path / "output")
        assert list(written) == ["config.yaml"]
        node = yaml.safe_load(written["config.yaml"])["MODEL"]["QMIMIC"]["TEACHER"]
        assert node["CONFIG_FILE"] == str(lazy) and node["OPTS"] == ["train.a=1"]
        assert node["WEIGHTS"] == "detectron2://x.pkl"

    def test_a_packaged_config_by_its_name(self, tmp_path, own_logging, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = "Digits/student_vgg_1_16_quant.yaml"
        cfg = load_config(name, ["OUTPUT_DIR", str(tmp_path / "output")])
        args = arguments("--config-file", name)
        set_up_process(cfg, args)
        assert args.config_file == name
        assert list(files(tmp_path / "output")) == ["config.yaml"]

    def test_an_evaluation_leaves_the_trainings_config(self, student, tmp_path, own_logging):
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "config.yaml").write_text("SEED: 11\n")
        cfg = load_config(str(student), eval_only=True)
        set_up_process(cfg, arguments("--eval-only", "--config-file", student))
        assert files(tmp_path / "output") == {"config.yaml": "SEED: 11\n"}
        assert torch.initial_seed() == cfg.SEED

    def test_machines_agree_on_the_seed(self, student, own_logging, monkeypatch):
        monkeypatch.setattr(comm, "all_gather", lambda seed: [5, seed])
        cfg = load_config(str(student), ["SEED", "7"])
        assert set_up_process(cfg, arguments()).SEED == 5
        assert cfg.SEED == 7 and cfg.is_frozen()


    def test_another_writer_is_refused_before_anything_is_written(self, student, tmp_path, own_logging):
        output = tmp_path / "output"
        output.mkdir()
        for flags in ((), ("--eval-only",)):
            cfg = load_config(str(student), eval_only=bool(flags))
            with alone_in(str(output)), pytest.raises(FolderInUseError, match="at work in .*output .process [0-9]+ on"):
                set_up_process(cfg, arguments(*flags))
        assert os.listdir(output) == [".lock"]

    def test_the_folder_is_held_until_the_process_ends_and_leftovers_go(self, student, tmp_path, own_logging):
        output = tmp_path / "output"
        output.mkdir()
        (output / "model_0000001.pth.partial").touch()
        (output / ".model_0000001.123.0123abcd.part").touch()
        cfg = load_config(str(student))
        set_up_process(cfg, arguments())
        assert not [name for name in os.listdir(output) if "part" in name]
        other = "import sys, folder_lock; folder_lock.hold_folder(sys.argv[1])"
        package = {"PYTHONPATH": str(ROOT / "qmimic_d2")}  # the module alone, which starts at once
        refused = subprocess.run([sys.executable, "-c", other, output], env=package, capture_output=True, text=True)
        assert refused.returncode == 1 and f"(process {os.getpid()} on " in refused.stderr
        set_up_process(cfg, arguments("--resume"))

    def test_other_processes_hold_nothing(self, student, tmp_path, own_logging, monkeypatch):
        monkeypatch.setattr(comm, "get_rank", lambda: 1)
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        set_up_process(load_config(str(student)), arguments())
        with alone_in(str(tmp_path / "output")):
            pass

    def test_a_config_is_never_half_written(self, student, tmp_path, own_logging, monkeypatch):
        """Neither file is opened under its own name."""
        output, opened = tmp_path / "output", []
        stock = builtins.open

        def noted(path, mode="r", *args, **kwargs):
            opened.append((os.path.basename(str(path)), mode))
            return stock(path, mode, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", noted)
        set_up_process(load_config(str(student)), arguments())
        assert (output / "config.yaml").exists() and (output / "teacher_config.yaml").exists()
        assert not [name for name, mode in opened if name.endswith("config.yaml") and "r" not in mode]


def first_losses(cfg, count=3):
    torch.manual_seed(cfg.SEED)
    recorder = Recorder()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([recorder])
    super(DefaultTrainer, trainer).train(0, count)
    return recorder.losses


def test_saved_config_repeats_the_run_from_another_folder(student, tmp_path, own_logging, monkeypatch):
    with registered_data(tmp_path / "data", "tiny_setup"):
        monkeypatch.chdir(tmp_path)
        cfg = load_config(str(student), [f"{TEACHER}.WEIGHTS", "configs/the_teacher.pth"])
        set_up_process(cfg, arguments())
        losses = first_losses(cfg)
        moved = tmp_path / "elsewhere"
        shutil.copytree(tmp_path / "output", moved)
        student.unlink()
        (student.parent / "the_teacher.yaml").unlink()
        monkeypatch.chdir(moved)
        again = load_config("config.yaml", ["OUTPUT_DIR", str(tmp_path / "again")])
        assert first_losses(again) == losses
        assert all("loss_mimic" in each for each in losses.values())


def test_a_training_goes_on_with_the_rehearsals_teacher(student, tmp_path, own_logging, monkeypatch):
    """One reading of its config, one build, one audit; and the losses are those of a teacher of its own."""
    done = Counter()

    def count(module, name):
        stock = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: done.update([name]) or stock(*args, **kwargs))

    count(teacher_config, "merge_config")
    count(teacher_config, "build_backbone")
    count(teacher, "read_checkpoint")
    losses = []
    with registered_data(tmp_path / "data", "tiny_setup"):
        for block in (contextlib.nullcontext, one_teacher):
            done.clear()
            cfg = load_config(str(student), ["OUTPUT_DIR", str(tmp_path / block.__name__), "SEED", "7"])
            with block():
                check_run(cfg, 1)
                set_up_process(cfg, arguments())
                losses.append(first_losses(cfg))
    assert done == {"merge_config": 1, "build_backbone": 1, "read_checkpoint": 1}
    assert losses[0] == losses[1] and all("loss_mimic" in each for each in losses[0].values())
    assert "were audited before the run" in (tmp_path / "one_teacher" / "log.txt").read_text()


class TestLaunch:
    def test_one_process_runs_here(self):
        ran = []
        handler = signal.getsignal(signal.SIGTERM)
        launch_processes(lambda *main_args: ran.append(main_args), arguments(), (1, "two"))
        assert ran == [(1, "two")]
        assert signal.getsignal(signal.SIGTERM) is handler

    def test_cpu_processes_see_no_gpu(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        seen = []
        launch_processes(lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]), arguments("--num-processes", 1), ())
        assert seen == [""]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        launch_processes(lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]), arguments(), ())
        assert seen == ["", "0"]

    def test_detectron2s_launcher_gets_the_arguments(self, monkeypatch):
        given = {}

        def launched(main, count, **kwargs):
            given.update(kwargs, main=main, count=count)

        monkeypatch.setattr("qmimic_d2.engine.launching.launch", launched)
        args = arguments("--num-processes", 2, "--num-machines", 3, "--machine-rank", 1, "--dist-url", "tcp://a:1")
        ran = []
        launch_processes(ran.append, args, (1,))
        given.pop("main")(*given.pop("args"))
        assert ran == [1]
        machines = {"num_machines": 3, "machine_rank": 1, "dist_url": "tcp://a:1"}
        assert given == {"count": 2, **machines}

    def test_a_process_leaves_its_group_when_its_work_is_done(self, monkeypatch):
        done = []
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("detectron2.utils.comm.synchronize", lambda: done.append("together"))
        monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: done.append("left"))
        launch_processes(done.append, arguments(), ("work",))
        assert done == ["work", "together", "left"]

    def test_signals_reach_the_children_and_decide_the_status(self, monkeypatch):
        sent = []
        children = [argparse.Namespace(pid=11), argparse.Namespace(pid=12)]
        monkeypatch.setattr("multiprocessing.active_children", lambda: children)
        handler = signal.getsignal(signal.SIGINT)

        def launched(*args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr("os.kill", lambda pid, number: sent.append((pid, number)))
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr("qmimic_d2.engine.launching.launch", launched)
        with pytest.raises(SystemExit) as stopped:
            launch_processes(print, arguments("--num-processes", 2), ())
        assert stopped.value.code == 130
        assert sent == [(11, signal.SIGINT), (12, signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) is handler

    def test_a_child_that_fails_by_itself_is_an_error(self, monkeypatch):
        def launched(*args, **kwargs):
            raise torch.multiprocessing.ProcessExitedException("died", 0, 11, 1)

        monkeypatch.setattr("qmimic_d2.engine.launching.launch", launched)
        with pytest.raises(torch.multiprocessing.ProcessExitedException):
            launch_processes(print, arguments("--num-processes", 2), ())

    @pytest.mark.parametrize("kind", [DivergedError, FolderInUseError])
    def test_what_a_person_can_mend_ends_in_one_message(self, monkeypatch, capfd, kind):
        def fails():
            raise kind("go on with --resume")

        with pytest.raises(SystemExit) as stopped:
            launch_processes(fails, arguments(), ())
        assert stopped.value.code == f"{kind.__name__}: go on with --resume"
        # in a child, which says it and whose status says that it did
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        with pytest.raises(SystemExit) as stopped:
            launch_processes(fails, arguments(), ())
        assert capfd.readouterr().err == f"{kind.__name__}: go on with --resume\n"

        def launched(*args, **kwargs):
            raise torch.multiprocessing.ProcessExitedException("died", 0, 11, stopped.value.code)

        monkeypatch.setattr("qmimic_d2.engine.launching.launch", launched)
        with pytest.raises(SystemExit) as launcher:
            launch_processes(print, arguments("--num-processes", 2), ())
        assert launcher.value.code == 1

    def test_without_children_nothing_is_sent(self, monkeypatch):
        monkeypatch.setattr("qmimic_d2.engine.launching.launch", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            launch_processes(print, arguments("--num-processes", 2), ())
        assert stopped.value.code == 128 + signal.SIGTERM
