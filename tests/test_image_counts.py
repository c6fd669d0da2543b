"""Maps, regions and images have to be as many as each other: a backbone with branches gives more maps than images."""

import pytest
import torch
from detectron2.structures import Boxes, RotatedBoxes
from helpers import batch, seeded_model, tiny_cfg, training_step, write_teacher

from qmimic_d2.modeling.mimic.region_sources import TrainingRegions, check_boxes, select_rois
from qmimic_d2.modeling.mimic.step_record import check_maps, named
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher

ROI_SOURCE = "MODEL.QMIMIC.MIMIC.ROI_SOURCE"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def student(teacher, *options):
    return seeded_model(tiny_cfg(*teacher.options, *options, meta_architecture="QuantMimicRCNN")).train()


def branch(backbone, is_branched=lambda backbone: True):
    """As TridentNet's backbone: three branches, whose maps stand one after the other along the images."""
    forward = backbone.forward
    backbone.forward = lambda x: {
        name: torch.cat([each] * 3) if is_branched(backbone) else each for name, each in forward(x).items()
    }


def branched_teacher(written, *is_branched):
    """The teacher and its backbone."""
    arguments = FrozenTeacher.from_config(tiny_cfg(*written.options))
    branch(arguments["backbone"], *is_branched)
    return FrozenTeacher(**arguments), arguments["backbone"]


def boxes_of(inputs):
    return [each["instances"].gt_boxes for each in inputs]


def message_of(call):
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


# -------------------------------------------------------------------------------------------------- student


@pytest.mark.parametrize("source", ["ground_truth", "neighbourhood", "whole_map", "proposals+ground_truth"])
def test_a_student_with_branches_is_refused_by_name(teacher, source):
    model = student(teacher, ROI_SOURCE, source.split("+"))
    branch(model.backbone)
    # a detector that knows of its branches shares them out by itself
    model.backbone.register_forward_hook(lambda backbone, args, maps: {"conv5": maps["conv5"][:2]})
    message = message_of(lambda: training_step(model, batch()))
    assert "the student's map 'conv5' covers 6" in message and "the teacher's map 'conv5' covers 2" in message
    assert "of 2 images" in message and "MODEL.TRIDENT.NUM_BRANCH 1" in message


def test_regions_of_every_branch_are_refused_by_name(teacher):
    """TridentNet's heads sample three times as many lists of proposals as there are images."""
    model = student(teacher)
    model.roi_heads.register_forward_hook(lambda heads, args, output: (output[0] * 3, output[1]), prepend=True)
    message = message_of(lambda: training_step(model, batch()))
    assert "the step has 2 images" in message and f"regions of {ROI_SOURCE} 'sampled' cover 6" in message


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_comparison_is_refused_as_a_step_is(teacher, whose):
    model = student(teacher)
    if whose == "student":
        branch(model.backbone)
    else:
        model.mimic.teacher, _ = branched_teacher(teacher)
    message = message_of(lambda: model.mimic.compare_on(batch(), boxes_of(batch())))
    assert f"the {whose}'s map 'conv5' covers 6" in message


def test_a_comparison_at_boxes_of_other_images_is_refused(teacher):
    message = message_of(lambda: student(teacher).mimic.compare_on(batch(), boxes_of(batch())[:1]))
    assert "of 1 images" in message and "the student's map 'conv5' covers 2" in message


# -------------------------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("sizes", [((64, 64), (64, 64)), ((64, 64), (64, 64), (48, 80))], ids=["one size", "two"])
def test_a_teacher_with_branches_is_refused_by_name(teacher, sizes):
    frozen, _ = branched_teacher(teacher)
    message = message_of(lambda: frozen.features(batch(*sizes)))
    assert "of 2 images" in message and "the teacher's map 'conv5' covers 6" in message
    assert "MODEL.TRIDENT.TEST_BRANCH_IDX 1 in MODEL.QMIMIC.TEACHER.OPTS" in message


def test_a_teacher_that_takes_one_branch_in_inference_teaches(teacher):
    model, plain = student(teacher, ROI_SOURCE, ["ground_truth"]), student(teacher, ROI_SOURCE, ["ground_truth"])
    model.mimic.teacher, backbone = branched_teacher(teacher, lambda backbone: backbone.training)
    assert not backbone.training
    assert training_step(model, batch()).losses == training_step(plain, batch()).losses


# ---------------------------------------------------------------------------------------------------- parts


def test_maps_that_fit():
    maps = {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 1, 2, 2)}
    check_maps({"student": maps, "teacher": maps}, 2)
    assert list(named(maps, ["b"])) == ["b"]


def test_every_map_is_named_with_its_images():
    maps_of = {"student": {"a": torch.zeros(2, 1, 1, 1)}, "teacher": {"b": torch.zeros(4, 1, 1, 1)}}
    message = message_of(lambda: check_maps(maps_of, 2))
    assert "the student's map 'a' covers 2, the teacher's map 'b' covers 4" in message


def test_a_map_that_the_step_did_not_compute():
    message = message_of(lambda: named({"p3": torch.zeros(1)}, ["p3", "p4"]))
    assert "no map ['p4']" in message and "['p3']" in message


def test_a_backbone_that_is_not_called_is_named(teacher):
    model = student(teacher, ROI_SOURCE, ["ground_truth"])
    forward = model.backbone.forward
    model.backbone.__class__ = type("Silent", (type(model.backbone),), {"__call__": lambda self, x: forward(x)})
    message = message_of(lambda: training_step(model, batch()))
    assert "no map ['conv5'] in this step" in message and "forward hook of model.backbone" in message


def test_rotated_boxes_are_refused_by_name():
    rotated = RotatedBoxes(torch.tensor([[5.0, 5.0, 4.0, 2.0, 30.0]]))
    message = message_of(lambda: check_boxes([Boxes(torch.zeros(0, 4)), rotated]))
    assert "image 1 are RotatedBoxes of shape (1, 5)" in message and "Rotated boxes are not supported" in message
    regions = TrainingRegions(ground_truth=[rotated], image_sizes=[(9, 9)])
    assert "RotatedBoxes" in message_of(lambda: select_rois(["ground_truth"], regions))


def test_a_union_does_not_drop_the_images_that_one_part_lacks():
    boxes = [Boxes(torch.zeros(1, 4))] * 3
    regions = TrainingRegions(teacher_proposals=boxes[:1], ground_truth=boxes, image_sizes=[(9, 9)] * 3)
    message = message_of(lambda: select_rois(["ground_truth", "teacher_proposals"], regions))
    assert f"the step has 3 images, and the regions of {ROI_SOURCE} 'teacher_proposals' cover 1" in message
