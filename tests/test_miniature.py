"""Miniature Pascal VOC and WIDER FACE: what the real sets' own readers make of them."""

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets.builtin import register_all_pascal_voc
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, BoxMode, Instances
from scipy.io import loadmat
from torch import nn

import miniature
from miniature_lib.painting import PaintedImage, covered_share, paint_images, publish
from miniature_lib.pascal_voc import make_miniature_voc
from miniature_lib.wider_face import make_miniature_wider_face
from qmimic_d2.data import register_wider_face
from qmimic_d2.data.digits.render import DigitsSpec
from qmimic_d2.data.wider_face.annotations import ATTRIBUTES, parse_annotations
from qmimic_d2.engine import build_evaluator
from qmimic_d2.evaluation import SUBSETS, load_ground_truth

NUM_IMAGES = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    assert status_of("--dataset", "voc", "--out", root, "--images", NUM_IMAGES) == 0
    assert status_of("--dataset", "widerface", "--out", root, "--images", NUM_IMAGES) == 0
    return root


@pytest.fixture
def catalogs(root, monkeypatch):
    """Catalogs that hold the sets of ``root`` alone, as Detectron2 and this project register them."""
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    register_all_pascal_voc(str(root))
    register_wider_face(str(root))


def status_of(*arguments):
    try:
        miniature.main(list(map(str, arguments)))
    except SystemExit as stopped:
        return stopped.code
    return 0


class Oracle(nn.Module):
    """Detects the annotated objects that are to be found, each with a score of its own."""

    def __init__(self, dicts):
        super().__init__()
        self._annotations = {each["image_id"]: each["annotations"] for each in dicts}

    def forward(self, inputs):
        return [{"instances": self._detect(each)} for each in inputs]

    def _detect(self, each):
        annotations = [a for a in self._annotations[each["image_id"]] if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        instances = Instances((each["height"], each["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.scores = torch.linspace(0.9, 0.3, len(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.long)
        return instances


def oracle_results(name, output_dir):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(output_dir)
    dicts = DatasetCatalog.get(name)
    loader = build_detection_test_loader(dicts, mapper=DatasetMapper(cfg, is_train=False))
    return inference_on_dataset(Oracle(dicts), loader, build_evaluator(cfg, name))["bbox"]


# ------------------------------------------------------------------------------------ Pascal VOC


VOC_NAMES = [f"voc_2007_{split}" for split in ("train", "val", "trainval", "test")]
VOC_NAMES += [f"voc_2012_{split}" for split in ("train", "val", "trainval")]


@pytest.mark.slow
@pytest.mark.parametrize("name", VOC_NAMES)
def test_detectron2_loads_voc(catalogs, name):
    dicts = DatasetCatalog.get(name)
    assert len(dicts) == NUM_IMAGES * (2 if name.endswith("trainval") else 1)
    classes = Counter(a["category_id"] for each in dicts for a in each["annotations"])
    assert sorted(classes) == list(range(20)) and sum(classes.values()) > 3 * len(dicts)
    for each in dicts:
        image = read_image(each["file_name"], "BGR")
        assert image.shape == (each["height"], each["width"], 3) == (160, 160, 3)
        for annotation in each["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            assert 0 <= x0 < x1 <= 160 and 0 <= y0 < y1 <= 160
    assert len({annotation["category_id"] // 10 for annotation in dicts[0]["annotations"]}) == 1


@pytest.mark.slow
def test_splits_of_voc_are_apart(catalogs):
    for year in (2007, 2012):
        ids = {name: {each["image_id"] for each in DatasetCatalog.get(name)} for name in VOC_NAMES if str(year) in name}
        assert ids[f"voc_{year}_trainval"] == ids[f"voc_{year}_train"] | ids[f"voc_{year}_val"]
        assert sum(map(len, ids.values())) - len(ids[f"voc_{year}_trainval"]) == len(set().union(*ids.values()))


def test_boxes_turn_with_the_image():
    spec = DigitsSpec("turned", "val", 2, image_size=160, digits_per_image=(3, 3), size=(40, 40))
    upright = paint_images(spec, lambda images: True)
    turned = paint_images(spec, lambda images: True, is_turned=lambda index: True)
    for before, after in zip(upright, turned):
        for (digit, (x0, y0, x1, y1)), (same, box) in zip(before.objects, after.objects):
            assert digit == same and box == (160 - y1, x0, 160 - y0, x1)
        files = [np.frombuffer(each.jpeg, np.uint8) for each in (before, after)]
        pixels = [cv2.imdecode(file, cv2.IMREAD_COLOR).astype(int) for file in files]
        # up to what JPEG's blocks and colours change; another turn would be far off
        assert np.abs(np.rot90(pixels[0], k=-1) - pixels[1]).mean() < 3 < np.abs(np.rot90(pixels[0]) - pixels[1]).mean()


def test_annotations_of_voc(root):
    flags = Counter()
    for year, extra in ((2007, []), (2012, ["occluded"])):
        for path in (root / f"VOC{year}" / "Annotations").iterdir():
            tree = ET.parse(path).getroot()
            children = [child.tag for child in tree]
            assert children[:5] == ["folder", "filename", "source", "size", "segmented"]
            assert tree.find("filename").text == f"{path.stem}.jpg" and tree.find("folder").text == f"VOC{year}"
            assert [child.tag for child in tree.find("size")] == ["width", "height", "depth"]
            for each in tree.findall("object"):
                tags = [child.tag for child in each]
                assert tags == ["name", "pose", "truncated", *extra, "difficult", "bndbox"]
                assert [child.tag for child in each.find("bndbox")] == ["xmin", "ymin", "xmax", "ymax"]
                flags[year, each.find("difficult").text] += 1
                assert each.find("truncated").text == "0"
            for each in parse_rec(str(path)):  # whole numbers from 1, both corners within
                x0, y0, x1, y1 = each["bbox"]
                assert 1 <= x0 <= x1 <= 160 and 1 <= y0 <= y1 <= 160
    assert min(flags[year, value] for year in (2007, 2012) for value in "01") >= 4


def test_image_sets_of_voc(root):
    for year in (2007, 2012):
        sets = root / f"VOC{year}" / "ImageSets" / "Main"
        splits = ["train", "trainval", "val"] + (["test"] if year == 2007 else [])
        expected = {f"{name}_{split}.txt" for name in CLASS_NAMES for split in splits} | {f"{s}.txt" for s in splits}
        assert {path.name for path in sets.iterdir()} == expected
        counts = Counter()
        for split in splits:
            ids = (sets / f"{split}.txt").read_text().split()
            for name in CLASS_NAMES:
                rows = [line.split() for line in (sets / f"{name}_{split}.txt").read_text().splitlines()]
                assert [image_id for image_id, _ in rows] == ids
                for image_id, flag in rows:
                    objects = parse_rec(str(root / f"VOC{year}" / "Annotations" / f"{image_id}.xml"))
                    difficult = [each["difficult"] for each in objects if each["name"] == name]
                    assert int(flag) == (-1 if not difficult else 0 if all(difficult) else 1)
                    counts[flag] += 1
        assert set(counts) == {"-1", "0", "1"}
        assert (sets / "aeroplane_train.txt").read_text().splitlines()[0][-3:] in (" -1", "  0", "  1")


@pytest.mark.parametrize("name", ["voc_2007_test", "voc_2012_val"])
def test_voc_is_evaluated(catalogs, name, tmp_path):
    results = oracle_results(name, tmp_path)
    assert [results[key] for key in ("AP50", "AP50_area", "AP50_11point")] == pytest.approx([100.0] * 3)


# ------------------------------------------------------------------------------------ WIDER FACE


def test_wider_face_is_loaded(catalogs):
    for split in ("train", "val"):
        dicts = DatasetCatalog.get(f"wider_face_{split}")
        assert len(dicts) == NUM_IMAGES
        faces = [annotation for each in dicts for annotation in each["annotations"]]
        assert sum(not each["annotations"] for each in dicts) == 1
        assert sum(each["invalid"] for each in faces) >= 2 and sum(each["bbox"][2] == 0 for each in faces) == 1
        for name in ("blur", "expression", "pose"):
            assert len({each[name] for each in faces}) > 1, name
        assert all(set(ATTRIBUTES) < set(each) for each in faces)
        for each in dicts:
            assert read_image(each["file_name"], "BGR").shape == (160, 160, 3)
    assert dicts[0]["image_id"].startswith("0--Parade/0_Parade_Parade_0_")


def test_annotation_file_of_wider_face(root):
    lines = (root / "widerface" / "wider_face_split" / "wider_face_val_bbx_gt.txt").read_text().splitlines()
    assert lines[0].endswith(".jpg") and lines[1].isdigit() and len(lines[2].split()) == 10 and lines[2][-1] == " "
    empty = lines.index("0")
    assert lines[empty + 1] == "0 0 0 0 0 0 0 0 0 0 "


def test_ground_truth_of_wider_face(root):
    folder = root / "widerface" / "eval_tools" / "ground_truth"
    records = parse_annotations(
        (root / "widerface" / "wider_face_split" / "wider_face_val_bbx_gt.txt").read_text(), "text"
    )
    truth = load_ground_truth(str(folder))
    assert list(truth.boxes) == [record.image[: -len(".jpg")] for record in records]
    for record in records:
        image_id = record.image[: -len(".jpg")]
        assert truth.boxes[image_id].tolist() == [list(face[:4]) for face in record.faces or [(0, 0, 0, 0)]]
        kept = [truth.kept[subset][image_id] for subset in SUBSETS]
        assert not np.any(kept[0] & ~kept[1]) and not np.any(kept[1] & ~kept[2])
        for face, is_hard in zip(record.faces, kept[2]):
            assert is_hard == (face[7] == 0 and face[2] > 0 and face[3] >= 10)
    sizes = [sum(int(each.sum()) for each in truth.kept[subset].values()) for subset in SUBSETS]
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_structure_of_the_mat_files(root):
    """As scipy shows the official files: columns of cells, boxes int32, numbers of faces uint8."""
    folder = root / "widerface" / "eval_tools" / "ground_truth"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("wider_easy_val.mat", "wider_face_val.mat", "wider_hard_val.mat", "wider_medium_val.mat")
    ]
    for path in folder.iterdir():
        content = loadmat(path)
        keys = {key for key in content if not key.startswith("__")}
        labels = {f"{name}_label_list" for name in ATTRIBUTES}
        expected = {"event_list", "file_list", "face_bbx_list"} | labels
        assert keys == (expected if path.name == "wider_face_val.mat" else expected | {"gt_list"})
        for key in keys:
            assert content[key].dtype == object and content[key].shape == (4, 1), key
        assert content["event_list"][0, 0].tolist() == ["0--Parade"]
        name = content["file_list"][0, 0][0, 0]
        assert name.tolist() == ["0_Parade_Parade_0_1"]
        boxes = content["face_bbx_list"][0, 0][0, 0]
        assert boxes.dtype == np.int32 and boxes.ndim == 2 and boxes.shape[1] == 4
        for key in labels:
            assert content[key][0, 0][0, 0].shape == (len(boxes), 1) and content[key][0, 0][0, 0].dtype == np.uint8
        if "gt_list" in keys:
            cells = [cell for row in content["gt_list"][:, 0] for cell in row[:, 0]]
            assert all(cell.dtype == np.uint8 and cell.shape[1:] == (1,) for cell in cells)
            assert any(cell.size == 0 for cell in cells) and all(cell.min() >= 1 for cell in cells if cell.size)


def test_wider_face_is_evaluated(catalogs, tmp_path):
    results = oracle_results("wider_face_val", tmp_path)
    # a face below 10 pixels is in no subset, and its detection does not count
    assert results == pytest.approx({"AP": 100.0, "AP_easy": 100.0, "AP_medium": 100.0, "AP_hard": 100.0})
    assert len(list((tmp_path / "inference" / "wider_face_val").rglob("*.txt"))) == NUM_IMAGES


# ------------------------------------------------------------------------- whole or not at all


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_same_bytes_from_the_same_seed(root, tmp_path):
    first = make_miniature_wider_face(str(tmp_path / "a"), NUM_IMAGES)
    theirs = contents(root / "widerface")
    ours = contents(first)
    assert {name: data for name, data in theirs.items() if not name.endswith(".index")} == ours
    other = contents(make_miniature_wider_face(str(tmp_path / "b"), NUM_IMAGES, seed=1))
    assert other["wider_face_split/wider_face_val_bbx_gt.txt"] != ours["wider_face_split/wider_face_val_bbx_gt.txt"]
    assert contents(make_miniature_voc(str(tmp_path / "a"), NUM_IMAGES)[1]) == contents(root / "VOC2012")


def test_made_once(root, capsys):
    before = {path: os.stat(path).st_mtime_ns for path in (root / "VOC2007").rglob("*.xml")}
    assert status_of("--dataset", "voc", "--out", root, "--images", NUM_IMAGES) == 0
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    output = capsys.readouterr().out
    assert f"{root / 'VOC2007'}\n{root / 'VOC2012'}\n" in output and f"DETECTRON2_DATASETS={root}" in output


def test_other_data_are_never_overwritten(root, tmp_path, capsys):
    assert status_of("--dataset", "voc", "--out", root, "--images", NUM_IMAGES + 1) == 2
    assert "is in the way" in capsys.readouterr().err
    mine = tmp_path / "widerface" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("real data")
    assert status_of("--dataset", "widerface", "--out", tmp_path, "--images", NUM_IMAGES) == 2
    assert "is in the way" in capsys.readouterr().err
    assert mine.read_text() == "real data"
    (mine.parent / "miniature.json").write_text("{broken")
    assert status_of("--dataset", "widerface", "--out", tmp_path, "--images", NUM_IMAGES) == 2


def test_interrupted_writing_leaves_nothing(tmp_path):
    def write(folder):
        Path(folder, "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(str(tmp_path / "set"), {"seed": 1}, write)
    assert list(tmp_path.iterdir()) == []
    assert publish(str(tmp_path / "set"), {"seed": 1}, lambda folder: Path(folder, "whole").write_text(""))
    assert json.loads((tmp_path / "set" / "miniature.json").read_text())["seed"] == 1
    assert not publish(str(tmp_path / "set"), {"seed": 1}, write)


def test_out_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert status_of("--dataset", "voc", "--out", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("images", ["7", "0", "many"])
def test_number_of_images(images, tmp_path, capsys):
    assert status_of("--dataset", "voc", "--out", tmp_path, "--images", images) == 2
    assert "give 8 or more" in capsys.readouterr().err


def test_too_few_images_for_what_is_wanted(monkeypatch):
    monkeypatch.setattr("miniature_lib.painting._ATTEMPTS", 2)
    spec = DigitsSpec("few", "val", 1)
    with pytest.raises(ValueError, match="1 images are too few for few"):
        paint_images(spec, lambda images: False)


def test_covered_share():
    boxes = [(0, 0, 10, 10), (5, 0, 15, 10), (8, 8, 9, 20), (100, 100, 101, 101)]
    image = PaintedImage(b"", 200, 200, 0.0, tuple((0, box) for box in boxes))
    # by half, by 1 x 2 of 100 pixels, and the last two by nothing
    assert [covered_share(image, number) for number in range(4)] == [0.5, 0.02, 0.0, 0.0]
