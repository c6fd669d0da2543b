"""The models that the package ships: small enough, described truly, and they find what they were trained on."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qmimic_d2.__main__ import main
from qmimic_d2.data.digits import DigitsSpec, prepare_digits
from qmimic_d2.export import OnnxDetector
from qmimic_d2.image_file import read_bgr_image
from qmimic_d2.inference.zoo import zoo_file, zoo_models

NAMES = sorted(zoo_models())
FILES = ("model.onnx", "model_int8.onnx")
FORMS = ("", "-int8")
# What a card says in a table of its own.
FACTS = ("data", "licence of the data", "seed", "commit")


def folder_of(name):
    return Path(zoo_file(f"zoo:{name}")).parent


def card_of(name):
    return (folder_of(name) / "README.md").read_text(encoding="utf-8")


def cells_of(card):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]


def test_the_zoo_has_digits_and_photographs():
    assert {"blood_cells", "digits"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_two_files_and_a_card(name):
    assert sorted(each.name for each in folder_of(name).iterdir()) == sorted([*FILES, "README.md"])
    assert sum((folder_of(name) / each).stat().st_size for each in FILES) <= 1.5e6


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_where_the_model_comes_from(name):
    card = card_of(name)
    facts = {cells[0]: cells[1] for cells in cells_of(card) if len(cells) == 2}
    assert all(facts[each] for each in FACTS)
    assert re.fullmatch("[0-9a-f]{7,40}", facts["commit"])
    assert int(facts["seed"]) >= 0
    assert f"--model zoo:{name} " in card
    assert len(card.splitlines()[0]) <= 100  # it stands in a list
    listed = {cells[0].strip("`"): cells for cells in cells_of(card) if cells[0].strip("`") in FILES}
    for file in FILES:
        name_cell, average_precision, milliseconds, megabytes = listed[file]
        assert 0.0 < float(average_precision) < 100.0
        assert float(milliseconds) > 0.0
        assert float(megabytes) == pytest.approx((folder_of(name) / file).stat().st_size / 1e6, abs=0.006)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_detects_in_any_image(name, form):
    detector = OnnxDetector(zoo_file(f"zoo:{name}{form}"), threads=1)
    assert detector.description.has_names
    assert not any(value.startswith("/") for value in detector.description.source.values())  # of another machine
    pixels = np.random.default_rng(1).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    found = detector(pixels)
    assert np.isfinite(found.boxes).all() and (found.boxes >= 0.0).all()
    assert (found.boxes <= [160, 90, 160, 90]).all()
    assert all(0 <= each < len(detector.names) for each in found.classes)


def overlap(first, second):
    """IoU of boxes (x0, y0, x1, y1)."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = np.prod(sides.clip(min=0.0))
    return shared / (np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - shared)


@pytest.mark.parametrize("form", FORMS)
def test_the_digits_are_found(tmp_path, form):
    folder = Path(prepare_digits(DigitsSpec("zoo_digits", split="val", num_images=40), str(tmp_path)))
    content = json.loads((folder / "annotations.json").read_text())
    class_names = {each["id"]: each["name"] for each in content["categories"]}
    detector = OnnxDetector(zoo_file(f"zoo:digits{form}"), threads=1)
    num_right = num_found = 0
    for image in content["images"]:
        found = detector(read_bgr_image(str(folder / "images" / image["file_name"]))).above(0.5)
        num_found += len(found)
        for truth in [each for each in content["annotations"] if each["image_id"] == image["id"]]:
            x, y, width, height = truth["bbox"]
            box = np.array([x, y, x + width, y + height])
            num_right += any(
                detector.names[index] == class_names[truth["category_id"]] and overlap(box, each) >= 0.5
                for each, index in zip(found.boxes, found.classes)
            )
    # as at its training: AP50 above 80; a wrong channel order or class list gives next to nothing
    assert num_right >= 0.7 * len(content["annotations"])
    assert num_right >= 0.7 * num_found


def test_the_zoo_is_listed(capsys):
    assert main(["predict", "--model", "zoo:"]) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert f"zoo:{name}  {card_of(name).splitlines()[0].lstrip('# ')}" in printed


def test_a_model_is_opened_by_name(tmp_path):
    photo, output = tmp_path / "photo.png", tmp_path / "drawn"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photo)
    assert main(["predict", "--model", "zoo:digits-int8", "--input", str(photo), "--output", str(output)]) == 0
    content = json.loads((output / "predictions.json").read_text())
    assert [each["name"] for each in content["categories"]] == list("0123456789")
    assert (output / "photo.jpg").is_file()


@pytest.mark.parametrize("address", ["zoo:nothing", "zoo:digits-int4", "zoo:../digits"])
def test_an_unknown_name_is_refused_with_those_there_are(address, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photo)
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "--model", address, "--input", str(photo), "--output", str(tmp_path / "drawn")])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert repr(address[len("zoo:") :]) in line
    assert all(name in line for name in NAMES)
    assert not (tmp_path / "drawn").exists()
