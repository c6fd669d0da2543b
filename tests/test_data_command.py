"""``python -m qmimic_d2 data``: the check of data sets and its text."""

import json

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from test_command_line import status_of
from test_data_sources import CLASSES, write_coco, write_image, write_voc, write_yolo

from qmimic_d2.cli.data_text import figures_text, wrapped
from qmimic_d2.data.figures import measure_dataset


def record(size, *boxes, mode=BoxMode.XYXY_ABS):
    annotations = [{"category_id": label, "bbox": box, "bbox_mode": mode} for label, box in boxes]
    return {"width": size[0], "height": size[1], "annotations": annotations}


# --------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand():
    dicts = [
        record((100, 50), (1, [10.0, 10.0, 26.0, 14.0]), (1, [0.0, 0.0, 10.0, 10.0])),
        record((40, 80), (0, [4.0, 4.0, 20.0, 5.0]), mode=BoxMode.XYWH_ABS),
        record((40, 80)),
    ]
    dicts[0]["annotations"][1]["iscrowd"] = 1
    found = measure_dataset(dicts, ["a", "b", "c"])
    assert found.class_counts() == {"a": 1, "b": 1, "c": 0}
    assert found.sizes().tolist() == [8.0, 10.0]
    assert found.relative_sizes().tolist() == [0.08, 0.125]
    assert found.boxes_of_images.tolist() == [1, 1, 0] and found.num_crowds == 1


def test_figures_of_nothing():
    found = measure_dataset([], [])
    assert found.class_counts() == {} and found.sizes().shape == (0,)
    assert "images    0" in figures_text(found)


def test_an_image_without_a_size_has_no_relative_boxes():
    each = record((1, 1), (0, [0.0, 0.0, 8.0, 8.0]))
    del each["width"]
    text = figures_text(measure_dataset([each], ["a"]))
    assert "sizes are not known" in text and "in pixels" in text and "relative" not in text


def test_the_text_is_80_columns_wide_and_names_cannot_reach_the_terminal():
    names = [f"a class with a name that is rather long {number}" for number in range(30)] + ["\x1b[31mred"]
    rng = np.random.default_rng(0)
    boxes = [(int(rng.integers(31)), [0.0, 0.0, *rng.uniform(1, 4000, 2)]) for _ in range(3000)]
    text = figures_text(measure_dataset([record((8000, 6000), *boxes)] * 400, names))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "and 12 more classes" in text
    assert "\x1b" not in wrapped("- \x1b[31m\nsecond")


# --------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("kind", ["yolo", "voc", "coco"])
def test_check_of_each_format(tmp_path, capsys, kind):
    folder = tmp_path / f"of_{kind}"
    if kind == "coco":
        write_coco(folder)
        files = [(folder / f"{split}.json", folder / "photos") for split in ("train", "val")]
        arguments = ["--coco", *files[0], "--coco", *files[1]]
    else:
        arguments = [write_yolo(folder) if kind == "yolo" else write_voc(folder)]
    assert status_of("data", "check", *arguments) == 0
    text = capsys.readouterr().out
    assert "images    3, 1 without a box" in text and "boxes     3; 1.0 in an image, 2 at most" in text
    assert "to train on" in text and "to evaluate on" in text
    assert "cat         2  66.7%" in text and "All images, boxes and classes can be used." in text


def test_a_part_alone_will_do(tmp_path, capsys):
    path = write_yolo(tmp_path / "alone")
    path.write_text("train: images/train\nnames: [cat, dog]\n")
    assert status_of("data", "check", path) == 0
    assert "to evaluate on" not in capsys.readouterr().out
    path.write_text("val: images/val\nnames: [cat, dog]\n")
    assert status_of("data", "check", path) == 0
    assert "to train on" not in capsys.readouterr().out


def test_what_is_wrong_and_what_was_repaired(tmp_path, capsys):
    path = write_yolo(tmp_path / "broken")
    label = path.parent / "labels" / "train" / "b.txt"
    label.write_text("0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n")
    (path.parent / "labels" / "val" / "d.txt").write_text("7 0.5 0.5 0.5 0.5\n")
    assert status_of("data", "check", path) == 1
    text = " ".join(capsys.readouterr().out.split())
    repaired, refused = text.index("Repaired"), text.index("A training would be refused:")
    assert repaired < text.index("labels are repeated in their file (1)") < refused
    assert refused < text.index("annotations have a class that is not declared (1)")
    assert "can be used" not in text
    write_image(path.parent / "images" / "train" / "b.png", (8, 8))
    (path.parent / "images" / "train" / "b.png").write_bytes(b"no image")
    assert status_of("data", "check", path) == 1


def test_a_file_of_coco_that_cannot_be_read(tmp_path, capsys):
    path = tmp_path / "torn.json"
    path.write_text("{")
    assert status_of("data", "check", "--coco", path, tmp_path) == 1
    assert "A training would be refused:" in capsys.readouterr().out


def test_check_of_a_config(tmp_path, capsys):
    write_voc(tmp_path / "cells")
    sources = [
        {"NAME": f"cells_cmd_{split}", "FORMAT": "voc", "PATH": "cells", "SPLIT": split} for split in ("train", "val")
    ]
    datasets = {"SOURCES": sources, "TRAIN": ["cells_cmd_train"], "TEST": ["cells_cmd_val"]}
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump({"DATASETS": datasets, "MODEL": {"RESNETS": {"DEPTH": 50}}}))
    arguments = ["data", "check", "--config-file", config]
    assert status_of(*arguments, "MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES)) == 0
    assert "cells_cmd_train: to train on" in capsys.readouterr().out
    assert status_of(*arguments, "MODEL.ROI_HEADS.NUM_CLASSES", 1) == 1
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 1" in capsys.readouterr().out
    assert status_of(*arguments, "DATASETS.TRAIN", "('unheard_of',)") == 2
    assert "unheard_of" in capsys.readouterr().err


def test_a_function_of_ones_own(tmp_path, capsys):
    name = "own_function_of_the_data_command"
    DatasetCatalog.register(name, lambda: [{"file_name": "nowhere.png", "annotations": [{"bbox": "none"}]}])
    MetadataCatalog.get(name).set(thing_classes=["a"])
    config = tmp_path / "own.yaml"
    config.write_text(json.dumps({"DATASETS": {"TRAIN": [name], "TEST": []}}))
    try:
        assert status_of("data", "check", "--config-file", config, "MODEL.ROI_HEADS.NUM_CLASSES", "1") == 1
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    text = capsys.readouterr().out
    assert "cannot be loaded; see below" in text and name in text


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((), "give one of PATH"),
        (("here", "--config-file", "x.yaml"), "give one of PATH"),
        (("nowhere",), "there is no"),
        (("--coco", "nowhere.json", "."), "there is no file"),
        (("--config-file", "nowhere.yaml"), "nowhere.yaml"),
        (("nowhere", "MODEL.DEVICE", "cpu"), "need --config-file"),
    ],
)
def test_mistakes_in_the_arguments(arguments, word, capsys):
    assert status_of("data", "check", *arguments) == 2
    assert word in capsys.readouterr().err


def test_a_name_that_is_taken(tmp_path, capsys):
    write_voc(tmp_path / "wider_face")  # of which "wider_face_train" is registered
    assert status_of("data", "check", tmp_path / "wider_face") == 0
    assert "wider_face_train_2: to train on" in capsys.readouterr().out
