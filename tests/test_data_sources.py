"""Data sets of users' own by DATASETS.SOURCES: COCO, Pascal VOC and YOLO."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_sources import CLASSES, IMAGES, catalogs_as_before, write_coco, write_image, write_voc, write_yolo  # noqa: F401
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.data.checks.dicts import inspect_dicts
from qmimic_d2.data.checks.findings import DataSetError, Findings
from qmimic_d2.data.checks.image_files import ImageFiles
from qmimic_d2.data.loading import load_dataset
from qmimic_d2.data.sources import Source, SourceLoader, complete_sources, guess_sources, register_sources
from qmimic_d2.data.sources.yolo import read_data_yaml, read_yolo
from qmimic_d2.engine import check_run, load_config

ROOT = Path(__file__).resolve().parent.parent
def entries(kind, folder, prefix):
    if kind == "coco":
        write_coco(folder)
        return [
            {"NAME": f"{prefix}_{split}", "FORMAT": "coco", "PATH": f"{split}.json", "IMAGES": "photos"}
            for split in IMAGES
        ]
    path = write_yolo(folder) if kind == "yolo" else write_voc(folder)
    return [{"NAME": f"{prefix}_{split}", "FORMAT": kind, "PATH": str(path), "SPLIT": split} for split in IMAGES]


def config(sources, prefix):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.DATASETS.SOURCES = sources
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{prefix}_train",), (f"{prefix}_val",)
    return cfg


def boxes_of(dicts):
    """By image: size, and classes with their corners."""
    found = {}
    for each in dicts:
        labels = []
        for label in each["annotations"]:
            x, y, x1, y1 = label["bbox"]
            corners = (x, y, x1, y1) if label["bbox_mode"] == 0 else (x, y, x + x1, y + y1)
            labels.append((CLASSES[label["category_id"]], *(round(number, 6) for number in corners)))
        found[Path(each["file_name"]).stem] = ((each["width"], each["height"]), labels)
    return found


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_every_format_gives_the_same_data(tmp_path, kind):
    cfg = config(entries(kind, tmp_path, kind), kind)
    complete_sources(cfg, str(tmp_path))
    register_sources(cfg)
    for split, images in IMAGES.items():
        assert boxes_of(load_dataset(f"{kind}_{split}")) == images
        assert MetadataCatalog.get(f"{kind}_{split}").thing_classes == CLASSES
        assert MetadataCatalog.get(f"{kind}_{split}").evaluator_type == "coco"


def test_a_test_set_without_a_class_has_the_labels_of_training(tmp_path):
    cfg = config(entries("voc", tmp_path, "voc"), "voc")
    complete_sources(cfg, str(tmp_path))
    assert [entry["CLASSES"] for entry in cfg.DATASETS.SOURCES] == [CLASSES, CLASSES]  # val has dogs alone


def test_completing_twice_changes_nothing_and_paths_are_absolute(tmp_path):
    cfg = config(entries("coco", tmp_path, "x"), "x")
    complete_sources(cfg, str(tmp_path))
    first = cfg.DATASETS.SOURCES
    assert first[0]["PATH"] == str(tmp_path / "train.json") and first[0]["IMAGES"] == str(tmp_path / "photos")
    complete_sources(cfg, "/elsewhere")
    assert cfg.DATASETS.SOURCES == first


def test_registering_twice_is_harmless_and_another_content_takes_the_place(tmp_path):
    cfg = config(entries("yolo", tmp_path / "one", "y"), "y")
    complete_sources(cfg)
    register_sources(cfg)
    loader = DatasetCatalog["y_train"]
    register_sources(cfg)
    assert DatasetCatalog["y_train"] is loader and isinstance(loader, SourceLoader)
    cfg = config(entries("yolo", tmp_path / "two", "y"), "y")
    complete_sources(cfg)
    register_sources(cfg)
    assert DatasetCatalog.get("y_train")[0]["file_name"].startswith(str(tmp_path / "two"))


def test_the_name_of_another_data_set_is_refused(tmp_path):
    sources = [{**entry, "NAME": "digits_det_train"} for entry in entries("yolo", tmp_path, "y")[:1]]
    cfg = config(sources, "y")
    complete_sources(cfg)
    with pytest.raises(ValueError, match="NAME 'digits_det_train', which is another data set's"):
        register_sources(cfg)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"FORMAT": "pascal"}, ["FORMAT 'pascal'", "'coco', 'voc', 'yolo'"]),
        ({"SPLIT": None}, ["needs a SPLIT"]),
        ({"SPLIT": "test"}, ["no split 'test'", "['train', 'val']"]),
        ({"PATH": "nowhere.yaml"}, ["nowhere.yaml", "is not there"]),
        ({"NAME": 3}, ["NAME is 3"]),
        ({"Classes": ["a"]}, ["['Classes']", "'CLASSES'"]),
        ({"IMAGES": "photos"}, ["IMAGES", "'coco' alone"]),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path, change, words):
    entry = {**entries("yolo", tmp_path, "y")[0], **change}
    cfg = config([{key: value for key, value in entry.items() if value is not None}], "y")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        complete_sources(cfg)
        register_sources(cfg)
        DatasetCatalog.get("y_train")
    for word in ["y_train" if "NAME" not in change else "NAME", *words]:
        assert word in str(caught.value)


def test_two_entries_of_one_name_are_refused(tmp_path):
    entry = entries("yolo", tmp_path, "y")[0]
    with pytest.raises(ValueError, match="two entries of the NAME 'y_train'"):
        complete_sources(config([entry, entry], "y"))


# --------------------------------------------------------------------------------------------------- YOLO


def yolo_of(tmp_path, *lines, names="[cat, dog]"):
    write_image(tmp_path / "images" / "a.png", (100, 50))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    findings, files = Findings(), ImageFiles()
    path = str(tmp_path / "data.yaml")
    records = read_yolo(path, "train", read_data_yaml(path).classes, findings, files)
    inspect_dicts(records, findings, files)
    return records.dicts, findings


def test_boxes_and_polygons(tmp_path):
    (image,), findings = yolo_of(tmp_path, "1 0.5 0.5 0.2 0.4", "0 0.1 0.2 0.3 0.2 0.2 0.6", "")
    assert [each["category_id"] for each in image["annotations"]] == [1, 0]
    assert np.allclose(image["annotations"][0]["bbox"], [40.0, 15.0, 60.0, 35.0])
    assert np.allclose(image["annotations"][1]["bbox"], [10.0, 10.0, 30.0, 30.0])
    assert not findings.has_problems and not findings.is_repaired


@pytest.mark.parametrize(
    "line, words",
    [
        ("0 0.5 0.5 0.2", "lines are no label (1)"),
        ("0 0.5 0.5 0.2 a", "lines are no label (1)"),
        ("0.5 0.5 0.5 0.2 0.2", "lines are no label (1)"),
        ("0 nan 0.5 0.2 0.2", "lines are no label (1)"),
        ("2 0.5 0.5 0.2 0.2", "a class that is not declared (1)"),
        ("-1 0.5 0.5 0.2 0.2", "a class that is not declared (1)"),
        ("0 50 25 20 10", "numbers outside of 0 to 1 (1)"),
        ("0 0.5 0.5 -0.2 0.2", "negative width or height (1)"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    _, findings = yolo_of(tmp_path, "1 0.5 0.5 0.2 0.4", line)
    assert words in findings.problems() and f"{tmp_path}/labels/a.txt: line 2" in findings.problems()


def test_rounding_over_the_border_and_repeated_lines_are_repaired(tmp_path):
    (image,), findings = yolo_of(tmp_path, "0 0.995 0.5 0.02 0.2", "1 0.5 0.5 0.2 0.4", "1 0.5 0.5 0.2 0.4")
    assert len(image["annotations"]) == 2 and not findings.has_problems
    assert image["annotations"][0]["bbox"][2] == 100.0
    assert "by rounding" in findings.notes() and "labels are repeated in their file (1)" in findings.notes()


@pytest.mark.parametrize(
    "text, words",
    [
        ("train: images\n", "no 'names'"),
        ("train: images\nnames: []\n", "give a list of the classes"),
        ("train: images\nnames: {0: a, 2: b}\n", "without a gap"),
        ("train: images\nnames: [a, a]\n", "a class twice"),
        ("train: images\nnc: 3\nnames: [a]\n", "nc 3, and 1 names"),
        ("names: [a]\n", "names no images"),
        ("train: photos\nnames: [a]\n", "there is no"),
        ("train: 5\nnames: [a]\n", "has 5 in 'train'"),
        ("[]\n", "is no data.yaml"),
    ],
)
def test_a_wrong_data_yaml_is_refused(tmp_path, text, words):
    write_image(tmp_path / "images" / "a.png", (8, 8))
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_data_yaml(str(tmp_path / "data.yaml"))
    assert words in str(caught.value) and "data.yaml" in str(caught.value)


def test_names_by_number_lists_of_images_and_a_path(tmp_path):
    write_image(tmp_path / "sets" / "images" / "a.png", (8, 8))
    (tmp_path / "sets" / "train.txt").write_text("images/a.png\n\n")
    (tmp_path / "data.yaml").write_text("path: sets\ntrain: [train.txt]\nnames: {0: cat, 1: 7}\n")
    data = read_data_yaml(str(tmp_path / "data.yaml"))
    assert data.classes == ("cat", "7")
    (image,) = read_yolo(str(tmp_path / "data.yaml"), "train", data.classes, Findings(), ImageFiles()).dicts
    assert image["file_name"] == str(tmp_path / "sets" / "images" / "a.png") and image["annotations"] == []


def test_the_paths_of_roboflow(tmp_path):
    write_image(tmp_path / "train" / "images" / "a.png", (8, 8))
    (tmp_path / "data.yaml").write_text("train: ../train/images\nnames: [a]\n")
    assert read_data_yaml(str(tmp_path / "data.yaml")).images["train"] == (str(tmp_path / "train" / "images"),)


# --------------------------------------------------------------------------------------------------- guesses


def test_what_a_path_holds(tmp_path):
    yolo, voc = write_yolo(tmp_path / "yolo"), write_voc(tmp_path / "voc")
    for path, kind in ((yolo, "yolo"), (yolo.parent, "yolo"), (voc, "voc")):
        (train,), (val,) = guess_sources(str(path), "mine")
        assert (train.format, train.split, train.name) == (kind, "train", "mine_train")
        assert (val.format, val.split, val.name) == (kind, "val", "mine_val")


@pytest.mark.parametrize("kind", ["nothing", "empty", "json", "train alone"])
def test_what_is_not_known_is_refused(tmp_path, kind):
    path = tmp_path / "data"
    if kind == "empty":
        path.mkdir()
    elif kind == "json":
        path = tmp_path / "x.json"
        path.write_text("{}")
    elif kind == "train alone":
        path = write_yolo(path)
        path.write_text("train: images/train\nnames: [cat, dog]\n")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        guess_sources(str(path), "mine")
    words = {"nothing": "there is no", "empty": "ImageSets/Main", "json": "for COCO", "train alone": "to evaluate on"}
    assert words[kind] in str(caught.value)


def test_a_source_survives_its_entry():
    source = Source("a", "coco", "/x/train.json", "", "/x/photos", ("cat",))
    assert Source.from_entry(source.to_entry()) == source


# --------------------------------------------------------------------------------------------------- a run


def write_config(folder, sources, **data):
    path = folder / "mine.yaml"
    content = {
        "_BASE_": str(ROOT / "configs" / "Digits" / "Base-Digits.yaml"),
        "DATASETS": {"SOURCES": sources, "TRAIN": ["mine_train"], "TEST": ["mine_val"], **data},
        "MODEL": {"DEVICE": "cpu", "META_ARCHITECTURE": "QuantRCNN", "ROI_HEADS": {"NUM_CLASSES": 2}},
        "SOLVER": {"MAX_ITER": 2, "STEPS": [], "IMS_PER_BATCH": 2},
        "DATALOADER": {"NUM_WORKERS": 1},
        "SEED": 1,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_damaged_source_stops_the_run_with_every_problem(tmp_path):
    sources = entries("yolo", tmp_path, "mine")
    (tmp_path / "labels" / "train" / "a.txt").write_text("7 0.5 0.5 0.1 0.1\n0 0.5\n")
    cfg = load_config(str(write_config(tmp_path, sources)), ["OUTPUT_DIR", str(tmp_path / "out")])
    with pytest.raises(DataSetError) as caught:
        check_run(cfg, 1)
    for word in ("'mine_train'", "is not declared (1)", "are no label (1)", "a.txt: line 1", "a.txt: line 2"):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind, processes", [("voc", 0), ("yolo", 2), ("coco", 0)])
def test_a_training_and_its_own_config_again(tmp_path, kind, processes):
    path = write_config(tmp_path, entries(kind, tmp_path, "mine"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

    def train(config, output):
        command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config), "OUTPUT_DIR", str(output)]
        command[2:2] = ["--num-processes", str(processes)] if processes else []
        subprocess.run(command, check=True, env=env, cwd=tmp_path.parent, capture_output=True, timeout=300)
        rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
        return [(row["iteration"], row.get("total_loss"), row.get("bbox/AP")) for row in rows]

    first = train(path, tmp_path / "first")
    assert first and train(tmp_path / "first" / "config.yaml", tmp_path / "second") == first


@pytest.mark.slow
def test_a_module_registers_data_in_every_process(tmp_path):
    entry = {**entries("yolo", tmp_path, "mine")[0], "CLASSES": CLASSES}
    (tmp_path / "my_data.py").write_text(
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "from qmimic_d2.data.sources import Source, SourceLoader\n"
        f"load = SourceLoader(Source.from_entry({entry!r}))\n"
        "for name in ('mine_train', 'mine_val'):\n"
        "    DatasetCatalog.register(name, lambda: load())\n"
        f"    MetadataCatalog.get(name).set(thing_classes={CLASSES!r}, evaluator_type='coco')\n"
    )
    path = write_config(tmp_path, [])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "train_net.py"), "--num-processes", "2", "--config-file", str(path)]
    output = ["OUTPUT_DIR", str(tmp_path / "out")]
    done = subprocess.run([*command, "--import", "my_data", *output], env=env, capture_output=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "out" / "model_final.pth").is_file()
    done = subprocess.run([*command, "--import", "no_such_module", *output], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "--import no_such_module: No module named" in done.stderr


# --------------------------------------------------------------------------------------------------- one meaning


def test_the_order_of_a_coco_file_is_its_own(tmp_path):
    first, second = entries("coco", tmp_path, "x")
    with pytest.raises(ValueError, match=r"'x_train': CLASSES is \['dog', 'cat'\].* give \['cat', 'dog'\]"):
        complete_sources(config([{**first, "CLASSES": ["dog", "cat"]}, second], "x"), str(tmp_path))
    cfg = config([{**first, "CLASSES": CLASSES}, second], "x")
    complete_sources(cfg, str(tmp_path))
    assert [entry["CLASSES"] for entry in cfg.DATASETS.SOURCES] == [CLASSES, CLASSES]


def test_classes_by_hand_order_the_labels_of_yolo(tmp_path):
    first, second = entries("yolo", tmp_path, "y")
    cfg = config([{**first, "CLASSES": ["dog", "cat"]}, second], "y")
    complete_sources(cfg)
    register_sources(cfg)
    labels = [CLASSES[::-1][label["category_id"]] for label in load_dataset("y_train")[0]["annotations"]]
    assert labels == ["dog", "cat"] and load_dataset("y_val")[0]["annotations"][0]["category_id"] == 0


def test_every_missing_annotation_file_is_named(tmp_path):
    cfg = config(entries("voc", tmp_path, "v"), "v")
    complete_sources(cfg)
    register_sources(cfg)
    for name in "ab":
        (tmp_path / "Annotations" / f"{name}.xml").unlink()
    with pytest.raises(DataSetError) as caught:
        load_dataset("v_train")
    for word in ("annotation files are not there (2)", "a.xml", "b.xml"):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_masks_are_asked_of_a_format_that_has_them(tmp_path, kind):
    path = write_config(tmp_path, entries(kind, tmp_path, "mine"))
    cfg = load_config(str(path), ["MODEL.MASK_ON", "True", "OUTPUT_DIR", str(tmp_path / "out")])
    with pytest.raises(DataSetError, match="set MODEL.MASK_ON False, or give the data in COCO's format"):
        check_run(cfg, 1)
