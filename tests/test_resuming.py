"""Resuming with other settings, from damaged state, after a divergence, and where another process writes."""

import logging
import math
import os

import pytest
import torch
from tiny_training import Recorder, registered_data, training_cfg

from qmimic_d2.checkpoint.checkpointer import DivergedError
from qmimic_d2.engine import Trainer, check_run, load_config
from qmimic_d2.engine.checks.output_folder import check_output_dir
from qmimic_d2.folder_lock import FolderInUseError, alone_in


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with registered_data(tmp_path_factory.mktemp("data"), "tiny_resumed") as name:
        yield name
    torch.set_num_threads(threads)


def cfg_of(folder, data, *options):
    constant = ("SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    return training_cfg(folder, data, *constant, *options)


def trained(cfg, resume=False):
    torch.manual_seed(0)
    recorder = Recorder()
    trainer = Trainer(cfg)
    trainer._hooks.insert(0, recorder)
    recorder.trainer = trainer._hooks[1].trainer
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, recorder.losses


@pytest.fixture(scope="module")
def half(tmp_path_factory, data):
    """A training that is half done, with the config that it wrote."""
    folder = tmp_path_factory.mktemp("half")
    cfg = cfg_of(folder, data, "SOLVER.MAX_ITER", 2)
    trained(cfg)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def run(half, tmp_path):
    """A copy of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "model_final.pth", "last_checkpoint", "metrics.json"):
        (folder / name).write_bytes((half / name).read_bytes())
    return folder


# ---- other settings


@pytest.mark.parametrize(
    "options, setting, value",
    [
        (("SOLVER.BASE_LR", 0.005), "lr", 0.005),
        (("SOLVER.BASE_LR", 0.005), "initial_lr", 0.005),
        (("SOLVER.WEIGHT_DECAY", 0.25), "weight_decay", 0.25),
        (("SOLVER.MOMENTUM", 0.5), "momentum", 0.5),
        (("SOLVER.NESTEROV", True), "nesterov", True),
        (("SOLVER.STEPS", (1,)), "lr", 0.002),
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"), "lr", 0.01 * (1.0 + math.cos(math.pi / 2))),
    ],
)
def test_the_configs_settings_count(run, data, options, setting, value):
    trainer = Trainer(cfg_of(run, data, *options))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    # the norms' parameters are a group without weight decay
    groups = [group for group in trainer.optimizer.param_groups if group["weight_decay"] or setting != "weight_decay"]
    assert groups and [group[setting] for group in groups] == pytest.approx([value] * len(groups))


def test_a_training_with_another_rate_is_one_that_had_it_from_there(run, data):
    """With a momentum of 0, a step depends on the weights, the images and the rate alone."""
    other = ("SOLVER.BASE_LR", 0.005, "SOLVER.MOMENTUM", 0.0)
    resumed, losses = trained(cfg_of(run, data, *other), resume=True)
    assert [rate for rate, _ in resumed.storage.history("lr").values()] == [0.005, 0.005]
    assert resumed.scheduler.base_lrs == [0.005] * len(resumed.optimizer.param_groups)
    same, unchanged = trained(cfg_of(run.parent / "unchanged", data), resume=False)
    assert losses[2] == unchanged[2]  # before the first step with the new rate
    assert losses[3] != unchanged[3]


def test_gradients_may_be_clipped_from_there(run, data):
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
    trainer, _ = trained(cfg_of(run, data, *clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01), resume=True)
    norms = [parameter.grad.norm().item() for parameter in trainer.model.parameters()]
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_changed_settings_are_named(run, data, caplog):
    other = ("SOLVER.BASE_LR", 0.005, "SOLVER.STEPS", (3,), "SOLVER.CLIP_GRADIENTS.ENABLED", True)
    with caplog.at_level(logging.WARNING, logger="qmimic_d2.engine.resuming"):
        check_run(cfg_of(run, data, *other), 1, resume=True)
    (line,) = [record.message for record in caplog.records if record.name == "qmimic_d2.engine.resuming"]
    assert line.startswith("From iteration 2 on, SOLVER is another than so far: ")
    for change in ("BASE_LR 0.02 -> 0.005", "STEPS [] -> (3,)", "CLIP_GRADIENTS.ENABLED False -> True"):
        assert f"SOLVER.{change}" in line
    caplog.clear()
    check_run(cfg_of(run, data, "SOLVER.MAX_ITER", 2), 1, resume=True)
    assert "another than so far" not in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (("SOLVER.OPTIMIZER", "AdamW"), "SOLVER.OPTIMIZER is not that of .*'SGD'.*Set it to 'SGD', or begin"),
        (("SOLVER.BIAS_LR_FACTOR", 2.0), "has groups of .* trained parameters.*SOLVER.BIAS_LR_FACTOR"),
        (("MODEL.VGG.FREEZE_AT", 2), "has groups of .* trained parameters.*what is frozen .the FREEZE_AT keys"),
        (("SOLVER.MAX_ITER", 1), "SOLVER.MAX_ITER is 1.* is of iteration 1: 2 iterations are done. Set SOLVER"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_anything_is_written(run, data, options, message):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match=message):
        check_run(cfg_of(run, data, *options), 1, resume=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    with pytest.raises(ValueError, match=message):
        Trainer(cfg_of(run, data, *options)).resume_or_load(resume=True)


def test_an_optimizer_of_another_kind_the_other_way_round(tmp_path, data):
    trained(cfg_of(tmp_path, data, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.001, "SOLVER.MAX_ITER", 1))
    with pytest.raises(ValueError, match="Set it to 'AdamW'"):
        check_run(cfg_of(tmp_path, data), 1, resume=True)
    check_run(cfg_of(tmp_path, data, "SOLVER.OPTIMIZER", "AdamW"), 1, resume=True)


# ---- damaged state


def damaged_trainer(change):
    def damage(run):
        content = torch.load(run / "model_final.pth", weights_only=True)
        change(content)
        torch.save(content, run / "model_final.pth")

    return damage


def optimizer_of(content):
    return content["trainer"]["_trainer"]["optimizer"]


DAMAGES = {
    "no config.yaml content": (lambda run: (run / "config.yaml").write_bytes(b""), "is damaged .it is no Detectron2"),
    "no YAML": (lambda run: (run / "config.yaml").write_text("{a: ["), "config.yaml' is damaged .ParserError"),
    "binary": (lambda run: (run / "config.yaml").write_bytes(b"\x00\xff" * 9), "config.yaml' is damaged"),
    "a list": (lambda run: (run / "config.yaml").write_text("- 1\n"), "config.yaml' is damaged"),
    "deep": (lambda run: (run / "config.yaml").write_text("[" * 9999), "config.yaml' is damaged"),
    "code": (
        lambda run: (run / "config.yaml").write_text("SEED: !!python/object/apply:os.system ['true']"),
        "config.yaml' is damaged .ConstructorError",
    ),
    "an empty tag": (lambda run: (run / "last_checkpoint").write_text(""), "last_checkpoint' holds ''"),
    "a tag of nothing": (lambda run: (run / "last_checkpoint").write_text("no.pth"), "no.pth' does not exist"),
    "an empty checkpoint": (lambda run: (run / "model_final.pth").write_bytes(b""), "unreadable or cut short .0 bytes"),
    "weights alone": (damaged_trainer(lambda content: content.pop("trainer")), "weights without the state of a train"),
    "no iteration": (damaged_trainer(lambda content: content["trainer"].pop("iteration")), "a damaged state of the"),
    "text for an iteration": (
        damaged_trainer(lambda content: content["trainer"].update(iteration="3")),
        "a damaged state of the training",
    ),
    "no optimizer": (damaged_trainer(lambda content: content["trainer"].pop("_trainer")), "a damaged state of the"),
    "no schedule": (damaged_trainer(lambda content: content["trainer"].pop("hooks")), "a damaged state of the train"),
    "no groups": (damaged_trainer(lambda content: optimizer_of(content).update(param_groups=[])), "a damaged state"),
    "a list for the state": (damaged_trainer(lambda content: optimizer_of(content).update(state=[])), "a damaged"),
    "integers in the state": (
        damaged_trainer(lambda content: optimizer_of(content)["state"][0].update(momentum_buffer=torch.ones(9).int())),
        "an optimizer of another model: state 0.momentum_buffer",
    ),
    "NaN in the state": (
        damaged_trainer(lambda content: optimizer_of(content)["state"][0]["momentum_buffer"].fill_(math.nan)),
        "with NaN or infinite values:\n    trainer._trainer.optimizer.state.0.momentum_buffer",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_named_before_anything_is_written(run, data, damage):
    change, message = DAMAGES[damage]
    change(run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        check_run(cfg_of(run, data), 1, resume=True)
    assert str(run) in str(error.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("content", ["", "SEED: [1]\n", "SEED: text\n", "- 1\n", "\x00"])
def test_a_seed_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    options = ["OUTPUT_DIR", str(tmp_path), "SEED", "-1"]
    with pytest.raises(ValueError, match="config.yaml' is damaged .*give the run's SEED with --resume"):
        load_config("", options, resume=True)
    assert load_config("", [*options, "SEED", "3"], resume=True).SEED == 3


@pytest.mark.parametrize("name", ["a?b", "a#b", "a\tb", "a\nb", "a\x1b[31mb", "a\udcffb", "a\u202eb"])
def test_a_folder_whose_checkpoints_could_not_be_found_again(tmp_path, name):
    with pytest.raises(ValueError, match="OUTPUT_DIR is .*choose a name of letters") as error:
        check_output_dir(str(tmp_path / name))
    assert str(error.value).isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a b", "ä", "模型", "a%20b", "a;b", "a:b", "a&b=c", "(a)[b]{c}", "$a'\"", "-a"])
def test_a_folder_of_any_other_name_trains_and_resumes(tmp_path, data, name):
    folder = tmp_path / name
    check_output_dir(str(folder))
    trained(cfg_of(folder, data, "SOLVER.MAX_ITER", 1))
    check_run(cfg_of(folder, data), 1, resume=True)
    trainer = Trainer(cfg_of(folder, data))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1


def test_a_folder_in_use_is_refused(tmp_path):
    check_output_dir(str(tmp_path / "new"))
    assert os.listdir(tmp_path) == []
    with alone_in(str(tmp_path)), pytest.raises(FolderInUseError, match="another process is at work in"):
        check_output_dir(str(tmp_path))


# ---- divergence


class Explodes(Trainer):
    """Its weights become infinite in the step of one iteration, after the losses were found finite."""

    exploding = -1

    def run_step(self):
        super().run_step()
        if self.iter == self.exploding:
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.inf)


@pytest.mark.parametrize("exploding", [2, 3, 4, 5])
def test_a_diverged_training_keeps_the_last_finite_checkpoint(tmp_path, data, exploding, monkeypatch, caplog):
    """Before a checkpoint, in its iteration, in the last iteration. The evaluation at the end is left out."""
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: pytest.fail("an evaluation of nothing")))
    monkeypatch.setattr(Explodes, "exploding", exploding)
    cfg = cfg_of(tmp_path, data, "SOLVER.MAX_ITER", 6, "DATASETS.TEST", (data,))
    trainer = Explodes(cfg)
    with pytest.raises(DivergedError) as error:
        trainer.train()
    last = tmp_path / f"model_{1 if exploding < 4 else 3:07d}.pth"
    message = str(error.value)
    assert "the training has diverged" in message and "\n" not in message
    assert f"The last finite checkpoint is {str(last)!r}: go on with --resume and a smaller SOLVER.BASE_LR" in message
    assert (tmp_path / "last_checkpoint").read_text() == last.name
    assert not (tmp_path / "model_final.pth").exists()
    assert not any(record.exc_info for record in caplog.records)
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))
    resumed, losses = trained(cfg_of(tmp_path, data, "SOLVER.MAX_ITER", 6, "SOLVER.BASE_LR", 0.001), resume=True)
    assert sorted(losses) == list(range(2 if exploding < 4 else 4, 6))
    assert resumed.optimizer.param_groups[0]["lr"] == 0.001
