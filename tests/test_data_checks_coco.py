"""COCO files before a run: what is refused, by element, and what is repaired for loader and evaluator alike."""

import copy
import json
import os

import pytest
from detectron2.config import get_cfg
from tiny_coco import registered
from tiny_training import write_coco

from qmimic_d2.data.checks import DataSetError
from qmimic_d2.data.loading import build_coco_evaluator, load_dataset
from qmimic_d2.engine.checks.data import ModelClasses, check_datasets

NAME = "tiny_checked"


@pytest.fixture
def data(tmp_path):
    """Writes a changed copy of a good data set of 4 images and 8 objects, and registers it."""
    write_coco(tmp_path / "annotations.json", tmp_path / "images", 4)
    good = json.loads((tmp_path / "annotations.json").read_text())

    def write(change=lambda content: None, text=None):
        content = copy.deepcopy(good)
        change(content)
        (tmp_path / "annotations.json").write_text(json.dumps(content) if text is None else text(content))
        return content

    os.mkfifo(tmp_path / "pipe")
    write()
    with registered(tmp_path, NAME):
        yield write


def config(*options, test=()):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAME,), test
    cfg.merge_from_list(list(options))
    return cfg


def refusal(*options, test=()):
    with pytest.raises(DataSetError) as caught:
        check_datasets(config(*options, test=test))
    return str(caught.value)


def each(part, **values):
    """A change of every entry of a part; None takes the key out."""

    def change(content):
        for entry in content[part]:
            entry.update(values)
            for key in [key for key, value in values.items() if value is None]:
                del entry[key]

    return change


def first(part, **values):
    return lambda content: content[part][0].update(values)


def test_good_data_pass_in_silence(data, caplog):
    check_datasets(config(test=(NAME,)), ModelClasses("NUM_CLASSES", 3))
    assert caplog.text == ""


# ----------------------------------------------------------------------------------------------------- refused


def twice(content):
    """Two exports, one after the other."""
    for part in ("images", "annotations"):
        content[part] += copy.deepcopy(content[part])


REFUSED = {
    "joined exports": (
        twice,
        ["image ids occur more than once", "(4)", ": 0 ('", "; 1 ('", "; 2 ('", "; 3 ('", "annotation ids occur more"],
    ),
    "image id twice": (lambda c: c["images"][1].update(id=0), ["image ids occur more than once", "These: 0"]),
    "annotation id twice": (first("annotations", id=5), ["annotation ids occur more than once", "5 (image"]),
    "category id twice": (first("categories", id=2), ["category ids occur more than once", "2"]),
    "unknown category": (first("annotations", category_id=77), ["not declared", "annotation 1", "category_id 77"]),
    "unknown image": (first("annotations", image_id=99), ["image that is not listed", "image_id 99"]),
    "image without id": (lambda c: c["images"][0].pop("id"), ["neither a whole number nor a text", "image 0"]),
    "id that is a list": (first("images", id=[1]), ["neither a whole number nor a text", "[1]"]),
    "category without name": (lambda c: c["categories"][0].pop("name"), ["categories have no name", "category 1"]),
    "image without file": (lambda c: c["images"][0].pop("file_name"), ["no file_name", "image 0"]),
    "no box": (lambda c: c["annotations"][2].pop("bbox"), ["four finite numbers", "annotation 3 of image 1", "None"]),
    "null box": (first("annotations", bbox=None), ["four finite numbers", "annotation 1 of image 0 has None"]),
    "null in a box": (first("annotations", bbox=[1, None, 3, 4]), ["four finite numbers", "[1, None, 3, 4]"]),
    "five numbers": (first("annotations", bbox=[1, 2, 3, 4, 5]), ["four finite numbers"]),
    "NaN": (first("annotations", bbox=[1, 2, float("nan"), 4]), ["four finite numbers", "nan"]),
    "infinite": (first("annotations", bbox=[1, 2, 3, float("inf")]), ["four finite numbers", "inf"]),
    "negative": (first("annotations", bbox=[9, 9, -5, 4]), ["negative width or height", "[9, 9, -5, 4]"]),
    "normalized": (each("annotations", bbox=[0.1, 0.2, 0.3, 0.4]), ["between 0 and 1", "(8)", "[0.1, 0.2, 0.3, 0.4]"]),
    "backslashes": (
        lambda c: [image.update(file_name=f"..\\images\\{image['file_name']}") for image in c["images"]],
        ["backslashes", "(4)", "Write / instead of \\", "images/../images/0.png"],
    ),
    "missing image": (first("images", file_name="gone.png"), ["not there", "gone.png'"]),
    "a pipe": (first("images", file_name="../pipe"), ["no images that can be read", "it is no file"]),
    "no image": (first("images", file_name="../annotations.json"), ["no images that can be read", "annotations.json"]),
    "another size": (first("images", width=65), ["another size", "is 48 x 64 pixels, annotated as 65 x 64"]),
    "turned size": (lambda c: c["images"][1].update(width=48, height=64), ["is 64 x 48", "as 48 x 64", "EXIF"]),
    "only crowds": (each("annotations", iscrowd=1), ["no object to be trained on", "Correct iscrowd"]),
    "no annotation": (lambda c: c["annotations"].clear(), ["no object to be trained on"]),
    "an entry that is none": (lambda c: c["annotations"].append(3), ["not in COCO's format", "'annotations'"]),
    "no categories": (lambda c: c["categories"].clear(), ["its list of categories is empty"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(data, kind):
    change, words = REFUSED[kind]
    data(change)
    message = refusal()
    assert f"DATASETS.TRAIN names '{NAME}'" in message and "annotations.json" in message or "iscrowd" in message
    for word in words:
        assert word in message


def test_json_that_is_too_deep(data):
    data(text=lambda content: "[" * 100000)
    assert "RecursionError" in refusal() or "not in COCO's format" in refusal()


def test_one_summary_with_the_first_ten_of_each_kind(data):
    def change(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [1, 2]
        content["annotations"] += [dict(content["annotations"][0], id=100 + index) for index in range(20)]
        content["images"][0]["file_name"] = "gone.png"

    data(change)
    message = refusal()
    lines = message.splitlines()
    assert len(lines) == 3 and lines[0].endswith("which cannot be used:")
    assert lines[1].startswith("- image files are not there (1)")
    assert lines[2].startswith("- annotations have a box") and "(28)" in lines[2] and lines[2].count("[1, 2]") == 10


def test_a_test_set_may_have_no_annotations(data):
    data(lambda content: content.pop("annotations"))
    cfg = config(test=(NAME,))
    cfg.DATASETS.TRAIN = ()
    check_datasets(cfg, eval_only=True)
    assert "no list 'annotations'" in refusal()


MASK = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]
RLE = {"size": [64, 48], "counts": [64 * 48]}


def test_masks_that_training_needs(data):
    data(each("annotations", segmentation=MASK))
    check_datasets(config("MODEL.MASK_ON", True))
    data(first("annotations", segmentation=RLE))
    message = refusal("MODEL.MASK_ON", True)
    assert "run-length masks" in message and "INPUT.MASK_FORMAT bitmask" in message
    assert "no usable segmentation" in message and "(7)" in message
    assert "(7)" in refusal("DATASETS.TRAIN", (), "MODEL.MASK_ON", True, test=(NAME,))  # run lengths are taken
    check_datasets(config())


def test_keypoints_that_training_needs(data):
    options = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2)
    data(each("annotations", keypoints=[1, 2, 2, 3, 4, 0], num_keypoints=1))
    check_datasets(config(*options))
    data(each("annotations", keypoints=[1, 2, 2], num_keypoints=1))
    assert "do not have the keypoints" in refusal(*options)


# ---------------------------------------------------------------------------------------------------- repaired


def ids_of(convert, *keys):
    def change(content):
        for part, key in keys:
            for entry in content[part]:
                entry[key] = convert(entry[key])

    return change


def marked(content):
    return "\ufeff" + json.dumps(content)


# The change, a part of the note, and what the loaded dicts then hold of the first object of image 0.
REPAIRED = {
    "no info": (lambda c: c.pop("info"), "no info", {}),
    "no iscrowd": (each("annotations", iscrowd=None), "no usable iscrowd", {"iscrowd": 0}),
    "iscrowd true or false": (each("annotations", iscrowd=False), "no usable iscrowd", {"iscrowd": 0}),
    "no area": (each("annotations", area=None), "no usable area", {}),
    "no annotation ids": (each("annotations", id=None), "They are numbered", {}),
    "annotation ids are texts": (ids_of(lambda x: f"a{x}", ("annotations", "id")), "They are numbered", {}),
    "annotation ids from 0": (ids_of(lambda x: x - 1, ("annotations", "id")), "They are numbered", {}),
    "ids are texts": (ids_of(str, ("categories", "id")), "ids are texts", {"category_id": 0}),
    "references are texts": (
        ids_of(str, ("annotations", "image_id"), ("annotations", "category_id")), "another type", {"category_id": 0}
    ),
    "names are numbers": (ids_of(lambda x: len(x), ("categories", "name")), "name that is no text", {}),
    "no sizes": (lambda c: [each.pop("width") for each in c["images"]], "read from the files", {}),
    "sizes are texts": (ids_of(str, ("images", "width"), ("images", "height")), "read from the files", {}),
    "box of texts": (ids_of(lambda x: [str(n) for n in x], ("annotations", "bbox")), "written as text", {}),
    "box of the mask": (each("annotations", bbox=None, segmentation=MASK), "around the mask", {"bbox": [1, 1, 8, 8]}),
    "mask of two points": (each("annotations", segmentation=[[1, 2, 3, 4]]), "left out; the box stays", {}),
    "mask of null": (each("annotations", segmentation=[[None] * 6]), "left out; the box stays", {}),
    "flat mask": (each("annotations", segmentation=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), "left out; the box stays", {}),
    "RLE of another size": (
        each("annotations", segmentation={"size": [2, 2], "counts": [4]}), "left out; the box stays", {}
    ),
    "null keypoints": (each("annotations", keypoints=[None, 1, 2]), "keypoints that are no numbers", {}),
    "ignore": (first("annotations", ignore=1), "taken as crowds", {"iscrowd": 1}),
}


@pytest.mark.parametrize("kind", REPAIRED)
def test_repaired_for_training_and_evaluation(data, kind, caplog, capfd, tmp_path):
    change, note, expected = REPAIRED[kind]
    data(change)
    before = (tmp_path / "annotations.json").read_bytes()
    check_datasets(config(test=(NAME,)))
    assert note in caplog.text and f"DATASETS.TRAIN names '{NAME}'" in caplog.text
    dicts = load_dataset(NAME)
    assert [len(image["annotations"]) for image in dicts] == [2] * 4
    found = dicts[0]["annotations"][0]
    assert {key: found[key] for key in expected} == expected
    assert [(image["width"], image["height"]) for image in dicts[:2]] == [(48, 64), (64, 48)]
    assert ap_of_perfect_detections(dicts, tmp_path) == pytest.approx(100.0)
    assert (tmp_path / "annotations.json").read_bytes() == before


def test_a_byte_order_mark(data, tmp_path):
    data(text=marked)
    check_datasets(config())
    assert len(load_dataset(NAME)) == 4


def test_image_ids_stay_texts(data, tmp_path):
    data(ids_of(lambda x: f"img{x}", ("images", "id"), ("annotations", "image_id")))
    check_datasets(config(test=(NAME,)))
    dicts = load_dataset(NAME)
    assert [image["image_id"] for image in dicts] == ["img0", "img1", "img2", "img3"]
    assert ap_of_perfect_detections(dicts, tmp_path) == pytest.approx(100.0)


def test_category_ids_that_are_texts_are_ordered_as_numbers(data):
    def change(content):
        for category, number in zip(content["categories"], (10, 9, 2)):
            for annotation in content["annotations"]:
                if annotation["category_id"] == category["id"]:
                    annotation["category_id"] = str(number)
            category["id"] = str(number)

    data(change)
    check_datasets(config())
    dicts = load_dataset(NAME)
    assert dicts[0]["annotations"][0]["category_id"] == 2  # the id 10, after 2 and 9


def test_a_correction_is_seen(data, tmp_path):
    data(each("annotations", iscrowd=None))
    check_datasets(config())
    assert load_dataset(NAME)[0]["annotations"][0]["bbox"] == [4.0, 6.0, 24.0, 30.0]
    data(each("annotations", iscrowd=None, bbox=[1.0, 2.0, 30.0, 4.0]))
    assert load_dataset(NAME)[0]["annotations"][0]["bbox"] == [1.0, 2.0, 30.0, 4.0]


def test_what_is_only_worth_knowing(data, caplog):
    def change(content):
        boxes = ([40, 10, 30, 9], [500, 10, 9, 9], [3, 3, 0, 9])
        for annotation, box in zip(content["annotations"], boxes):
            annotation["bbox"] = box

    data(change)
    check_datasets(config())
    for words in ("reach over the border", "wholly outside", "no area"):
        assert words in caplog.text


def ap_of_perfect_detections(dicts, tmp_path):
    """The evaluator's AP of detections that are the loaded objects; a crowd is not detected."""
    import torch
    from detectron2.structures import Boxes, BoxMode, Instances

    evaluator = build_coco_evaluator(NAME, str(tmp_path / "inference"))
    evaluator.reset()
    for image in dicts:
        objects = [each for each in image["annotations"] if not each["iscrowd"]]
        found = Instances((image["height"], image["width"]))
        corners = [BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in objects]
        found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.full((len(objects),), 0.9)
        found.pred_classes = torch.tensor([each["category_id"] for each in objects], dtype=torch.long)
        evaluator.process([{"image_id": image["image_id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]
