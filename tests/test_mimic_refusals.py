"""What a student refuses, before its first iteration, and explicit construction."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import RESNET_FPN, batch, training_step
from mimic_models import (
    CONFIG_FILE,
    IN_FEATURES,
    PLAIN,
    QMIMIC,
    TEACHER_IN_FEATURES,
    WEIGHTS,
    mimic_cfg,
    mimic_model,
    move_away,
    other_model,
)

from qmimic_d2.modeling import FrozenTeacher, QuantMimicRCNN
from qmimic_d2.modeling.mimic.mimic import Mimic


@pytest.mark.parametrize(
    "key, value, words",
    [
        (f"{QMIMIC}.MIMIC.LOSS_WEIGHT", -1.0, ["-1.0", ">= 0"]),
        (f"{QMIMIC}.MIMIC.LOSS_WEIGHT", float("nan"), ["nan", ">= 0"]),
        (f"{QMIMIC}.MIMIC.LOSS_WEIGHT", float("inf"), ["inf", "finite"]),
        (f"{QMIMIC}.MIMIC.SCHEDULE", "linear", ["'linear'", "'warmup'"]),
        (f"{QMIMIC}.MIMIC.ADAPTER_PLACEMENT", "head", ["'head'", "'trunk'"]),
        (f"{QMIMIC}.DIAGNOSTICS.GRADIENT_PERIOD", -1, ["-1", "0 = never"]),
        (f"{QMIMIC}.MIMIC.ROI_SOURCE", ["anchors"], ["'anchors'", "'sampled'"]),
        (f"{QMIMIC}.MIMIC.MAX_ROIS_PER_IMAGE", -1, ["-1", "0 = all"]),
        (f"{QMIMIC}.MIMIC.JITTER", 1.0, ["1.0", "below 1.0"]),
        (f"{QMIMIC}.MIMIC.NUM_NEIGHBOURS", -1, ["-1", ">= 0"]),
        (f"{QMIMIC}.DIAGNOSTICS.PERIOD", -5, ["-5", "0 = never"]),
        (f"{QMIMIC}.MIMIC.POOLER_TYPE", "Crop", ["'Crop'", "'ROIPool'"]),
        (f"{QMIMIC}.MIMIC.NORMALIZE_BY", "rois", ["'rois'", "'target'"]),
        (f"{QMIMIC}.MIMIC.ADAPTER", "mlp", ["'mlp'", "'conv1x1'"]),
        (f"{QMIMIC}.MIMIC.IN_FEATURES", ["res9"], ["res9", "conv5"]),
        (f"{QMIMIC}.MIMIC.TEACHER_IN_FEATURES", ["res9"], ["res9", "conv5"]),
        (f"{QMIMIC}.QUANTIZER.NAME", "Round", ["'Round'", "Uniform"]),
        (f"{QMIMIC}.QUANTIZER.STRIDE", 0.0, ["0.0", "positive"]),
        (f"{QMIMIC}.QUANTIZER.STRIDE", float("nan"), ["nan", "positive"]),
        (f"{QMIMIC}.QUANTIZER.NUM_CODES", -2, ["-2", "unbounded"]),
        (f"{QMIMIC}.QUANTIZER.IN_FEATURES", ["res9"], ["res9", "conv5"]),
        (f"{QMIMIC}.TEACHER.INPUT_SCALE", -2.0, ["-2.0", "positive"]),
    ],
)
def test_bad_values_stop_the_construction_and_name_key_value_and_fix(vgg_teacher, key, value, words):
    with pytest.raises((ValueError, KeyError)) as caught:
        mimic_model(*vgg_teacher.options, key, value)
    message = str(caught.value.args[0])
    assert all(word in message for word in [key, *words]), message


def test_channels_that_differ_without_an_adapter_stop_the_construction(vgg_teacher):
    with pytest.raises(ValueError) as caught:
        mimic_model(*vgg_teacher.options, f"{QMIMIC}.MIMIC.ADAPTER", "")
    for word in ("'conv5' has 16 channels", "has 32", f"{QMIMIC}.MIMIC.ADAPTER", "'conv1x1'"):
        assert word in str(caught.value)


def test_numbers_of_maps_that_differ_stop_the_construction(fpn_teacher):
    with pytest.raises(ValueError) as caught:
        mimic_model(*RESNET_FPN, *fpn_teacher.options, TEACHER_IN_FEATURES, ["p3"])
    for word in (IN_FEATURES, "TEACHER_IN_FEATURES", "['p3', 'p4', 'p5']"):
        assert word in str(caught.value)


def test_a_teacher_config_that_cannot_be_read_stops_a_training(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text("MODEL: [")
    model = mimic_model(CONFIG_FILE, str(path))
    with pytest.raises(ValueError) as caught:
        model.train()
    assert CONFIG_FILE in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("begin", ["train", "forward"])
@pytest.mark.parametrize("mistake", ["no config", "no weights", "truncated", "empty path", "another architecture"])
def test_mistakes_in_the_teachers_files_stop_before_the_first_iteration(vgg_teacher, tmp_path, begin, mistake):
    config_file, weights = move_away(vgg_teacher, tmp_path)
    options, words = [CONFIG_FILE, str(config_file), WEIGHTS, str(weights)], [WEIGHTS, str(weights)]
    if mistake == "no config":
        config_file.unlink()
        words = [CONFIG_FILE, str(config_file)]
    elif mistake == "no weights":
        weights.unlink()
    elif mistake == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif mistake == "empty path":
        options[-1] = ""
        words = [WEIGHTS, "MODEL.WEIGHTS"]
    else:
        narrow = other_model("GeneralizedRCNN", "MODEL.VGG.WIDTH_DIVISOR", 8)
        torch.save({"model": narrow.state_dict()}, weights)
    model = mimic_model(*options)
    with pytest.raises((FileNotFoundError, ValueError)) as caught, EventStorage():
        model.train() if begin == "train" else model(batch())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_teacher_that_appears_after_construction_does_not_train_without_the_mimic(vgg_teacher, tmp_path):
    config_file, weights = move_away(vgg_teacher, tmp_path)
    text = config_file.read_text()
    config_file.unlink()
    model = mimic_model(CONFIG_FILE, str(config_file), WEIGHTS, str(weights))
    config_file.write_text(text)
    with pytest.raises(ValueError, match="build the model again"):
        model.train()


def test_explicit_construction(vgg_teacher):
    stock = other_model("GeneralizedRCNN")
    parts = {
        "backbone": stock.backbone,
        "proposal_generator": stock.proposal_generator,
        "roi_heads": stock.roi_heads,
        "pixel_mean": [127.5] * 3,
        "pixel_std": [64.0] * 3,
    }
    cfg = mimic_cfg(*vgg_teacher.options, *PLAIN)
    teacher_shapes = vgg_teacher.model.backbone.output_shape()
    shapes = {"student_shapes": stock.backbone.output_shape(), "teacher_shapes": teacher_shapes}
    with pytest.raises(TypeError, match="build_teacher"):
        Mimic(**shapes)
    mimic = Mimic(**shapes, build_teacher=lambda: FrozenTeacher(cfg))
    model = QuantMimicRCNN(**parts, mimic=mimic)
    assert model.mimic is mimic
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0


def test_building_the_model_does_not_change_the_config(vgg_teacher):
    cfg = mimic_cfg(*vgg_teacher.options)
    cfg.freeze()
    before = cfg.dump()
    build_model(cfg).train()
    assert cfg.dump() == before
