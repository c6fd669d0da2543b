"""Whole runs in processes of their own: scripts of the docs, kills and signals, two processes, evaluation."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from helpers import write_teacher
from tiny_training import (
    BUILTIN_DATASET,
    ROOT,
    Run,
    registered_data,
    training_cfg,
    write_builtin_data,
    write_coco,
    written_losses,
)

from qmimic_d2.engine import Trainer, argument_parser, launch_processes
from qmimic_d2.folder_lock import FolderInUseError, alone_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with data, a teacher's two files, and the YAML of a student without and with it."""
    folder = tmp_path_factory.mktemp("project")
    write_builtin_data(folder / "datasets")
    teacher = write_teacher(folder)
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 80)
    plain = training_cfg(folder / "plain", BUILTIN_DATASET, *classes, "MODEL.QMIMIC.QUANTIZER.STRIDE", 1.0)
    (folder / "student.yaml").write_text(plain.dump())
    mimic = training_cfg(folder / "mimic", BUILTIN_DATASET, *classes, "SOLVER.BASE_LR", 0.001, teacher=teacher)
    (folder / "mimic.yaml").write_text(mimic.dump())
    return folder


def code_blocks(language):
    text = (ROOT / "docs" / "existing_project.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("number", [0, 1], ids=["a loop of one's own", "DefaultTrainer"])
def test_script_of_the_docs_trains_a_student(project, tmp_path, number):
    """The code in docs/existing_project.md, as it stands there."""
    (settings,) = code_blocks("yaml")
    script = code_blocks("python")[number]
    assert script.count("# added") == 3
    assert len(code_blocks("python")) == 2
    for name in ("teacher.yaml", "teacher.pth", "student.yaml"):
        shutil.copy(project / name, tmp_path)
    (tmp_path / "qmimic.yaml").write_text(settings)
    (tmp_path / "train.py").write_text(script)
    options = ("OUTPUT_DIR", "output", "SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 0.001)
    places = {"cwd": tmp_path, "datasets": project / "datasets", "script": tmp_path / "train.py"}
    test = ("DATASETS.TEST", f"('{BUILTIN_DATASET}',)")
    with Run("--config-file", "student.yaml", *options, *test, **places) as process:
        assert process.finish() == 0, process.texts()
    output = tmp_path / "output"
    metrics = (output / "metrics.json").read_text()
    assert '"loss_mimic"' in metrics and '"qmimic/match_ratio"' in metrics
    names = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert names["backbone.conv1.conv1.weight"].shape[0] == 2  # the student's, not the teacher's 4
    assert [name for name in names if not name.startswith(("backbone.", "proposal_generator.", "roi_heads."))] == [
        "mimic.adapters.conv5.weight",
        "mimic.adapters.conv5.bias",
        "mimic.weight._extra_state",  # where the balanced weight stands
    ]
    assert yaml.safe_load((output / "config.yaml").read_text())["MODEL"]["META_ARCHITECTURE"] == "QuantMimicRCNN"


def test_without_the_added_lines_the_scripts_know_nothing_of_it():
    for script in code_blocks("python"):
        kept = [line for line in script.splitlines() if not line.endswith("# added")]
        assert "qmimic" not in "\n".join(kept)
        compile("\n".join(kept), "train.py", "exec")


def train_net(project, output, *arguments):
    options = [each for each in arguments if not str(each).startswith("--")]
    flags = [each for each in arguments if str(each).startswith("--")]
    return Run(
        *("--config-file", "mimic.yaml", *flags, "OUTPUT_DIR", output, *options),
        cwd=project,
        datasets=project / "datasets",
    )


def finished(project, output, *arguments):
    """All that a run that ends well has written."""
    with train_net(project, output, *arguments) as process:
        assert process.finish() == 0, process.texts()
        return "".join(process.texts())


def interrupted(project, output, *arguments, path, number, to_all=False):
    """Trains without end until a file is there, then is interrupted by a signal; what it has written."""
    endless = ("SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 1)
    with train_net(project, output, *endless, *arguments) as process:
        process.wait_for(output / path)
        process.send(number, to_all)
        assert process.finish() == 128 + number, process.texts()
        text = "".join(process.texts())
    assert f"{number.name}: saved after iteration {last_iteration(output)}; continue with --resume" in text
    return text


def last_iteration(output):
    name = (output / "last_checkpoint").read_text()
    return torch.load(output / name, weights_only=True)["iteration"]


def test_killed_and_resumed_it_reaches_the_end(project, tmp_path):
    output = tmp_path / "output"
    with train_net(project, output, "SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 2) as process:
        process.wait_for(output / "last_checkpoint")
        time.sleep(random.random())  # any iteration, or in the middle of a checkpoint
        process.send(signal.SIGKILL)
        assert process.finish() == -signal.SIGKILL
    reached = last_iteration(output)
    assert reached % 2 == 1
    text = finished(project, output, "--resume", "SOLVER.MAX_ITER", reached + 4)
    assert f"Starting training from iteration {reached + 1}" in text
    assert last_iteration(output) == reached + 3
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert max(written_losses(output)) == reached + 3


def test_interrupted_resumed_and_evaluated_without_the_teacher(project, tmp_path):
    output = tmp_path / "output"
    text = interrupted(project, output, path="model_0000001.pth", number=signal.SIGTERM)
    assert "Traceback" not in text
    first = last_iteration(output)
    path = f"model_{first + 1:07d}.pth"
    workers = ("DATALOADER.NUM_WORKERS", 1)
    text = interrupted(project, output, "--resume", *workers, path=path, number=signal.SIGINT, to_all=True)
    assert "Traceback" not in text
    second = last_iteration(output)
    assert second > first

    text = finished(project, output, "--resume", "SOLVER.MAX_ITER", second + 3)
    assert f"Starting training from iteration {second + 1}" in text
    assert last_iteration(output) == second + 2
    assert sorted(path.name for path in output.glob("*.yaml")) == ["config.yaml", "teacher_config.yaml"]

    alone = tmp_path / "alone"
    shutil.copytree(project, alone)
    for path in (alone / "teacher.yaml", alone / "teacher.pth", output / "teacher_config.yaml"):
        path.unlink()
    before = (output / "config.yaml").read_text().replace(str(project), str(alone))
    (alone / "mimic.yaml").write_text((alone / "mimic.yaml").read_text().replace(str(project), str(alone)))
    test = ("DATASETS.TEST", f"('{BUILTIN_DATASET}',)", "MODEL.WEIGHTS", output / "model_final.pth")
    text = finished(alone, output, "--eval-only", *test)
    assert f"Evaluation results for {BUILTIN_DATASET} in csv format" in text
    assert (output / "evaluation.json").exists()
    assert (output / "config.yaml").read_text().replace(str(project), str(alone)) == before


@pytest.mark.ddp
def test_two_processes_save_when_they_are_interrupted(project, tmp_path):
    output = tmp_path / "output"
    flags = ("--num-processes=2", "--dist-url=auto", "--resume")
    interrupted(project, output, *flags, path="model_0000001.pth", number=signal.SIGTERM)
    first = last_iteration(output)
    assert (output / "log.txt.rank1").exists()
    flags += ("DATALOADER.NUM_WORKERS", 1)
    interrupted(project, output, *flags, path=f"model_{first + 1:07d}.pth", number=signal.SIGINT, to_all=True)
    second = last_iteration(output)
    assert second > first
    # the number of processes may change
    finished(project, output, "--resume", "SOLVER.MAX_ITER", second + 3)
    assert last_iteration(output) == second + 2


# Nothing is sampled at random, every process has equally many regions, and no BatchNorm sees a part of the batch.
DETERMINISTIC = (
    *("MODEL.VGG.NORM", "GN", "SOLVER.IMS_PER_BATCH", 4, "DATALOADER.ASPECT_RATIO_GROUPING", False),
    *("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 0, "MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 12, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 12),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 64),
)


def save_first_gradients(folder, dataset, cfg):
    """One step; writes the gradients of the first process. Runs in every process."""
    if dataset:
        with registered_data(Path(folder) / "data", dataset, is_written=True):
            return save_first_gradients(folder, "", cfg)
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    with EventStorage() as storage:
        trainer.storage = storage
        trainer.iter = 0
        for hook in trainer._hooks[:1]:
            hook.before_step()
        trainer.run_step()
        model = getattr(trainer.model, "module", trainer.model)
        losses = {name: value for name, (value, _) in storage.latest().items() if "loss" in name}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if trainer.checkpointer.save_to_disk:
        torch.save((gradients, losses), Path(folder) / "gradients.pth")


@pytest.mark.ddp
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """The same global batch, on a config that draws nothing at random."""
    write_coco(tmp_path / "data" / "annotations.json", tmp_path / "data" / "images")
    teacher = write_teacher(tmp_path)
    cfg = training_cfg(tmp_path / "output", "tiny_gradients", *DETERMINISTIC, teacher=teacher)
    found = []
    for flags in ([], ["--num-processes", "2", "--dist-url", "auto"]):
        args = argument_parser().parse_args(flags)
        launch_processes(save_first_gradients, args, (str(tmp_path), "tiny_gradients", cfg))
        found.append(torch.load(tmp_path / "gradients.pth", weights_only=False))
    (one, one_losses), (two, two_losses) = found
    assert one_losses == pytest.approx(two_losses, rel=1e-5)
    assert one_losses["loss_mimic"] > 0.0
    assert one.keys() == two.keys() and "mimic.adapters.conv5.weight" in one
    for name, gradient in one.items():
        scale = gradient.abs().max()
        assert scale > 0.0, name
        torch.testing.assert_close(two[name] / scale, gradient / scale, rtol=1e-4, atol=1e-5, msg=name)


def test_a_second_training_in_the_folder_is_refused(project, tmp_path):
    output = tmp_path / "output"
    with train_net(project, output, "SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 1) as first:
        first.wait_for(output / "last_checkpoint")
        before = (output / "config.yaml").read_text()
        for flags in (("--resume",), ("--resume", "--num-processes=2", "--dist-url=auto")):
            with train_net(project, output, *flags, "SOLVER.MAX_ITER", 5) as second:
                assert second.finish() == 1
                printed = second.texts()[1]
        assert "FolderInUseError: another process is at work in" in printed and "Traceback" not in printed
        assert (output / "config.yaml").read_text() == before
        first.send(signal.SIGKILL)
        first.finish()
    finished(project, output, "--resume", "SOLVER.MAX_ITER", last_iteration(output) + 2)


def test_a_killed_launcher_takes_its_processes_along(project, tmp_path):
    """The first of them holds the folder's lock, and writes a checkpoint in every iteration."""
    output = tmp_path / "output"
    endless = ("SOLVER.MAX_ITER", 100000, "SOLVER.CHECKPOINT_PERIOD", 1)
    with train_net(project, output, "--num-processes=2", "--dist-url=auto", *endless) as process:
        process.wait_for(output / "last_checkpoint")
        process.send(signal.SIGKILL)
        assert process.finish() == -signal.SIGKILL
        wait_until_free(output)
        reached = last_iteration(output)
    finished(project, output, "--resume", "SOLVER.MAX_ITER", reached + 2)
    assert last_iteration(output) == reached + 1


def wait_until_free(output):
    for _ in range(1000):
        try:
            with alone_in(str(output)):
                return
        except FolderInUseError:
            time.sleep(0.05)
    raise AssertionError("somebody still writes")


def test_a_divergence_ends_in_one_message(project, tmp_path):
    output = tmp_path / "output"
    options = ("SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", "(2,)")
    with train_net(project, output, "--num-processes=2", "--dist-url=auto", *options, "SOLVER.GAMMA", 1e30) as process:
        assert process.finish() == 1, process.texts()
        printed = process.texts()[1]
    last = (output / "last_checkpoint").read_text()
    assert "DivergedError: " in printed and "Traceback" not in printed
    assert f"The last finite checkpoint is {str(output / last)!r}: go on with --resume and a smaller" in printed
    assert torch.load(output / last, weights_only=True)["iteration"] in (1, 2)
