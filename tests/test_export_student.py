"""The student alone as weights and YAML: for stock Detectron2 where that can be, else for this package."""

import json
import os

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from exported import SIZES, assert_close, random_image, run_without, spread_model
from helpers import MASK_HEAD, RESNET_FPN, WrittenTeacher, write_teacher

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.export import build_student, export_student
from qmimic_d2.export.network import drop_quantizer
from qmimic_d2.export.student import student_config
from qmimic_d2.inference.detectors import open_detector
from qmimic_d2.inference.prediction import Predictor

pytestmark = pytest.mark.export

# A ResNet-50 of 4, 16, 32, 64, 128 channels with an FPN: its widths can be told by Detectron2's own keys.
RESNET50_FPN = (*RESNET_FPN, "MODEL.RESNETS.DEPTH", 50)
RETINANET = (
    *RESNET50_FPN,
    *("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5"]),
    *("MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]]),
)
RETINANET_FPN = ("MODEL.BACKBONE.NAME", "build_divided_retinanet_resnet_fpn_backbone")


def dropped(*options, **arguments):
    cfg, model = spread_model(*options, **arguments)
    drop_quantizer(model)
    return cfg, model


STOCK = """
import json, logging
import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.MODEL.DEVICE = "cpu"
checkpointer = DetectionCheckpointer(build_model(cfg))
checkpointer.logger.propagate = False
incompatible = []
load = checkpointer._load_model
checkpointer._load_model = lambda checkpoint: incompatible.append(load(checkpoint))
checkpointer._log_incompatible_keys = lambda found: None
checkpointer.load(cfg.MODEL.WEIGHTS)
found = DefaultPredictor(cfg)(np.load(sys.argv[2]))["instances"]
np.savez(sys.argv[3], boxes=found.pred_boxes.tensor.numpy(), scores=found.scores.numpy())
keys = incompatible[0]
print(json.dumps([keys.missing_keys, keys.unexpected_keys, keys.incorrect_shapes]))
"""


def test_stock_detectron2_gives_identical_detections(tmp_path):
    cfg, model = dropped(*RESNET50_FPN, meta_architecture="QuantMimicRCNN")
    student = export_student(cfg, model, str(tmp_path))
    assert student.is_stock and student.cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    image = random_image(70, 90)
    np.save(tmp_path / "image.npy", image)
    arguments = [tmp_path / "config.yaml", tmp_path / "image.npy", tmp_path / "found.npz"]
    printed = run_without(["qmimic_d2"], STOCK, *arguments)
    assert json.loads(printed.splitlines()[-1]) == [[], [], []]
    expected = Predictor.of_model(cfg, model).detect(image)
    assert len(expected) > 0
    with np.load(tmp_path / "found.npz") as found:
        assert (found["boxes"] == expected.boxes).all() and (found["scores"] == expected.scores).all()


def test_the_files_hold_nothing_but_the_detector(tmp_path):
    cfg, model = dropped(*RESNET50_FPN)
    export_student(cfg, model, str(tmp_path))
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert set(content) == {"model", "__author__"}
    assert set(content["model"]) == set(model.state_dict())
    text = (tmp_path / "config.yaml").read_text()
    assert "QMIMIC" not in text and "WIDTH_DIVISOR" not in text
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "config.yaml"))
    stock.MODEL.DEVICE = "cpu"
    assert stock.MODEL.RESNETS.STEM_OUT_CHANNELS == 4 and stock.MODEL.RESNETS.RES2_OUT_CHANNELS == 16
    again = build_model(stock)
    DetectionCheckpointer(again).load(stock.MODEL.WEIGHTS)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "options, architecture, reason",
    [
        ((), "QuantRCNN", "backbone is a VGG of qmimic_d2"),
        (RESNET_FPN, "QuantRCNN", "fixes the widths of ResNet-18"),
        ((*RESNET50_FPN, "MODEL.RESNETS.NORM", "GN"), "QuantRCNN", "Detectron2 does not build it"),
        ((*RESNET50_FPN, "MODEL.RESNETS.STRIDE_IN_1X1", False), "GeneralizedRCNN", None),
        ((*RESNET50_FPN, *MASK_HEAD), "GeneralizedRCNN", None),
        ((*RESNET50_FPN, *RETINANET_FPN), "GeneralizedRCNN", None),
    ],
)
def test_which_students_are_stock(options, architecture, reason):
    student = student_config(*dropped(*options))
    assert student.cfg.MODEL.META_ARCHITECTURE == architecture
    assert student.is_stock == (reason is None)
    assert reason is None or [each for each in student.needs_package if reason in each]


def test_a_full_precision_student_with_a_backbone_of_this_package():
    cfg, model = spread_model(meta_architecture="GeneralizedRCNN")
    student = student_config(cfg, model)
    assert not student.is_stock and student.cfg.MODEL.META_ARCHITECTURE == "QuantRCNN"
    assert student.cfg.MODEL.QMIMIC.QUANTIZER.NAME == ""


def test_other_strides_have_no_stock_key():
    options = (
        *("MODEL.BACKBONE.NAME", "build_divided_resnet_backbone"),
        *("MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.RESNETS.WIDTH_DIVISOR", 16),
        *("MODEL.RESNETS.NORM", "BN"),
        *("MODEL.RESNETS.STAGE_STRIDES", [1, 2, 1, 1]),
        *("MODEL.RPN.IN_FEATURES", ["res4"]),
        *("MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
    )
    (reason,) = student_config(*dropped(*options)).needs_package
    assert "MODEL.BACKBONE.NAME" in reason and "computes something else" in reason


def test_what_detectron2_builds_but_cannot_run_needs_the_package():
    # its FPN pools the coarsest level from "p5", which is not there
    names = ("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"], "MODEL.FPN.IN_FEATURES", ["res3", "res4"])
    levels = ("MODEL.RPN.IN_FEATURES", ["p3", "p4"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"])
    sizes = ("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]])
    cfg, model = dropped(*RESNET50_FPN, *names, *levels, *sizes)
    student = student_config(cfg, model)
    assert student.cfg.MODEL.META_ARCHITECTURE == "QuantRCNN"
    (reason,) = student.needs_package
    assert "build_divided_resnet_fpn_backbone" in reason and "fails on an image" in reason


def test_a_stock_one_stage_detector():
    student = student_config(*dropped(*RETINANET, meta_architecture="RetinaNet"))
    assert student.is_stock and student.cfg.MODEL.META_ARCHITECTURE == "RetinaNet"


def test_a_kept_quantizer_needs_the_package(tmp_path):
    options = ("MODEL.QMIMIC.TEACHER.INPUT_SCALE", 2.0, "MODEL.QMIMIC.MIMIC.LOSS_WEIGHT", 7.0)
    cfg, model = spread_model(*RESNET50_FPN, *options, meta_architecture="QuantMimicRCNN")
    student = export_student(cfg, model, str(tmp_path))
    assert student.cfg.MODEL.META_ARCHITECTURE == "QuantRCNN"
    assert student.needs_package == ("the quantizer of p3, p4, p5 (--quantizer drop leaves it out)",)
    written = get_cfg()
    add_qmimic_config(written)
    written.merge_from_file(str(tmp_path / "config.yaml"))
    node = written.MODEL.QMIMIC
    assert (node.TEACHER.INPUT_SCALE, node.MIMIC.LOSS_WEIGHT) == (1.0, 1.0), "nothing of the training's teacher"
    assert (node.QUANTIZER.STRIDE, node.QUANTIZER.SIGNED) == (0.25, True)
    image, opened = random_image(64, 64), open_detector(str(tmp_path / "config.yaml"))
    assert_close(opened.detect(image), Predictor.of_model(cfg, model).detect(image))


def test_a_dropped_quantizer_stays_dropped(tmp_path):
    cfg, model = dropped()
    export_student(cfg, model, str(tmp_path))
    image = random_image(64, 64)
    opened = open_detector(str(tmp_path / "config.yaml"))
    assert_close(opened.detect(image), Predictor.of_model(cfg, model).detect(image), boxes=0.0, scores=0.0)


def test_the_folder_may_be_moved(tmp_path):
    cfg, model = dropped()
    (tmp_path / "here").mkdir()
    export_student(cfg, model, str(tmp_path / "here"))
    os.rename(tmp_path / "here", tmp_path / "there")
    opened = open_detector(str(tmp_path / "there" / "config.yaml"))
    assert opened.weights == str(tmp_path / "there" / "model.pth")


def test_an_interrupted_export_leaves_no_half_file(tmp_path, monkeypatch):
    cfg, model = dropped()

    def interrupted(content, path):
        with open(path, "w") as file:
            file.write("ha")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_student(cfg, model, str(tmp_path))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- the checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> WrittenTeacher:
    options = ("MODEL.META_ARCHITECTURE", "QuantMimicRCNN", *SIZES)
    return write_teacher(tmp_path_factory.mktemp("trained"), *options, name="student")


def with_weights(trained, weights, *options):
    cfg = trained.cfg.clone()
    cfg.merge_from_list(["MODEL.WEIGHTS", str(weights), *options])
    return cfg


def test_adapter_and_teacher_stay_behind(trained, tmp_path):
    content = torch.load(trained.weights, weights_only=True)
    content["model"]["mimic.adapters.conv5.weight"] = torch.zeros(1)
    torch.save({**content, "optimizer": {"state": {}}, "iteration": 5}, tmp_path / "model.pth")
    teacher = ("MODEL.QMIMIC.TEACHER.CONFIG_FILE", "/nowhere/teacher.yaml")
    model = build_student(with_weights(trained, tmp_path / "model.pth", *teacher))
    assert not model.training
    assert set(model.state_dict()) == set(content["model"]) - {"mimic.adapters.conv5.weight"}


def test_an_adapter_in_the_trunk_ships(tmp_path):
    prefix = "MODEL.QMIMIC.MIMIC."
    written = write_teacher(tmp_path)
    trunk = (f"{prefix}ADAPTER_PLACEMENT", "trunk", f"{prefix}ADAPTER", "conv1x1_relu", *written.options)
    cfg, model = spread_model(*trunk)
    student = export_student(cfg, model, str(tmp_path))
    node = student.cfg.MODEL.QMIMIC
    assert node.MIMIC.TRUNK_CHANNELS == [32] and node.TEACHER.CONFIG_FILE == ""
    assert any("TrunkAdapter" in part for part in student.needs_package)
    shipped = open_detector(str(tmp_path / "config.yaml"))
    image = random_image(64, 96)
    assert_close(shipped.detect(image), Predictor.of_model(cfg, model).detect(image), boxes=0.0, scores=0.0)


def test_weights_of_another_config(trained):
    with pytest.raises(ValueError, match="(?s)--weights.*of another shape"):
        build_student(with_weights(trained, trained.weights, "MODEL.VGG.WIDTH_DIVISOR", 32), weights_key="--weights")


def test_a_checkpoint_cut_short(trained, tmp_path):
    with open(trained.weights, "rb") as file:
        (tmp_path / "cut.pth").write_bytes(file.read()[:3000])
    with pytest.raises(ValueError, match="unreadable or cut short"):
        build_student(with_weights(trained, tmp_path / "cut.pth"))
