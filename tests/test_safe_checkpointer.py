"""The checkpointer: whole files only, safe reading, complete filling where it is needed."""

import logging
import os
import pickle
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import ConstantParamScheduler
from module_state import assert_same, randomized, snapshot
from torch import nn

from qmimic_d2.checkpoint import SafeCheckpointer, UnsafeCheckpointError, weights_digest
from qmimic_d2.files import remove_leftovers, whole_file


class Detector(nn.Module):
    """A backbone (convolution and norm) and a head."""

    def __init__(self, norm=nn.BatchNorm2d, adapter=False):
        super().__init__()
        self.backbone = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 1, bias=False), norm=norm(2)))
        self.head = nn.Linear(2, 1)
        if adapter:
            self.mimic = nn.Linear(1, 1)


# ---- saving


def test_save_and_resume_with_optimizer_and_schedule(tmp_path):
    def build(seed):
        model = randomized(Detector(), seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        multiplier = WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, 0.5, "linear")
        scheduler = LRMultiplier(optimizer, multiplier, max_iter=10)
        return model, optimizer, scheduler

    model, optimizer, scheduler = build(seed=0)
    model.head(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    saved = SafeCheckpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler)
    saved.save("model_0000001", iteration=1, hooks={"best": 0.5, "names": ["a"], "none": None, "t": (1, 2)})

    other, other_optimizer, other_scheduler = build(seed=1)
    resumed = SafeCheckpointer(other, str(tmp_path), optimizer=other_optimizer, scheduler=other_scheduler)
    rest = resumed.resume_or_load("", resume=True)
    assert_same(other, snapshot(model))
    assert rest["iteration"] == 1
    assert rest["hooks"] == {"best": 0.5, "names": ["a"], "none": None, "t": (1, 2)}
    assert other_scheduler.last_epoch == scheduler.last_epoch == 1
    momentum = optimizer.state[model.head.weight]["momentum_buffer"]
    assert torch.equal(other_optimizer.state[other.head.weight]["momentum_buffer"], momentum)


def test_files_are_those_of_detectron2(tmp_path):
    checkpointer = SafeCheckpointer(Detector(), str(tmp_path))
    checkpointer.save("model_0000001")
    checkpointer.save("model_final")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")
    assert len(checkpointer.get_all_checkpoint_files()) == 2


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("same_name", [True, False])
def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, error, same_name):
    model = randomized(Detector())
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_1")
    before = snapshot(model)

    def interrupted(data, file):
        file.write(b"PK\x03\x04 half of a file")
        raise error

    randomized(model, seed=1)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(type(error)):
        checkpointer.save("model_1" if same_name else "model_2")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_1.pth"]
    resumed = Detector()
    SafeCheckpointer(resumed, str(tmp_path)).resume_or_load("", resume=True)
    assert_same(resumed, before)


def test_interrupted_before_the_tag(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(Detector(), str(tmp_path))
    checkpointer.save("model_1")
    replace = os.replace

    def fails_for_the_tag(source, target):
        if os.path.basename(target) == "last_checkpoint":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_tag)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_2")
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_1.pth", "model_2.pth"]


def test_leftover_of_a_kill_is_no_checkpoint(tmp_path):
    """What SIGKILL leaves behind: the temporary file, cut short."""
    (tmp_path / "model_1.pth.partial").write_bytes(b"PK\x03\x04")  # as earlier versions named it
    with pytest.raises(KeyboardInterrupt), whole_file(str(tmp_path / "model_1.pth"), keeps_ending=False) as partial:
        shutil.copy(tmp_path / "model_1.pth.partial", partial)
        shutil.copy(partial, tmp_path / "kept")
        raise KeyboardInterrupt
    os.rename(tmp_path / "kept", partial)
    checkpointer = SafeCheckpointer(Detector(), str(tmp_path))
    assert not checkpointer.has_checkpoint() and checkpointer.get_all_checkpoint_files() == []
    checkpointer.save("model_1")
    assert len(os.listdir(tmp_path)) == 4
    remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_1.pth"]


class State:
    """Saves and restores ``value``."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_state_that_could_not_be_read_back_is_found_when_saving(tmp_path):
    checkpointer = SafeCheckpointer(Detector(), str(tmp_path), hook=State(Detector))
    with pytest.raises(ValueError, match="model_1.pth was not written.*Detector.*numbers, strings") as error:
        checkpointer.save("model_1")
    assert isinstance(error.value.__cause__, UnsafeCheckpointError)
    assert os.listdir(tmp_path) == []


def test_name_with_a_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot hold a folder, got 'best/model'"):
        SafeCheckpointer(Detector(), str(tmp_path)).save("best/model")


def test_saves_nothing_where_it_should_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SafeCheckpointer(Detector()).save("model_1")
    SafeCheckpointer(Detector(), str(tmp_path), save_to_disk=False).save("model_1")
    assert os.listdir(tmp_path) == []


def test_save_dir_that_is_an_address_is_left_to_its_handler(tmp_path):
    checkpointer = SafeCheckpointer(Detector(), "store://run")
    opened = []

    class Manager:
        def open(self, path, mode):
            opened.append(path)
            return open(tmp_path / os.path.basename(path), mode)

    checkpointer.path_manager = Manager()
    checkpointer.save("model_1")
    assert opened == ["store://run/model_1.pth", "store://run/last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"


# ---- loading


def saved(tmp_path, content, name="model.pth"):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


def test_empty_path_leaves_the_model_as_it_is():
    model = randomized(Detector())
    before = snapshot(model)
    assert SafeCheckpointer(model).resume_or_load("", resume=False) == {}
    assert_same(model, before)


def test_evaluation_needs_a_path():
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        SafeCheckpointer(Detector()).load_for_evaluation("")


def test_missing_file(tmp_path):
    checkpointer = SafeCheckpointer(Detector(), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS: checkpoint '.*nothing.pth' does not exist"):
        checkpointer.load(str(tmp_path / "nothing.pth"))
    (tmp_path / "last_checkpoint").write_text("deleted.pth")
    with pytest.raises(FileNotFoundError, match="last_checkpoint: checkpoint '.*deleted.pth' does not exist"):
        checkpointer.resume_or_load("", resume=True)


def test_truncated_file_and_a_second_try(tmp_path):
    model = Detector()
    path = saved(tmp_path, {"model": model.state_dict()})
    raw = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(raw[: len(raw) // 2])
    checkpointer = SafeCheckpointer(model)
    with pytest.raises(
        ValueError, match="MODEL.WEIGHTS: checkpoint '.*model.pth' is unreadable or cut short"
    ):
        checkpointer.load(path)
    (tmp_path / "model.pth").write_bytes(raw)
    checkpointer.load(path)  # the failure left nothing behind


class RunsCommand:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("write", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data, 2))])
@pytest.mark.parametrize("name", ["model.pth", "model.pyth", "model.pkl"])
def test_file_that_would_run_a_command(tmp_path, name, write):
    content = {"model": {"w": np.zeros(1)}, "__author__": "x", "x": RunsCommand(tmp_path / "trace")}
    write(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"MODEL.WEIGHTS: checkpoint '.*{name}'"):
        SafeCheckpointer(Detector()).load(str(tmp_path / name))
    assert not (tmp_path / "trace").exists()


def test_loading_logs_source_and_digest(tmp_path, caplog):
    source, target = randomized(Detector()), Detector()
    path = saved(tmp_path, {"model": source.state_dict()})
    with caplog.at_level(logging.INFO, logger="qmimic_d2"):
        SafeCheckpointer(target).load_for_evaluation(path)
    lines = [record.message for record in caplog.records if record.name == "qmimic_d2.checkpoint.checkpointer"]
    digest = weights_digest(source)
    assert lines == [f"Filled 7 tensors (13 values) of Detector from {path}, digest {digest}"]


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_layouts_of_torch_files(tmp_path, wrap, name):
    source, target = randomized(Detector()), Detector()
    state = nn.DataParallel(source).state_dict()
    SafeCheckpointer(target).load_for_evaluation(saved(tmp_path, {wrap: state} if wrap else state, name))
    assert_same(target, snapshot(source))


def test_initial_weights_may_fill_a_part(tmp_path):
    backbone = randomized(Detector()).backbone.state_dict()
    state = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    path = saved(tmp_path, {**state, "head.weight": torch.zeros(5, 2)})  # of a model of five classes
    target = Detector()
    head = target.head.weight.clone()
    SafeCheckpointer(target).resume_or_load(path, resume=False)
    assert torch.equal(target.backbone.conv.weight, backbone["conv.weight"])
    assert torch.equal(target.head.weight, head)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_initial_weights_that_fill_nothing(tmp_path, norm):
    state = {"features.0.weight": torch.zeros(1), "backbone.norm.num_batches_tracked": torch.tensor(1)}
    with pytest.raises(ValueError, match="fills nothing of Detector") as error:
        SafeCheckpointer(Detector(norm=norm)).load(saved(tmp_path, state))
    assert "unknown to the model:\n    features.0.weight" in str(error.value)


def test_evaluation_and_resuming_need_everything(tmp_path):
    state = Detector().state_dict()
    del state["head.bias"]
    state["head.weight"] = torch.zeros(5, 2)
    state["other"] = torch.zeros(1)
    path = saved(tmp_path, {"model": state})
    (tmp_path / "last_checkpoint").write_text("model.pth")
    checkpointer = SafeCheckpointer(Detector(), str(tmp_path))
    for load, key in (
        (lambda: checkpointer.load_for_evaluation(path), "MODEL.WEIGHTS"),
        (lambda: checkpointer.load(path, complete=True, key="TEACHER"), "TEACHER"),
        (lambda: checkpointer.resume_or_load("", resume=True), "last_checkpoint"),
    ):
        with pytest.raises(ValueError, match="fills only a part of Detector") as error:
            load()
        message = str(error.value)
        assert key in message and path in message
        assert "1 missing in the checkpoint:\n    head.bias" in message
        assert "head.weight: (5, 2) in the checkpoint, (1, 2) in the model" in message
        assert "1 unknown to the model:\n    other" in message
    checkpointer.load(path)  # as initial weights it will do


def test_evaluation_does_not_need_batch_counters(tmp_path):
    state = Detector().state_dict()
    del state["backbone.norm.num_batches_tracked"]
    SafeCheckpointer(Detector()).load_for_evaluation(saved(tmp_path, state))


def test_evaluation_leaves_optimizer_and_iteration_alone(tmp_path):
    path = saved(tmp_path, {"model": Detector().state_dict(), "trainer": {"value": 1}})
    trainer = State(0)
    checkpointer = SafeCheckpointer(Detector(), trainer=trainer)
    checkpointer.load_for_evaluation(path)
    assert trainer.value == 0
    checkpointer.load(path)
    assert trainer.value == 1


def test_ignored_prefixes(tmp_path, caplog):
    trained = randomized(Detector(adapter=True))
    path = saved(tmp_path, {"model": trained.state_dict()})
    student = Detector()
    checkpointer = SafeCheckpointer(student, ignored_prefixes=("mimic.",))
    checkpointer.load_for_evaluation(path)
    assert torch.equal(student.head.weight, trained.head.weight)
    assert "mimic." not in caplog.text
    with_adapter = Detector(adapter=True)
    SafeCheckpointer(with_adapter, ignored_prefixes=("mimic.",)).load_for_evaluation(path)
    assert_same(with_adapter, snapshot(trained))
    SafeCheckpointer(Detector()).load_for_evaluation(path)
    assert "mimic." in caplog.text  # Detectron2's warning of names that the model does not have


def test_name_converters(tmp_path):
    """Names of the bare backbone; Detectron2's suffix matching finds where they belong."""

    def convert(state):
        if "features.0.weight" not in state:
            return None
        return {"conv.weight": state["features.0.weight"]}

    def never(state):
        raise AssertionError("an earlier converter answered")

    target = Detector()
    weight = torch.full((2, 1, 1, 1), 5.0)
    path = saved(tmp_path, {"features.0.weight": weight, "classifier.weight": torch.zeros(1)})
    SafeCheckpointer(target, name_converters=(lambda state: None, convert, never)).load(path)
    assert torch.equal(target.backbone.conv.weight, weight)

    own = randomized(Detector())
    SafeCheckpointer(target, name_converters=(convert,)).load_for_evaluation(
        saved(tmp_path, own.state_dict())
    )
    assert_same(target, snapshot(own))


def test_matching_heuristics_in_the_query(tmp_path):
    weight = torch.full((2, 1, 1, 1), 5.0)
    path = saved(tmp_path, {"conv.weight": weight})
    target = Detector()
    SafeCheckpointer(target).load(path + "?matching_heuristics=True")
    assert torch.equal(target.backbone.conv.weight, weight)
    with pytest.raises(ValueError, match="Unsupported query"):
        SafeCheckpointer(target).load(path + "?other=1")


def test_model_zoo_pickle_with_heuristics(tmp_path):
    weight = np.full((2, 1, 1, 1), 5.0, dtype=np.float32)
    content = {"model": {"conv.weight": weight}, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content, protocol=2))
    target = Detector()
    SafeCheckpointer(target).load(str(tmp_path / "R-18.pkl"))
    assert target.backbone.conv.weight.flatten().tolist() == [5.0, 5.0]


@pytest.mark.parametrize("blobs", [True, False])
def test_caffe2_pickle(tmp_path, blobs):
    """Detectron2 renames pred_w to linear.weight for ImageNet's classifier."""
    arrays = {
        "pred_w": np.full((1, 2), 5.0, dtype=np.float32),
        "pred_w_momentum": np.zeros((9, 9), dtype=np.float32),
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": arrays} if blobs else arrays, protocol=2))
    target = nn.ModuleDict({"linear": nn.Linear(2, 1)})
    SafeCheckpointer(target).load(str(tmp_path / "R-50.pkl"))
    assert target["linear"].weight.tolist() == [[5.0, 5.0]]


def test_pycls_file(tmp_path):
    weight = torch.full((2, 1, 1, 1), 5.0)
    path = saved(tmp_path, {"model_state": {"conv.weight": weight}, "epoch": 3}, "RegNet.pyth")
    target = Detector()
    SafeCheckpointer(target).load(path)
    assert torch.equal(target.backbone.conv.weight, weight)
