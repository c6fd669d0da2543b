"""Parameters and FLOPs, against counts by hand."""

import logging

import pytest
import torch
from helpers import seeded_model, tiny_cfg, write_teacher

from qmimic_d2.analysis import measure_cost

# The tiny detector on 64 x 64 pixels. Multiply-adds of its eight 3 x 3 convolutions, output cells times
# input and output channels times 9 ...
BACKBONE_CONVOLUTIONS = (
    32 * 32 * (3 * 2) * 9
    + 16 * 16 * (2 * 4) * 9
    + 8 * 8 * (4 * 8 + 8 * 8) * 9
    + 8 * 8 * (8 * 16 + 16 * 16) * 9
    + 8 * 8 * (16 * 16 + 16 * 16) * 9
)
# ... and two per value that they put out, for the BatchNorm behind each.
BACKBONE_NORMS = 2 * (32 * 32 * 2 + 16 * 16 * 4 + 8 * 8 * (8 + 8) + 8 * 8 * 16 * 4)
# 3 x 3 convolution, then two anchors per cell with a logit and four deltas each.
RPN = 8 * 8 * (16 * 16 * 9 + 16 * 2 + 16 * 2 * 4)
# 12 proposals of 16 x 3 x 3 values; 8 units; 3 classes and background; 3 boxes.
ROI_HEADS = 12 * (16 * 3 * 3 * 8 + 8 * 4 + 8 * 3 * 4)


def test_flops_by_hand():
    cost = measure_cost(tiny_cfg(), 64, 64)
    assert cost.parts["backbone"].flops == BACKBONE_CONVOLUTIONS + BACKBONE_NORMS
    assert cost.parts["proposal_generator"].flops == RPN
    assert cost.parts["roi_heads"].flops == ROI_HEADS
    assert cost.parts["other"].flops == 0
    assert cost.flops == BACKBONE_CONVOLUTIONS + BACKBONE_NORMS + RPN + ROI_HEADS
    assert (cost.height, cost.width, cost.num_proposals) == (64, 64, 12)


def test_parameters_by_hand():
    convolutions = (3 * 2 + 2 * 4 + 4 * 8 + 8 * 8 + 8 * 16 + 3 * 16 * 16) * 9
    norms = 2 * (2 + 4 + 8 + 8 + 4 * 16)
    rpn = (16 * 16 * 9 + 16) + (16 * 2 + 2) + (16 * 8 + 8)
    heads = (144 * 8 + 8) + (8 * 4 + 4) + (8 * 12 + 12)
    cost = measure_cost(tiny_cfg(), 64, 64)
    assert {name: part.parameters for name, part in cost.parts.items()} == {
        "backbone": convolutions + norms,
        "proposal_generator": rpn,
        "roi_heads": heads,
        "other": 0,
    }
    assert cost.parameters == convolutions + norms + rpn + heads


def test_flops_follow_image_and_proposals():
    small = measure_cost(tiny_cfg(), 64, 64)
    wide = measure_cost(tiny_cfg(), 64, 128)
    assert wide.parts["backbone"].flops == 2 * small.parts["backbone"].flops
    assert wide.parts["roi_heads"].flops == small.parts["roi_heads"].flops
    more = measure_cost(tiny_cfg("MODEL.RPN.POST_NMS_TOPK_TEST", 24), 64, 64)
    assert more.parts["roi_heads"].flops == 2 * ROI_HEADS
    assert more.parts["backbone"] == small.parts["backbone"]


@pytest.mark.slow
def test_teacher_adapter_and_quantizer_cost_nothing(tmp_path):
    teacher = write_teacher(tmp_path)
    plain = measure_cost(tiny_cfg(), 64, 64)
    quantized = measure_cost(tiny_cfg(meta_architecture="QuantRCNN"), 64, 64)
    student = tiny_cfg(*teacher.options, meta_architecture="QuantMimicRCNN")
    assert (quantized.flops, quantized.parameters) == (plain.flops, plain.parameters)
    assert measure_cost(student, 64, 64).parts == quantized.parts
    model = seeded_model(student)
    assert any(name.startswith("mimic.") for name, _ in model.named_parameters())
    assert measure_cost(model, 64, 64).parts == quantized.parts


def test_a_model_is_left_as_it_was():
    model = seeded_model(tiny_cfg(meta_architecture="QuantRCNN")).train()
    modules = dict(model.named_modules())
    hooks = {name: len(each._forward_hooks) for name, each in modules.items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    measure_cost(model, 64, 64)
    assert model.training
    assert {name: len(each._forward_hooks) for name, each in model.named_modules()} == hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_a_config_is_left_as_it_was_and_draws_no_random_numbers():
    cfg = tiny_cfg("MODEL.DEVICE", "cuda")
    text, random_state = cfg.dump(), torch.random.get_rng_state()
    measure_cost(cfg, 64, 64)
    assert cfg.dump() == text
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_what_is_not_counted_is_listed_and_not_logged(caplog):
    with caplog.at_level(logging.WARNING, logger="fvcore"):
        cost = measure_cost(tiny_cfg(), 64, 64)
    assert "torchvision::roi_align" in cost.uncounted_ops
    assert not [record for record in caplog.records if record.name.startswith("fvcore")]


def test_as_plain_values():
    content = measure_cost(tiny_cfg(), 64, 64).to_dict()
    assert content["parts"]["roi_heads"]["flops"] == ROI_HEADS
    assert content["num_proposals"] == 12
    assert set(content) == {
        *("height", "width", "num_proposals"),
        *("parameters", "flops", "parts", "uncounted_ops"),
    }


@pytest.mark.parametrize("size", [(0, 64), (64, -1), (64.5, 64), (True, 64)])
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match="height is|width is"):
        measure_cost(tiny_cfg(), *size)
