"""Embedded digits: same bytes every time, whole or not at all, registered without any work."""

import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

from qmimic_d2.data.digits import files as digits_files
from qmimic_d2.data.digits import registration as digits
from qmimic_d2.data.digits.registration import (
    DIGITS_SPECS,
    prepare_digits,
    register_digits,
    verify_digits,
)
from qmimic_d2.data.digits.render import DigitsPainter

EASY = replace(DIGITS_SPECS["digits_det_train"], name="easy", num_images=6)
HARD = replace(DIGITS_SPECS["digits_det_hard_train"], name="hard", num_images=6)


@pytest.fixture
def catalogs(monkeypatch):
    """Empty catalogs, and data sets of three images, for the length of a test."""
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    monkeypatch.setattr(PathManager, "_path_handlers", OrderedDict(PathManager._path_handlers))
    monkeypatch.setattr(digits, "_registered_roots", {})
    for name, spec in DIGITS_SPECS.items():
        monkeypatch.setitem(DIGITS_SPECS, name, replace(spec, num_images=3))


@pytest.fixture
def generations(monkeypatch):
    """Names of the data sets made during a test."""
    made = []

    class Counting(DigitsPainter):
        def __init__(self, spec):
            made.append(spec.name)
            super().__init__(spec)

    monkeypatch.setattr(digits_files, "DigitsPainter", Counting)
    return made


def annotations_of(directory):
    return json.loads(Path(directory, "annotations.json").read_text())


# ---------------------------------------------------------------- contents


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_det_val", "digits_det_hard_val"])
def test_published_annotations(name, tmp_path, caplog):
    spec = DIGITS_SPECS[name]
    directory = Path(prepare_digits(name, str(tmp_path)))
    marker = json.loads((directory / "complete.json").read_text())
    assert set(marker["versions"]) == {"cv2", "numpy", "sklearn"}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

    coco = annotations_of(directory)
    assert len(coco["images"]) == len(list((directory / "images").iterdir())) == spec.num_images
    per_image = np.bincount([a["image_id"] for a in coco["annotations"]])[1:]
    assert (per_image.min(), per_image.max()) == spec.digits_per_image
    ids = [a["id"] for a in coco["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) == 1
    assert {a["category_id"] for a in coco["annotations"]} == set(range(1, 11))
    for a in coco["annotations"]:
        x, y, width, height = a["bbox"]
        assert x >= 0 and y >= 0 and width > 0 and height > 0
        assert x + width <= spec.image_size and y + height <= spec.image_size
        assert a["area"] == width * height and a["iscrowd"] == 0


def test_warns_of_other_annotations(tmp_path, monkeypatch, caplog):
    name = "digits_det_val"
    monkeypatch.setitem(DIGITS_SPECS, name, replace(DIGITS_SPECS[name], num_images=3))
    prepare_digits(name, str(tmp_path))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "cannot be compared" in warning and "cv2" in warning


@pytest.mark.parametrize("spec", [EASY, HARD], ids=lambda spec: spec.name)
def test_same_bytes_every_time(spec, tmp_path):
    first, second = (Path(prepare_digits(spec, str(tmp_path / run))) for run in "ab")
    assert verify_digits(spec, str(tmp_path / "a")) == verify_digits(spec, str(tmp_path / "b"))
    for file in sorted(path.relative_to(first) for path in first.rglob("*.*")):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_easy_sets_have_no_distractors():
    assert DIGITS_SPECS["digits_det_train"].distractors_per_image == (0, 0)
    assert DIGITS_SPECS["digits_det_val"].distractors_per_image == (0, 0)
    assert DIGITS_SPECS["digits_det_hard_train"].distractors_per_image == (3, 6)
    assert DIGITS_SPECS["digits_det_hard_val"].distractors_per_image == (3, 6)


# ---------------------------------------------------------------- whole or not at all


def test_made_once(tmp_path, generations):
    directory = prepare_digits(EASY, str(tmp_path))
    assert prepare_digits(EASY, str(tmp_path)) == directory == str(tmp_path / "easy")
    assert generations == ["easy"]


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    paint = DigitsPainter.paint

    def interrupted(self, index):
        if index == 3:
            raise KeyboardInterrupt
        return paint(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(DigitsPainter, "paint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_digits(EASY, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    with pytest.raises(FileNotFoundError, match="prepare_digits"):
        verify_digits(EASY, str(tmp_path))
    prepare_digits(EASY, str(tmp_path))
    verify_digits(EASY, str(tmp_path))


@pytest.mark.parametrize("missing", ["complete.json", "annotations.json", "images/000002.jpg", "images"])
def test_partial_directory_is_made_again(missing, tmp_path, generations):
    directory = Path(prepare_digits(EASY, str(tmp_path)))
    whole = verify_digits(EASY, str(tmp_path))
    target = directory / missing
    if target.is_dir():
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
    else:
        target.unlink()
    # What a killed process leaves behind.
    (tmp_path / "easy.partial-1" / "images").mkdir(parents=True)
    (tmp_path / "easy.old-1").mkdir()
    prepare_digits(EASY, str(tmp_path))
    assert generations == ["easy", "easy"]
    assert verify_digits(EASY, str(tmp_path)) == whole
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["easy"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}}'])
def test_damaged_marker_is_not_taken_for_complete(text, tmp_path, generations):
    directory = Path(prepare_digits(EASY, str(tmp_path)))
    (directory / "complete.json").write_text(text)
    prepare_digits(EASY, str(tmp_path))
    assert generations == ["easy", "easy"]


def test_other_settings_are_made_again(tmp_path, generations):
    prepare_digits(EASY, str(tmp_path))
    before = verify_digits(EASY, str(tmp_path))
    smaller = replace(EASY, size=(18, 20))
    with pytest.raises(FileNotFoundError, match="present settings"):
        verify_digits(smaller, str(tmp_path))
    prepare_digits(smaller, str(tmp_path))
    assert verify_digits(smaller, str(tmp_path)) != before
    marker = tmp_path / "easy" / "complete.json"
    content = json.loads(marker.read_text())
    content["settings"]["generator"] -= 1  # made by an earlier version
    marker.write_text(json.dumps(content))
    prepare_digits(smaller, str(tmp_path))
    assert len(generations) == 3


@pytest.mark.parametrize("change", ["edit", "add", "remove", "annotations"])
def test_verify_finds_changes(change, tmp_path):
    directory = Path(prepare_digits(EASY, str(tmp_path)))
    image = directory / "images" / "000001.jpg"
    if change == "edit":
        data = bytearray(image.read_bytes())
        data[-10] ^= 1
        image.write_bytes(data)
    elif change == "add":
        (directory / "images" / "extra.jpg").write_bytes(b"")
    elif change == "remove":
        image.unlink()
    else:
        (directory / "annotations.json").unlink()
    with pytest.raises(ValueError, match="Remove the directory"):
        verify_digits(EASY, str(tmp_path))


def test_files_of_others_are_kept(tmp_path):
    own = tmp_path / "easy" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(ValueError, match="in the way"):
        prepare_digits(EASY, str(tmp_path))
    own.unlink()
    photo = tmp_path / "easy" / "images" / "holiday.jpg"
    photo.parent.mkdir()
    photo.write_text("mine")
    with pytest.raises(ValueError, match="in the way"):
        prepare_digits(EASY, str(tmp_path))
    assert photo.read_text() == "mine"


def test_one_of_many_makes_it(tmp_path, generations):
    barrier, results = threading.Barrier(3), []

    def run():
        barrier.wait()
        results.append(prepare_digits(EASY, str(tmp_path)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert generations == ["easy"] and results == [str(tmp_path / "easy")] * 3
    verify_digits(EASY, str(tmp_path))


# ---------------------------------------------------------------- users' mistakes


def test_root_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="DETECTRON2_DATASETS"):
        prepare_digits(EASY, str(tmp_path / "file"))
    with pytest.raises(ValueError, match="DETECTRON2_DATASETS"):
        prepare_digits(EASY, str(tmp_path / "file" / "below"))


def test_unknown_name(tmp_path):
    for function in (prepare_digits, verify_digits):
        with pytest.raises(ValueError, match="Unknown data set 'digits'.*digits_det_train"):
            function("digits", str(tmp_path))


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        prepare_digits(EASY, str(tmp_path))
    assert not (tmp_path / "easy").exists()


# ---------------------------------------------------------------- Detectron2


@pytest.mark.slow
def test_importing_does_no_work(tmp_path):
    code = (
        "import sys, qmimic_d2.data.digits.registration, qmimic_d2.data\n"
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "for name in qmimic_d2.data.DIGITS_SPECS:\n"
        "    assert name in DatasetCatalog\n"
        "    meta = MetadataCatalog.get(name)\n"
        "    assert meta.thing_classes == list('0123456789') and meta.evaluator_type == 'coco'\n"
        "    assert meta.json_file == 'somewhere/' + name + '/annotations.json', meta.json_file\n"
        "    assert meta.image_root == 'somewhere/' + name + '/images'\n"
        "assert 'sklearn' not in sys.modules\n"
    )
    repository = str(Path(__file__).resolve().parent.parent)
    env = dict(os.environ, DETECTRON2_DATASETS="somewhere")
    env["PYTHONPATH"] = os.pathsep.join([repository] + [p for p in [env.get("PYTHONPATH")] if p])
    subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), env=env, check=True)
    assert list(tmp_path.iterdir()) == []


def test_load_through_the_catalog(catalogs, tmp_path, generations):
    register_digits(str(tmp_path))
    assert not list(tmp_path.iterdir())
    dicts = DatasetCatalog.get("digits_det_train")
    assert generations == ["digits_det_train"]
    assert len(dicts) == 3
    directory = tmp_path / "digits_det_train"
    coco = annotations_of(directory)
    for record in dicts:
        assert read_image(record["file_name"], "BGR").shape == (128, 128, 3)
        expected = [a for a in coco["annotations"] if a["image_id"] == record["image_id"]]
        assert [a["bbox"] for a in record["annotations"]] == [a["bbox"] for a in expected]
        assert [a["category_id"] + 1 for a in record["annotations"]] == [a["category_id"] for a in expected]
    meta = MetadataCatalog.get("digits_det_train")
    assert meta.thing_classes == list("0123456789")
    assert meta.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(10)}


def test_evaluator_before_loader(catalogs, tmp_path, generations):
    register_digits(str(tmp_path))
    COCOEvaluator("digits_det_val", tasks=("bbox",), distributed=False, output_dir=str(tmp_path / "out"))
    assert generations == ["digits_det_val"]
    with PathManager.open(MetadataCatalog.get("digits_det_hard_val").json_file) as f:
        assert len(json.load(f)["images"]) == 3
    assert generations == ["digits_det_val", "digits_det_hard_val"]


def test_prepare_goes_where_the_name_is_registered(catalogs, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "a"))
    register_digits()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "b"))
    assert prepare_digits("digits_det_val") == str(tmp_path / "a" / "digits_det_val")
    assert prepare_digits(EASY) == str(tmp_path / "b" / "easy")


def test_registering_twice(catalogs, tmp_path, caplog):
    register_digits(str(tmp_path))
    register_digits(str(tmp_path))
    assert not caplog.records
    register_digits(str(tmp_path / "elsewhere"))
    assert "DatasetCatalog.remove" in caplog.records[0].getMessage()
    assert MetadataCatalog.get("digits_det_val").json_file.startswith(str(tmp_path / "digits_det_val"))


def test_registration_of_the_user_is_kept(catalogs, tmp_path):
    DatasetCatalog.register("digits_det_val", lambda: ["mine"])
    register_digits(str(tmp_path))
    assert DatasetCatalog.get("digits_det_val") == ["mine"]
    assert "digits_det_train" in DatasetCatalog
