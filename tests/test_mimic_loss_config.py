"""The mimic loss from a config: every option, and what it refuses."""

import pytest
from detectron2.config import CfgNode
from helpers import tiny_cfg
from mimic_losses import make_loss, spec
from torch import nn

from qmimic_d2.modeling.mimic.adapter import ADAPTERS
from qmimic_d2.modeling.mimic.loss import RoIMimicLoss
from qmimic_d2.modeling.quantizer import PowerOfTwoQuantizer, UniformQuantizer


def test_state_dict_holds_the_adapters_alone():
    loss = make_loss(student_quantizer=UniformQuantizer(1.0), code_quantizer=UniformQuantizer(1.0))
    assert sorted(loss.state_dict()) == ["adapters.f.bias", "adapters.f.weight"]


def from_config(*options, **shapes) -> RoIMimicLoss:
    cfg: CfgNode = tiny_cfg(*options)
    return RoIMimicLoss(cfg, shapes.get("student", {"f": spec(2)}), shapes.get("teacher", {"f": spec(3)}))


QUANTIZER = "MODEL.QMIMIC.QUANTIZER"
MIMIC = "MODEL.QMIMIC.MIMIC"


@pytest.mark.parametrize("of_student", [False, True])
@pytest.mark.parametrize("of_teacher", [False, True])
@pytest.mark.parametrize("name", ["", "Clamp", "Uniform", "PowerOfTwo"])
def test_the_config_puts_quantizers_where_it_says(name, of_teacher, of_student):
    loss = from_config(
        *(f"{QUANTIZER}.NAME", name),
        *(f"{MIMIC}.QUANTIZE_STUDENT", of_student),
        *(f"{MIMIC}.QUANTIZE_TEACHER", of_teacher),
    )
    assert (loss.student_quantizer is not None) == (bool(name) and of_student)
    assert (loss.teacher_quantizer is not None) == (bool(name) and of_teacher)
    for quantizer in (loss.student_quantizer, loss.teacher_quantizer):
        assert quantizer is None or type(quantizer).__name__ == f"{name}Quantizer"
    expected = PowerOfTwoQuantizer if name == "PowerOfTwo" else UniformQuantizer
    assert type(loss.code_quantizer) is expected
    assert loss.code_quantizer.stride == 0.25


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_config_sets_every_option(adapter):
    loss = from_config(
        *(f"{MIMIC}.ADAPTER", adapter),
        *(f"{MIMIC}.NORMALIZE_BY", "element"),
        *(f"{MIMIC}.POOLER_TYPE", "ROIAlign"),
        *(f"{MIMIC}.POOLER_RESOLUTION", 5),
        *(f"{MIMIC}.POOLER_SAMPLING_RATIO", 3),
        teacher={"f": spec(2)},
    )
    assert loss.normalize_by == "element"
    pooler = loss.pooler
    assert (pooler.pooler_type, pooler.resolution, pooler.sampling_ratio) == ("ROIAlign", 5, 3)
    kinds = {"": nn.Identity, "conv1x1": nn.Conv2d, "conv1x1_relu": nn.Sequential}
    assert type(loss.adapters["f"]) is kinds[adapter]


def test_teacher_strides_may_be_fractions_that_match():
    loss = from_config(student={"f": spec(2, stride=8)}, teacher={"g": spec(3, stride=8.0)})
    assert (loss.student_features, loss.teacher_features) == (["f"], ["g"])


@pytest.mark.parametrize(
    "options, words",
    [
        ((f"{MIMIC}.ADAPTER", "conv3x3"), [f"{MIMIC}.ADAPTER", "'conv3x3'", "conv1x1_relu"]),
        ((f"{MIMIC}.NORMALIZE_BY", "rois"), [f"{MIMIC}.NORMALIZE_BY", "'rois'", "'element'"]),
        ((f"{MIMIC}.POOLER_TYPE", "Bilinear"), [f"{MIMIC}.POOLER_TYPE", "'Bilinear'", "ROIPool"]),
        ((f"{MIMIC}.POOLER_RESOLUTION", 0), [f"{MIMIC}.POOLER_RESOLUTION", "0", "1 or more"]),
        ((f"{MIMIC}.POOLER_SAMPLING_RATIO", -1), [f"{MIMIC}.POOLER_SAMPLING_RATIO", "-1", "or more"]),
    ],
)
def test_unknown_options_name_key_value_and_fix(options, words):
    with pytest.raises(ValueError) as caught:
        from_config(*options)
    assert all(word in str(caught.value) for word in words)


def test_a_stride_that_differs_names_maps_strides_and_fix():
    with pytest.raises(ValueError) as caught:
        from_config(student={"conv5": spec(2, 8)}, teacher={"res4": spec(3, 16.0)})
    for word in ("'conv5'", "8", "'res4'", "16", "MODEL.QMIMIC.TEACHER.INPUT_SCALE"):
        assert word in str(caught.value)


def test_channels_that_differ_without_an_adapter_name_maps_counts_and_fix():
    with pytest.raises(ValueError) as caught:
        from_config(f"{MIMIC}.ADAPTER", "", student={"conv5": spec(2)}, teacher={"res4": spec(3)})
    for word in ("'conv5'", "2 channels", "'res4'", "has 3", f"{MIMIC}.ADAPTER", "'conv1x1'"):
        assert word in str(caught.value)


@pytest.mark.parametrize("teacher", [{}, {"p3": spec(3, 8)}])
def test_numbers_of_maps_that_differ_name_both_lists(teacher):
    student = {"p3": spec(2, 8), "p4": spec(2, 16)}
    with pytest.raises(ValueError) as caught:
        from_config(student=student, teacher=teacher)
    for word in (f"{MIMIC}.IN_FEATURES", "TEACHER_IN_FEATURES", "2 student maps", str(list(teacher))):
        assert word in str(caught.value)


def test_no_maps_at_all_is_an_error():
    with pytest.raises(ValueError, match="0 student maps"):
        from_config(student={}, teacher={})


def test_levels_whose_strides_do_not_double_are_refused():
    shapes = {"p3": spec(2, 8), "p5": spec(2, 32)}
    with pytest.raises(ValueError, match="double from"):
        from_config(student=shapes, teacher=shapes)
