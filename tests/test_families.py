"""
Everything that a user does with a student, once for every detector family.

Two images, two steps of training: what each part computes is tested elsewhere, that it serves every family is tested
here. Forms that are refused by design (masks and keypoints leave no exported file) are refused by name.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Tuple

import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from exported import SIZES, assert_close, random_image, spread
from helpers import (
    CASCADE,
    KEYPOINT_HEAD,
    MASK_HEAD,
    NUM_KEYPOINTS,
    ONE_STAGE,
    ONE_STAGE_FPN,
    RESNET_FPN,
    RFCN,
    batch,
    seeded_model,
    training_step,
    write_teacher,
)
from test_command_line import status_of
from tiny_coco import registered
from tiny_training import Recorder, registered_data, training_cfg

from qmimic_d2.engine import Trainer
from qmimic_d2.engine.exporting import FORMATS, Exporter, Int8Settings
from qmimic_d2.inference.detectors import open_detector
from qmimic_d2.inference.prediction import Predictor
from qmimic_d2.lazy_config import add_mimic, add_quantizer
from qmimic_d2.modeling.attach import attached_mimic
from qmimic_d2.modeling.family import FAMILIES, family_of, head_features
from qmimic_d2.modeling.quantizer_hook import attached_quantizer

META = "MODEL.META_ARCHITECTURE"
DATASET, ONE_CLASS = "tiny_families", "tiny_families_one_class"


@dataclass(frozen=True)
class Case:
    """
    A detector of a family.

    Attributes:
        family: what follows "Quant" in the name of its class.
        options: KEY VALUE pairs.
        losses: some of its losses.
        beyond: what it predicts beside boxes, so that no file of boxes is exported; "" for nothing.
        num_classes: of the data set that it is trained on.
    """

    family: str
    options: Tuple[Any, ...]
    losses: Tuple[str, ...]
    beyond: str = ""
    num_classes: int = 3

    @property
    def has_fpn(self) -> bool:
        return "MODEL.FPN.IN_FEATURES" in self.options


RCNN_LOSSES = ("loss_rpn_cls", "loss_cls", "loss_box_reg")
CASES = {
    "Faster R-CNN": Case("RCNN", (), RCNN_LOSSES),
    "Faster R-CNN, FPN": Case("RCNN", RESNET_FPN, RCNN_LOSSES),
    "R-FCN": Case("RCNN", RFCN, RCNN_LOSSES),
    "Cascade R-CNN": Case("RCNN", CASCADE, ("loss_cls_stage0", "loss_cls_stage2")),
    "Mask R-CNN": Case("RCNN", MASK_HEAD, (*RCNN_LOSSES, "loss_mask"), "pred_masks"),
    "Keypoint R-CNN": Case("RCNN", KEYPOINT_HEAD, (*RCNN_LOSSES, "loss_keypoint"), "pred_keypoints", num_classes=1),
    "RetinaNet": Case("RetinaNet", ONE_STAGE["RetinaNet"], ("loss_cls", "loss_box_reg")),
    "RetinaNet, FPN": Case("RetinaNet", ONE_STAGE_FPN["RetinaNet"], ("loss_cls", "loss_box_reg")),
    "FCOS": Case("FCOS", ONE_STAGE["FCOS"], ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr")),
}


@dataclass(frozen=True)
class Student:
    """A student that took two steps: its case, the config of its training, and what the steps computed."""

    case: Case
    cfg: CfgNode
    losses: dict

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    def arguments(self, *more: Any) -> Tuple[Any, ...]:
        """Of a command that takes a config."""
        return ("--config-file", self.folder / "config.yaml", "--weights", self.cfg.MODEL.WEIGHTS, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", autouse=True)
def data(folder):
    """Boxes with masks and keypoints: of three classes, and of one."""
    with registered_data(folder / "data", DATASET, count=2):
        path = folder / "data" / "annotations.json"
        content = json.loads(path.read_text())
        for each in content["annotations"]:
            x, y, width, height = each["bbox"]
            each["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            each["keypoints"] = [x + width / 2, y + height / 2, 2] * NUM_KEYPOINTS
            each["num_keypoints"] = NUM_KEYPOINTS
        path.write_text(json.dumps(content))
        (folder / "one").mkdir()
        for each in content["annotations"]:
            each["category_id"] = 1
        content["categories"] = content["categories"][:1]
        (folder / "one" / "annotations.json").write_text(json.dumps(content))
        (folder / "one" / "images").symlink_to(folder / "data" / "images")
        with registered(folder / "one", ONE_CLASS):
            names = [f"point {index}" for index in range(NUM_KEYPOINTS)]
            MetadataCatalog.get(ONE_CLASS).set(keypoint_names=names, keypoint_flip_map=[])
            yield


@pytest.fixture(scope="module")
def teachers(folder):
    """R-CNNs, with one map and with an FPN: they teach all families."""
    return {False: write_teacher(folder), True: write_teacher(folder, *RESNET_FPN, name="fpn")}


@pytest.fixture(scope="module", params=CASES)
def student(request, folder, teachers):
    case = CASES[request.param]
    dataset = ONE_CLASS if case.num_classes == 1 else DATASET
    cfg = training_cfg(
        folder / request.param.replace(", ", "_").replace(" ", "_"),
        dataset,
        *case.options,
        *(META, f"QuantMimic{case.family}", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 0.001),
        *("TEST.KEYPOINT_OKS_SIGMAS", [0.1] * NUM_KEYPOINTS, *SIZES),
        # so that the untrained heads of all families give scores of 1/4 to 1/2
        *("MODEL.RETINANET.PRIOR_PROB", 0.5, "MODEL.FCOS.PRIOR_PROB", 0.5),
        teacher=teachers[case.has_fpn],
        evaluate=True,
    )
    recorder, trainer = Recorder(), Trainer(cfg)
    trainer.register_hooks([recorder])
    trainer.train()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
    torch.save({"model": spread(trainer.model).state_dict()}, cfg.MODEL.WEIGHTS)
    return Student(case, cfg, recorder.losses)


def test_every_family_with_a_registered_class_is_here():
    assert {case.family for case in CASES.values()} == {each.name for each in FAMILIES if each.section}


@pytest.mark.slow
def test_it_trains_and_is_evaluated(student):
    assert sorted(student.losses) == [0, 1]
    for losses in student.losses.values():
        mimic = [name for name in losses if name.startswith("loss_mimic")]
        assert {*student.case.losses} <= set(losses) and len(mimic) == len(head_features(student.cfg))
        assert all(math.isfinite(loss) for loss in losses.values()) and any(losses[name] > 0.0 for name in mimic)
    results = json.loads((student.folder / "evaluation.json").read_text())["results"]
    kinds = {"pred_masks": {"bbox", "segm"}, "pred_keypoints": {"bbox", "keypoints"}}
    assert set(results) == kinds.get(student.case.beyond, {"bbox"})


@pytest.mark.slow
def test_calibrate(student, tmp_path):
    arguments = student.arguments("--num-images", 1, "--strides", 0.5, "--json", tmp_path / "report.json")
    assert status_of("calibrate", *arguments, *(["--signed"] if student.case.has_fpn else [])) == 0
    features = json.loads((tmp_path / "report.json").read_text())["features"]
    assert "conv5" in features or {"p3", "p4", "p5"} <= set(features)


@pytest.mark.slow
def test_size(student, tmp_path):
    path = tmp_path / "size.json"
    arguments = ("--config-file", student.folder / "config.yaml", "--input", "64x64", "--json", path)
    assert status_of("size", *arguments) == 0
    (cost,) = json.loads(path.read_text())["models"]
    heads = {"RCNN": {"proposal_generator", "roi_heads"}}.get(student.case.family, {"head"})
    assert set(cost["parts"]) == {"backbone", "other", *heads}
    assert all(cost["parts"][name]["flops"] > 0 for name in ("backbone", *heads))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_export_open_and_predict(student, form, tmp_path):
    exporter = Exporter(student.cfg, fixed_size=(64, 96) if "raw" in form else (0, 0))
    settings = Int8Settings(calibration_images=1, search_images=0, threads=1)
    if "raw" in form and student.case.family == "RCNN":
        with pytest.raises(ValueError, match="META_ARCHITECTURE is 'QuantMimicRCNN'; onnx-raw .*use onnx"):
            exporter.write(form, str(tmp_path / "out"), settings)
        assert not (tmp_path / "out").exists()
        return
    if student.case.beyond and form != "detectron2":
        with pytest.raises(ValueError, match=f"the model predicts {student.case.beyond}.*MODEL.MASK_ON"):
            exporter.write(form, str(tmp_path), settings)
        assert not list(tmp_path.glob("model*"))
        return
    detector = open_detector(exporter.write(form, str(tmp_path), settings).path)
    predictor = exporter.predictor if "raw" in form else Predictor(student.cfg)
    for size in ((64, 80), (50, 33)):
        found = detector.detect(random_image(*size))
        if "int8" in form:
            assert len(found) > 0
        else:
            assert_close(found, predictor.detect(random_image(*size)))


def test_predict(student, tmp_path):
    images = Path(MetadataCatalog.get(student.cfg.DATASETS.TEST[0]).image_root)
    arguments = student.arguments("--input", images, "--output", tmp_path, "--score-threshold", 0.001)
    assert status_of("predict", *arguments) == 0
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert len(content["images"]) == 2 and content["annotations"]


@pytest.mark.slow
def test_report(student, tmp_path):
    path = tmp_path / "report.html"
    assert status_of("report", student.folder, "--output", path, "--images", 1, "--no-latency") == 0
    page = path.read_text()
    assert student.folder.name in page
    names = {"RCNN": student.cfg.MODEL.ROI_HEADS.NAME}
    assert f"{names.get(student.case.family, student.case.family)} on " in page


@pytest.mark.slow
@pytest.mark.parametrize("learns", [True, False])
def test_lazy(student, learns):
    """The same losses as the YAML's, from Detectron2's own class."""
    stock, cfg = lazy_detector(student.cfg), student.cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = f"Quant{'Mimic' * learns}{student.case.family}"
    yaml = seeded_model(cfg)
    torch.manual_seed(1)
    model = instantiate((add_mimic if learns else add_quantizer)(stock, plain(cfg.MODEL.QMIMIC)))
    model.load_state_dict(yaml.state_dict())
    assert type(model) is family_of(type(model)).detector
    assert attached_quantizer(model.backbone).features == attached_quantizer(yaml.backbone).features
    assert (attached_mimic(model) is not None) == learns
    inputs = batch(num_classes=student.case.num_classes)
    training_step(yaml, inputs)  # TorchScript's first run of the focal loss
    yaml = seeded_model(cfg)
    steps = [training_step(each, inputs) for each in (model, yaml)]
    assert {name: loss.item() for name, loss in steps[0].losses.items()} == {
        name: loss.item() for name, loss in steps[1].losses.items()
    }


def lazy_detector(cfg: CfgNode) -> Any:
    """Detectron2's own class with the parts that a config describes."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE.replace("Mimic", "")
    stock = seeded_model(cfg)
    attached_quantizer(stock.backbone).remove()
    arguments = type(stock).from_config(cfg)
    for name in ("quantizer", "quantized_features"):
        del arguments[name]
    arguments.update((name, module) for name, module in stock.named_children() if name in arguments)
    return L(family_of(type(stock)).detector)(**arguments)


def plain(node: Optional[CfgNode]) -> Any:
    """A node as dicts."""
    return {key: plain(value) for key, value in node.items()} if isinstance(node, CfgNode) else node
