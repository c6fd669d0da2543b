"""Data with faults, from the check to the last evaluation: refused before anything is written, or trained on."""

import json
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from PIL import Image
from tiny_coco import registered
from tiny_training import registered_data, training_cfg, write_coco

from qmimic_d2.data import loading
from qmimic_d2.data.checks import DataSetError
from qmimic_d2.engine import Trainer, check_run

pytestmark = pytest.mark.slow

ITERATIONS = ("SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2)


@pytest.fixture
def train_set(tmp_path):
    with registered_data(tmp_path / "good", "tiny_good") as name:
        yield name


def changed(folder, change):
    """A changed copy of the tiny data set in a folder."""
    write_coco(folder / "annotations.json", folder / "images")
    content = json.loads((folder / "annotations.json").read_text())
    change(content)
    (folder / "annotations.json").write_text(json.dumps(content))
    return registered(folder, "tiny_changed")


def trained(cfg):
    """The figures of a whole training and of an evaluation after it."""
    check_run(cfg, 1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return Trainer.test(cfg, trainer.model)["bbox"]


def test_classes_in_another_order_stop_a_run(train_set, tmp_path):
    def reverse(content):
        ids = {each["id"]: 4 - each["id"] for each in content["categories"]}
        for each in content["categories"]:
            each["id"] = ids[each["id"]]
        for each in content["annotations"]:
            each["category_id"] = ids[each["category_id"]]

    with changed(tmp_path / "changed", reverse):
        cfg = training_cfg(tmp_path / "output", train_set, "DATASETS.TEST", ("tiny_changed",))
        with pytest.raises(DataSetError) as caught:
            check_run(cfg, 1)
        assert "['class 0', 'class 1', 'class 2']" in str(caught.value)
        assert "['class 2', 'class 1', 'class 0']" in str(caught.value) and "the order differs" in str(caught.value)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_joined_exports_stop_a_run(train_set, tmp_path, key):
    def join(content):
        for part in ("images", "annotations"):
            content[part] += [dict(each) for each in content[part]]

    with changed(tmp_path / "changed", join):
        cfg = training_cfg(tmp_path / "output", train_set, key, ("tiny_changed",))
        with pytest.raises(DataSetError, match=f"{key} names .tiny_changed.(.|\n)*image ids occur more than once"):
            check_run(cfg, 1)
        with pytest.raises(DataSetError, match="image ids occur more than once"):
            Trainer.build_test_loader(cfg, "tiny_changed")  # without the check, too
        with pytest.raises(DataSetError, match="image ids occur more than once"):
            Trainer.build_evaluator(cfg, "tiny_changed")
    assert not (tmp_path / "output").exists()


def test_a_coco_file_that_is_repaired_trains_and_evaluates(tmp_path):
    def thin_out(content):
        del content["info"]
        for each in content["annotations"]:
            for key in ("id", "iscrowd", "area"):
                del each[key]
            each["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]

    with changed(tmp_path / "changed", thin_out):
        cfg = training_cfg(tmp_path / "output", "tiny_changed", *ITERATIONS, evaluate=True)
        figures = trained(cfg)
    assert 0.0 <= figures["AP"] <= 100.0 or math.isnan(figures["AP"])


VOC = (
    "<annotation><object><name>cat</name><bndbox><xmin>5.5</xmin><ymin>4</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"
    "</object><object><name>dog/wolf</name><bndbox><xmin>10</xmin><ymin>9</ymin><xmax>60</xmax><ymax>44</ymax></bndbox>"
    "</object></annotation>"
)


def test_pascal_voc_of_ones_own_trains_and_evaluates(tmp_path):
    """No difficult, truncated, pose and size, numbers with a point, blank lines, .PNG, a class with a slash."""
    folder = tmp_path / "VOC"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{index}.PNG")
        (folder / "Annotations" / f"{index}.xml").write_text(VOC)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n\n1\n\n2\n\n3\n\n")
    register_pascal_voc("tiny_voc_own", str(folder), "train", 2012, class_names=["cat", "dog/wolf"])
    MetadataCatalog.get("tiny_voc_own").evaluator_type = "pascal_voc"
    try:
        classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 2)
        figures = trained(training_cfg(tmp_path / "output", "tiny_voc_own", *ITERATIONS, *classes, evaluate=True))
    finally:
        DatasetCatalog.remove("tiny_voc_own")
        MetadataCatalog.remove("tiny_voc_own")
    assert {"AP", "AP50", "AP75", "AP50_11point", "AP50_area"} == set(figures)


def test_repairs_are_made_in_every_process(tmp_path, monkeypatch):
    """A process that did not run the check knows nothing of its repairs."""
    with changed(tmp_path / "changed", lambda content: [each.pop("iscrowd") for each in content["annotations"]]):
        cfg = training_cfg(tmp_path / "output", "tiny_changed", evaluate=True)
        check_run(cfg, 1)
        monkeypatch.setattr(loading, "_usable_files", {})
        batch = next(iter(Trainer.build_train_loader(cfg)))
        assert len(batch) == 2 and all(len(each["instances"]) == 2 for each in batch)
        annotations = Trainer.build_evaluator(cfg, "tiny_changed")._coco_api.dataset["annotations"]
        assert [each["iscrowd"] for each in annotations] == [0] * 18
