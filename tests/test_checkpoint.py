"""Audited loading, and the digest of weights."""

import hashlib
import logging
import pickle
import re
import struct
from collections import OrderedDict

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from module_state import assert_same, randomized, snapshot
from torch import nn

from qmimic_d2.checkpoint import load_audited, read_checkpoint, weights_digest

KEY = "MODEL.QMIMIC.TEACHER.WEIGHTS"


class Detector(nn.Module):
    """A backbone (convolution and norm) and a head."""

    def __init__(self, norm=nn.BatchNorm2d, channels=2):
        super().__init__()
        self.backbone = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(1, channels, 1, bias=False), norm=norm(channels))
        )
        self.head = nn.Linear(channels, 1)


# ---- load_audited


def test_fills_the_module_and_logs_one_line(caplog):
    state = randomized(Detector()).state_dict()
    backbone = Detector().backbone
    with caplog.at_level(logging.INFO):
        digest = load_audited(backbone, state, prefix="backbone.", source="zoo/model.pth")
    assert torch.equal(backbone.conv.weight, state["backbone.conv.weight"])
    assert torch.equal(backbone.norm.running_var, state["backbone.norm.running_var"])
    assert digest == weights_digest(backbone)
    # conv.weight of 2 values; weight, bias, running_mean, running_var of 2 each; the counter does not count
    line = f"Filled 5 tensors (10 values) of Sequential from zoo/model.pth, digest {digest}"
    assert [record.message for record in caplog.records] == [line]
    assert caplog.records[0].levelno == logging.INFO and caplog.records[0].name == "qmimic_d2.checkpoint.checkpointer"


@pytest.mark.parametrize("prefix", ["backbone", "backbone."])
def test_prefix_with_and_without_dot(prefix):
    load_audited(Detector().backbone, Detector().state_dict(), prefix=prefix, source="x")


def test_empty_prefix_means_the_whole_model():
    source, target = randomized(Detector()), Detector()
    load_audited(target, source.state_dict(), prefix="", source="x")
    assert_same(target, snapshot(source))


def test_state_dict_is_left_as_it_was():
    state = Detector().state_dict()
    names, versions = list(state), dict(state._metadata)
    load_audited(Detector().backbone, state, prefix="backbone.", source="x")
    assert list(state) == names and dict(state._metadata) == versions


def problems_of(module, state, prefix="backbone."):
    """The message of the error, after checking that the module stayed as it was."""
    before = snapshot(module)
    with pytest.raises(ValueError) as error:
        load_audited(module, state, prefix=prefix, source="zoo/model.pth", key=KEY)
    assert_same(module, before)
    message = str(error.value)
    assert KEY in message and "zoo/model.pth" in message
    return message


def test_missing_entries_are_listed():
    state = randomized(Detector()).state_dict()
    del state["backbone.conv.weight"], state["backbone.norm.running_mean"], state["backbone.norm.bias"]
    message = problems_of(Detector().backbone, state)
    assert "3 missing in the checkpoint:" in message
    for name in ("backbone.conv.weight", "backbone.norm.bias", "backbone.norm.running_mean"):
        assert f"\n    {name}\n" in message
    assert "another shape" not in message and "unknown" not in message


def test_differing_shapes_are_listed_with_both():
    message = problems_of(Detector(channels=4).backbone, randomized(Detector(channels=2)).state_dict())
    assert "5 of another shape:" in message and "missing" not in message
    assert "backbone.conv.weight: (2, 1, 1, 1) in the checkpoint, (4, 1, 1, 1) in the model" in message


def test_unexpected_entries_below_the_prefix_are_listed():
    state = randomized(Detector()).state_dict()
    state["backbone.res5.conv.weight"] = torch.zeros(1)
    state["roi_heads.weight"] = torch.zeros(1)
    message = problems_of(Detector().backbone, state)
    assert "1 unknown to the model:\n    backbone.res5.conv.weight" in message
    assert "roi_heads" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_listed(value):
    state = randomized(Detector()).state_dict()
    state["backbone.norm.weight"][1] = value
    state["head.weight"][0] = value  # not below the prefix
    message = problems_of(Detector().backbone, state)
    assert "1 with NaN or infinite values:\n    backbone.norm.weight" in message and "head" not in message


def test_all_kinds_of_problems_in_one_error():
    state = randomized(Detector()).state_dict()
    del state["backbone.norm.bias"]
    state["backbone.conv.weight"] = torch.zeros(3)
    state["backbone.other"] = torch.zeros(1)
    state["backbone.norm.running_mean"][0] = float("nan")
    message = problems_of(Detector().backbone, state)
    for kind in ("1 missing", "1 of another shape", "1 unknown", "1 with NaN"):
        assert kind in message


def test_state_dict_without_the_prefix():
    message = problems_of(Detector().backbone, {"conv.weight": torch.zeros(2, 1, 1, 1)})
    assert "no name begins with 'backbone.'; names are such as ['conv.weight']" in message
    assert "5 missing" in message


def test_empty_state_dict():
    assert "5 missing" in problems_of(Detector().backbone, {})


def test_long_lists_are_cut():
    module = nn.ModuleList(nn.Linear(1, 1) for _ in range(13))
    message = problems_of(module, {"backbone.0.weight": torch.zeros(1, 1)})
    assert "25 missing" in message and "and 5 more" in message


def test_error_raised_by_a_module_itself():
    class Refuses(nn.Linear):
        def _load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        ):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
            if state_dict[prefix + "bias"] < 0:
                errors.append("a negative bias")

    module = Refuses(1, 1)
    module.bias.data.fill_(1)
    message = problems_of(module, {"backbone.weight": torch.ones(1, 1), "backbone.bias": -torch.ones(1)})
    assert "does not load into Refuses" in message


def test_batch_counters_may_be_absent_or_extra():
    state = randomized(Detector()).state_dict()
    del state["backbone.norm.num_batches_tracked"]
    load_audited(Detector().backbone, state, prefix="backbone.", source="x")
    with_counter = randomized(Detector()).state_dict()
    frozen = Detector(norm=FrozenBatchNorm2d).backbone
    assert "norm.num_batches_tracked" not in frozen.state_dict()
    load_audited(frozen, with_counter, prefix="backbone.", source="x")
    assert torch.equal(frozen.norm.running_mean, with_counter["backbone.norm.running_mean"])


def test_statistics_that_an_old_file_lacks_are_named(caplog):
    """Files from before FrozenBatchNorm2d's version 2 hold weight and bias alone; so do some of the zoo's."""
    state = dict(randomized(Detector(norm=FrozenBatchNorm2d)).state_dict())  # dict: without versions
    del state["backbone.norm.running_mean"], state["backbone.norm.running_var"]
    backbone = randomized(Detector(norm=FrozenBatchNorm2d), seed=1).backbone
    load_audited(backbone, state, prefix="backbone.", source="old.pkl")
    assert backbone.norm.running_mean.tolist() == [0, 0] and backbone.norm.running_var.tolist() == [1, 1]
    assert "norm.running_mean" in caplog.text and "norm.running_var" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_statistics_that_a_new_file_lacks_are_an_error():
    state = randomized(Detector(norm=FrozenBatchNorm2d)).state_dict()  # with versions
    del state["backbone.norm.running_mean"]
    message = problems_of(randomized(Detector(norm=FrozenBatchNorm2d), seed=1).backbone, state)
    assert "1 missing in the checkpoint:\n    backbone.norm.running_mean" in message


def test_half_precision_weights_fill_a_float_module():
    state = {name: t.half() if t.is_floating_point() else t for name, t in Detector().state_dict().items()}
    backbone = Detector().backbone
    load_audited(backbone, state, prefix="backbone.", source="x")
    assert backbone.conv.weight.dtype == torch.float32
    assert torch.equal(backbone.conv.weight, state["backbone.conv.weight"].float())


def test_model_zoo_file_to_backbone(tmp_path):
    teacher = randomized(Detector())
    arrays = {name: tensor.numpy() for name, tensor in teacher.state_dict().items()}
    with open(tmp_path / "model_final.pkl", "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file, protocol=2)
    state = read_checkpoint(str(tmp_path / "model_final.pkl"), KEY)
    backbone = Detector().backbone
    digest = load_audited(backbone, state, prefix="backbone.", source="model_final.pkl", key=KEY)
    assert digest == weights_digest(teacher.backbone)


# ---- weights_digest


def test_digest_is_pinned():
    state = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3)}
    header_a, header_b = b"a\0torch.int64\0()\0", b"b\0torch.float32\0(2,)\0"
    content = header_a + struct.pack("<q", 3) + header_b + struct.pack("<2f", 1.0, 2.0)
    assert weights_digest(state) == hashlib.sha256(content).hexdigest()[:12] == "9019b78cd2c0"


def test_digest_does_not_depend_on_order_layout_or_counters():
    weight = torch.arange(6.0).view(2, 3)
    expected = weights_digest({"a": weight, "b": torch.ones(2)})
    assert re.fullmatch("[0-9a-f]{12}", expected)
    assert weights_digest({"b": torch.ones(2), "a": weight}) == expected
    assert weights_digest({"a": weight.t().contiguous().t(), "b": torch.ones(4)[::2]}) == expected
    assert weights_digest({"a": nn.Parameter(weight), "b": torch.ones(2)}) == expected
    counted = {"a": weight, "b": torch.ones(2), "norm.num_batches_tracked": torch.tensor(5)}
    assert weights_digest(counted) == expected


def test_digest_depends_on_names_values_shapes_and_dtypes():
    states = [
        {"a": torch.zeros(2)},
        {"b": torch.zeros(2)},
        {"a": torch.tensor([0.0, 1e-38])},
        {"a": torch.zeros(2, 1)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(4, dtype=torch.bfloat16)},
        {"a": torch.zeros(0)},
        {"a": torch.zeros(0, 3)},
        {"a": torch.tensor(True)},
        {},
    ]
    assert len({weights_digest(state) for state in states}) == len(states)


def test_digest_of_a_module_is_that_of_its_state_dict():
    model = randomized(Detector())
    assert weights_digest(model) == weights_digest(model.state_dict())
    model.head.bias.data += 1
    assert weights_digest(model) != weights_digest(randomized(Detector()))


def test_digest_of_something_else():
    with pytest.raises(ValueError, match="'a' is a float"):
        weights_digest({"a": 1.0})
