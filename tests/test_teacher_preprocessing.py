"""The teacher's own preprocessing: mean, channel order, scale and padding."""

import pytest
import torch
import torch.nn.functional as F
from helpers import RESNET_FPN, image, write_teacher
from teachers import INPUT_SCALE, P3_TO_P5, Brightness, brightness_teacher, inputs, plain_teacher, preprocessed


def test_own_mean_and_std():
    pixels = image(4, 6)
    teacher = brightness_teacher(pixel_mean=[1.0, 2.0, 3.0], pixel_std=[4.0, 5.0, 6.0])
    expected = preprocessed(pixels, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert torch.equal(teacher.features(inputs(pixels))["pixels"][0], expected)


@pytest.mark.parametrize("student, teacher", [("BGR", "RGB"), ("RGB", "BGR")])
def test_channels_are_flipped_before_the_teachers_own_mean(student, teacher):
    pixels = image(4, 6)
    flipped = brightness_teacher(
        pixel_mean=[1.0, 2.0, 3.0], input_format=teacher, student_input_format=student
    )
    expected = pixels.flip(0).float() - torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert torch.equal(flipped.features(inputs(pixels))["pixels"][0], expected)


@pytest.mark.parametrize("order", ["BGR", "RGB", "L"])
def test_equal_channel_orders_are_left_alone(order):
    pixels = image(4, 6)
    teacher = brightness_teacher(input_format=order, student_input_format=order)
    assert torch.equal(teacher.features(inputs(pixels))["pixels"][0], pixels.float())


def test_a_student_of_another_order_gets_the_same_features(tmp_path):
    written = write_teacher(tmp_path)
    pixels = image()
    bgr = plain_teacher(written).features(inputs(pixels))
    rgb = plain_teacher(written, "INPUT.FORMAT", "RGB").features(inputs(pixels.flip(0)))
    assert torch.equal(bgr["conv5"], rgb["conv5"])


@pytest.mark.parametrize("student, teacher", [("L", "BGR"), ("RGB", "YUV-BT.601"), ("RGBA", "RGB")])
def test_orders_that_no_flip_connects_are_refused(student, teacher):
    with pytest.raises(ValueError) as caught:
        brightness_teacher(input_format=teacher, student_input_format=student)
    for word in ("INPUT.FORMAT", repr(student), repr(teacher)):
        assert word in str(caught.value)


def test_the_students_image_is_not_changed():
    pixels = image(4, 6).float()
    before = pixels.clone()
    brightness_teacher(pixel_mean=[1.0, 2.0, 3.0], input_scale=2.0).features(inputs(pixels))
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("scale, size", [(2.0, (8, 12)), (0.5, (2, 3)), (1.5, (6, 9)), (0.01, (1, 1))])
def test_input_scale_is_bilinear(scale, size):
    pixels = image(4, 6)
    features = brightness_teacher(input_scale=scale).features(inputs(pixels))["pixels"]
    expected = F.interpolate(pixels.float()[None], size=size, mode="bilinear", align_corners=False)
    assert torch.equal(features, expected)


def test_a_scaled_teacher_of_twice_the_stride_meets_the_student(tmp_path):
    written = write_teacher(tmp_path, "MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 1])
    features = plain_teacher(written, INPUT_SCALE, 2.0).features(inputs(image(64, 48)))["conv5"]
    assert features.shape == (1, 32, 8, 6)


@pytest.mark.parametrize("backbone", [Brightness(4), Brightness(0, {"size_divisibility": 4})])
def test_images_are_padded_to_the_teachers_own_divisibility(backbone):
    pixels = image(5, 8)
    features = brightness_teacher(backbone, pixel_mean=[9.0, 9.0, 9.0]).features(inputs(pixels))["pixels"]
    assert features.shape == (1, 3, 8, 8)
    assert torch.equal(features[0, :, :5], pixels.float() - 9.0)
    assert torch.equal(features[0, :, 5:], torch.zeros(3, 3, 8))  # after the mean, as Detectron2 does


def test_images_are_padded_to_the_teachers_own_square():
    backbone = Brightness(4, {"square_size": 10})
    assert brightness_teacher(backbone).features(inputs(image(5, 8)))["pixels"].shape == (1, 3, 12, 12)


def test_padding_is_the_one_of_detectron2(tmp_path):
    written = write_teacher(tmp_path, *RESNET_FPN)
    pixels = image(60, 41)
    model = written.model.eval()
    with torch.no_grad():
        expected = model.backbone(model.preprocess_image(inputs(pixels)).tensor)
    features = plain_teacher(written, *P3_TO_P5).features(inputs(pixels))
    assert list(features) == ["p3", "p4", "p5"]
    assert all(torch.equal(features[name], expected[name]) for name in features)


def test_preprocessing_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        features = brightness_teacher(Brightness().float()).features(inputs(image(4, 4)))["pixels"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert features.dtype == torch.float32
