"""The frozen teacher: features that depend on the image alone, from a network that nothing changes."""

import copy

import pytest
import torch
from detectron2.structures import ImageList
from helpers import RESNET_FPN, image, seeded_model, tiny_cfg, write_teacher
from teachers import P3_TO_P5, Brightness, brightness_teacher, inputs, plain_teacher, preprocessed
from torch import nn

from qmimic_d2.modeling.mimic.teacher import FrozenTeacher, teacher_shapes
from qmimic_d2.modeling.quantizer import PowerOfTwoQuantizer, UniformQuantizer

# ------------------------------------------------------------------------- one image does not see others


@pytest.mark.parametrize("family", ["vgg", "resnet_fpn"])
def test_features_do_not_depend_on_batch_mates(tmp_path, family):
    options, features = ((), ()) if family == "vgg" else (RESNET_FPN, P3_TO_P5)
    teacher = plain_teacher(write_teacher(tmp_path, *options), *features)
    mine = image(64, 48, seed=1)
    alone = teacher.features(inputs(mine))
    for mates in ([image(96, 80, seed=2)], [image(40, 20, seed=3), image(96, 32, seed=4)]):
        together = teacher.features(inputs(mates[0], mine, *mates[1:]))
        for name, expected in alone.items():
            height, width = expected.shape[-2:]
            assert torch.equal(together[name][1, :, :height, :width], expected[0])


def test_features_do_not_depend_on_the_content_of_batch_mates(tmp_path):
    teacher = plain_teacher(write_teacher(tmp_path))
    mine = image(64, 64, seed=1)
    dark, bright = torch.zeros_like(mine), torch.full_like(mine, 255)
    first = teacher.features(inputs(mine, dark))["conv5"][0]
    second = teacher.features(inputs(mine, bright))["conv5"][0]
    third = teacher.features(inputs(bright, mine))["conv5"][1]
    assert torch.equal(first, second) and torch.equal(first, third)


def test_features_of_equal_images_in_one_batch_are_equal_to_rounding(tmp_path):
    teacher = plain_teacher(write_teacher(tmp_path))
    mine, mates = image(64, 64, seed=1), [image(64, 64, seed=seed) for seed in (2, 3)]
    alone = teacher.features(inputs(mine))["conv5"][0]
    torch.testing.assert_close(teacher.features(inputs(*mates, mine))["conv5"][2], alone)


def test_codes_do_not_depend_on_batch_mates_of_other_sizes(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    mine = image(64, 48, seed=1)
    alone = teacher.features(inputs(mine))["conv5"]
    together = teacher.features(inputs(image(80, 96, seed=2), mine))["conv5"]
    assert torch.equal(together[1, :, :8, :6], alone[0])


def test_maps_of_several_sizes_keep_the_order_and_are_continued_by_their_border():
    images = [image(2, 3, seed=1), image(4, 2, seed=2), image(2, 3, seed=3)]
    features = brightness_teacher().features(inputs(*images))["pixels"]
    assert features.shape == (3, 3, 4, 3)
    first, second, third = (each.float() for each in images)
    for index, expected in ((0, first), (2, third)):
        assert torch.equal(features[index, :, :2], expected)
        assert torch.equal(features[index, :, 2:], expected[:, 1:].expand(-1, 2, -1))
    assert torch.equal(features[1, :, :, :2], second)
    assert torch.equal(features[1, :, :, 2], second[:, :, 1])


# --------------------------------------------------------------------------------------------- quantizer


@pytest.mark.parametrize("name, kind", [("Uniform", UniformQuantizer), ("PowerOfTwo", PowerOfTwoQuantizer)])
def test_features_are_codes_of_the_students_dictionary(tmp_path, name, kind):
    # the teacher's own YAML says otherwise, and does not count
    written = write_teacher(
        tmp_path, *("MODEL.META_ARCHITECTURE", "QuantRCNN"), *("MODEL.QMIMIC.QUANTIZER.STRIDE", 3.0)
    )
    batch = inputs(image(seed=1), image(64, 80, seed=2))
    codes = FrozenTeacher(tiny_cfg(*written.options, "MODEL.QMIMIC.QUANTIZER.NAME", name)).features(batch)["conv5"]
    plain = plain_teacher(written).features(batch)["conv5"]
    assert torch.equal(codes, kind(0.25).quantize(plain))
    assert not torch.equal(codes, plain)


def test_teacher_on_false_gives_full_precision(tmp_path):
    written, batch = write_teacher(tmp_path), inputs(image())
    off = FrozenTeacher(tiny_cfg(*written.options, "MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False))
    assert torch.equal(off.features(batch)["conv5"], plain_teacher(written).features(batch)["conv5"])


def test_only_the_compared_maps_are_quantized_and_given(tmp_path):
    written = write_teacher(tmp_path, "MODEL.VGG.OUT_FEATURES", ["conv4", "conv5"])
    teacher = FrozenTeacher(tiny_cfg(*written.options, "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["conv4"]))
    assert list(teacher.features(inputs(image()))) == ["conv4"]


# ------------------------------------------------------------------------------ frozen, and no submodule


def test_it_is_no_module_and_its_holder_does_not_see_it(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    holder = nn.Linear(2, 2)
    names = sorted(holder.state_dict())
    holder.teacher = teacher
    assert not isinstance(teacher, nn.Module)
    assert sorted(holder.state_dict()) == names
    assert len(list(holder.parameters())) == 2 and len(list(holder.modules())) == 1


def test_it_is_in_eval_mode_without_gradients_from_the_start():
    backbone = Brightness().train()
    brightness_teacher(backbone)
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_features_carry_no_graph_and_no_statistic_changes(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    before = teacher.features(inputs(image(seed=20)))["conv5"]
    for seed in range(3):
        features = teacher.features(inputs(image(seed=seed), image(seed=seed + 10)))["conv5"]
        assert features.is_inference() and not features.requires_grad
    assert torch.equal(teacher.features(inputs(image(seed=20)))["conv5"], before)


def test_deepcopy_shares_it(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    holder = nn.Linear(2, 2)
    holder.teacher = teacher
    assert copy.deepcopy(teacher) is teacher
    assert copy.deepcopy(holder).teacher is teacher


def test_to_returns_itself_and_keeps_the_dtype(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    assert teacher.to("cpu") is teacher and teacher.to(torch.device("cpu")) is teacher
    assert teacher.device == torch.device("cpu")
    assert teacher.features(inputs(image()))["conv5"].dtype == torch.float32


def test_to_moves_everything():
    backbone = Brightness()
    teacher = brightness_teacher(backbone).to("meta")
    assert teacher.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in backbone.state_dict().values())
    assert teacher.features(inputs(image(4, 6)))["pixels"].device.type == "meta"


def test_building_it_draws_no_random_number(tmp_path):
    cfg = tiny_cfg(*write_teacher(tmp_path).options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    teacher_shapes(cfg)
    FrozenTeacher(cfg)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    batch = inputs(image(64, 64, seed=1), image(80, 64, seed=2))
    full = teacher.features(batch)["conv5"]
    with torch.autocast("cpu", torch.bfloat16):
        half = teacher.features(batch)["conv5"]
    assert half.shape == full.shape and torch.isfinite(half.float()).all()
    assert (half.float() - full).abs().mean() < 0.25 * full.abs().mean() + 0.25


def test_its_rpn_and_heads_are_never_built(tmp_path, monkeypatch):
    written = write_teacher(tmp_path)
    for name in ("build_proposal_generator", "build_roi_heads"):
        monkeypatch.setattr(f"detectron2.modeling.meta_arch.rcnn.{name}", lambda *args: pytest.fail(name))
    state = torch.load(written.weights)["model"]
    torch.save({k: v for k, v in state.items() if k.startswith("backbone.")}, written.weights)
    FrozenTeacher(tiny_cfg(*written.options))


def test_a_student_may_differ_in_everything(tmp_path):
    written = write_teacher(tmp_path, *RESNET_FPN, "INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", [57.0, 58.0, 59.0])
    student = seeded_model(tiny_cfg())
    teacher = plain_teacher(written, "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["p3"])
    pixels = image(64, 64)
    with torch.no_grad():
        own = student.backbone(student.preprocess_image(inputs(pixels)).tensor)["conv5"]
    features = teacher.features(inputs(pixels))["p3"]
    assert features.shape[-2:] == own.shape[-2:]
    model = written.model.eval()
    rgb = preprocessed(pixels.flip(0), written.cfg.MODEL.PIXEL_MEAN, [57.0, 58.0, 59.0])
    with torch.no_grad():
        expected = model.backbone(ImageList.from_tensors([rgb], 32).tensor)["p3"]
    assert torch.equal(features, expected)


# ------------------------------------------------------------------------------- the teacher's proposals


PROPOSALS = ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["neighbourhood", "teacher_proposals"])


def test_proposals_are_those_of_the_saved_detector(tmp_path):
    written = write_teacher(tmp_path)
    teacher = FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, "MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False))
    images = [image(64, 48, seed=1), image(48, 80, seed=2), image(64, 48, seed=3)]
    maps, proposals = teacher.features_and_proposals(inputs(*images))
    torch.testing.assert_close(maps, teacher.features(inputs(*images)))
    written.model.eval()
    for each, boxes in zip(images, proposals):
        with torch.no_grad():
            batched = written.model.preprocess_image(inputs(each))
            alone, _ = written.model.proposal_generator(batched, written.model.backbone(batched.tensor), None)
        assert len(boxes) > 0
        torch.testing.assert_close(boxes.tensor, alone[0].proposal_boxes.tensor)


def test_proposals_are_in_pixels_of_the_students_image(tmp_path):
    written = write_teacher(tmp_path)
    scale = ("MODEL.QMIMIC.TEACHER.INPUT_SCALE", 2.0)
    teacher = FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, *scale))
    small = inputs(image(40, 24, seed=1))
    boxes = teacher.features_and_proposals(small)[1][0].tensor
    assert boxes[:, 0::2].max() <= 24.0 and boxes[:, 1::2].max() <= 40.0
    assert boxes.max() > 12.0, "they fill the image, and not a quarter of it"


def test_a_proposal_generator_is_built_when_asked_for_alone(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    with pytest.raises(ValueError, match="no proposal_generator"):
        teacher.features_and_proposals(inputs(image()))


def test_a_one_stage_teacher_has_no_proposals(tmp_path):
    written = write_teacher(tmp_path)
    opts = ("MODEL.QMIMIC.TEACHER.OPTS", ["MODEL.META_ARCHITECTURE", "RetinaNet"])
    with pytest.raises(ValueError) as error:
        FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, *opts))
    for part in ("ROI_SOURCE", "no proposal generator", '"neighbourhood"', written.config_file):
        assert part in str(error.value)


def test_a_proposal_generator_that_cannot_be_built_names_the_config(tmp_path):
    written = write_teacher(tmp_path)
    opts = ("MODEL.QMIMIC.TEACHER.OPTS", ["MODEL.RPN.HEAD_NAME", "NoHead"])
    with pytest.raises(ValueError) as error:
        FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, *opts))
    for part in ("ROI_SOURCE", "NoHead", written.config_file):
        assert part in str(error.value)


def test_weights_without_the_proposal_generator_are_no_teacher(tmp_path):
    written = write_teacher(tmp_path)
    state = {name: each for name, each in written.model.state_dict().items() if "proposal_generator" not in name}
    torch.save({"model": state}, written.weights)
    FrozenTeacher(tiny_cfg(*written.options))
    with pytest.raises(ValueError, match="proposal_generator"):
        FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS))
