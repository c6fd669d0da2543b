"""What the storm starts from: small data, a teacher, a student, a finished run, and its exported files."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Sequence

import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from PIL import Image

from qmimic_d2 import get_config_file
from qmimic_d2.data import DigitsSpec, prepare_digits
from qmimic_d2.engine import load_config
from storm_lib.processes import ROOT, Training

__all__ = ["CLASSES", "DATASET", "Baseline", "write_baseline", "write_run"]

DATASET = "storm_train"
CLASSES = [str(digit) for digit in range(10)]

_NUM_IMAGES = 12
_STUDENT = "Digits/student_vgg_1_16_qmimic.yaml"
_SMALL = (
    *("DATASETS.TRAIN", (DATASET,)),
    *("DATASETS.TEST", (DATASET,)),
    *("INPUT.MIN_SIZE_TRAIN", (64, 80)),
    *("INPUT.MAX_SIZE_TRAIN", 96),
    *("INPUT.MIN_SIZE_TEST", 64),
    *("INPUT.MAX_SIZE_TEST", 96),
    *("INPUT.RANDOM_FLIP", "horizontal"),
    *("MODEL.QMIMIC.DIAGNOSTICS.EVAL_IMAGES", 2),
    *("MODEL.DEVICE", "cpu"),
    *("SOLVER.IMS_PER_BATCH", 2),
    *("SOLVER.BASE_LR", 0.001),
    *("SOLVER.WARMUP_ITERS", 4),
    *("SEED", 7),
)
_SECONDS = 300.0


@dataclass(frozen=True)
class Baseline:
    """
    Files that are as they should be; mutations take copies.

    Attributes:
        folder: of everything.
    """

    folder: Path

    @property
    def annotations(self) -> Path:
        return self.folder / DATASET / "annotations.json"

    @property
    def images(self) -> Path:
        return self.folder / DATASET / "images"

    @property
    def voc(self) -> Path:
        """The same images in Pascal VOC's layout; the split is "train"."""
        return self.folder / "VOC2007"

    @property
    def student(self) -> Path:
        return self.folder / "student.yaml"

    @property
    def plain(self) -> Path:
        """The student's config without a teacher, for many short trainings."""
        return self.folder / "plain.yaml"

    @property
    def teacher_weights(self) -> Path:
        return self.folder / "teacher.pth"

    @property
    def run(self) -> Path:
        """OUTPUT_DIR of a finished training of the plain config."""
        return self.folder / "run"

    @property
    def weights(self) -> Path:
        return self.run / "model_final.pth"

    @property
    def exported(self) -> Path:
        return self.folder / "exported"

    @property
    def dataset(self) -> List[str]:
        """Name, annotation file and images."""
        return [DATASET, str(self.annotations), str(self.images)]


def write_baseline(folder: Path) -> Baseline:
    """Data and configs: what kills need."""
    baseline = Baseline(folder.resolve())
    prepare_digits(DigitsSpec(DATASET, split="train", num_images=_NUM_IMAGES), str(baseline.folder))
    register_coco_instances(DATASET, {}, str(baseline.annotations), str(baseline.images))
    _write_student(baseline)
    return baseline


def _write_student(baseline: Baseline) -> None:
    student = get_config_file(_STUDENT)
    teacher_config = os.path.join(os.path.dirname(student), "teacher_vgg_1_8_quant.yaml")
    torch.manual_seed(11)
    teacher = build_model(load_config(teacher_config, device="cpu"))
    torch.save({"model": teacher.state_dict()}, baseline.teacher_weights)
    node = "MODEL.QMIMIC.TEACHER"
    named = [f"{node}.CONFIG_FILE", teacher_config, f"{node}.WEIGHTS", str(baseline.teacher_weights)]
    baseline.student.write_text(load_config(student, [*_SMALL, *named]).dump())
    plain = get_config_file("Digits/student_vgg_1_16_quant.yaml")
    baseline.plain.write_text(load_config(plain, [*_SMALL, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()]).dump())


def write_run(baseline: Baseline) -> None:
    """
    A finished training and its exported files, and the data as Pascal VOC: what mutations need.

    Raises:
        RuntimeError: the training, or the export, failed.
    """
    _write_voc(baseline)
    work = baseline.folder
    training = Training(
        ["--config-file", baseline.plain, "OUTPUT_DIR", baseline.run, "SOLVER.CHECKPOINT_PERIOD", 2],
        mark=f"baseline-{os.getpid()}",
        record=work / "run.jsonl",
        datasets=[baseline.dataset],
        text_file=work / "run.txt",
    )
    with training:
        if training.wait(_SECONDS) != 0:
            raise RuntimeError(f"the training that mutations start from failed:\n{training.text()[-3000:]}")
    forms = ["--format", "detectron2", "torchscript", "onnx", "--output", baseline.exported]
    _run(["export", *forms, "--config-file", baseline.plain, "--weights", baseline.weights, "--device", "cpu"])


def _run(arguments: Sequence[Any]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "qmimic_d2", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def _write_voc(baseline: Baseline) -> None:
    content = json.loads(baseline.annotations.read_text())
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (baseline.voc / part).mkdir(parents=True, exist_ok=True)
    names = []
    for image in content["images"]:
        names.append(Path(image["file_name"]).stem)
        Image.open(baseline.images / image["file_name"]).save(baseline.voc / "JPEGImages" / f"{names[-1]}.jpg")
        own = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        (baseline.voc / "Annotations" / f"{names[-1]}.xml").write_text(_voc_xml(image, own))
    (baseline.voc / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names) + "\n")


def _voc_xml(image: dict, annotations: Sequence[dict]) -> str:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = image["file_name"]
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for each in annotations:
        thing = ElementTree.SubElement(root, "object")
        left, top, width, height = each["bbox"]
        name = CLASSES[each["category_id"] - 1]
        for tag, value in (("name", name), ("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)):
            ElementTree.SubElement(thing, tag).text = str(value)
        box = ElementTree.SubElement(thing, "bndbox")
        corners = (left + 1, top + 1, left + width, top + height)
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners):
            ElementTree.SubElement(box, tag).text = str(int(round(value)))
    return ElementTree.tostring(root, encoding="unicode")
