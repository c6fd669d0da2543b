"""Pascal VOC files of users' own: what is refused with file and element, and what is read all the same."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from helpers import tiny_cfg
from PIL import Image

from qmimic_d2.data.checks import DataSetError
from qmimic_d2.data.loading import load_dataset
from qmimic_d2.data.pascal_voc import load_pascal_voc, voc_image_ids
from qmimic_d2.engine import Trainer
from qmimic_d2.engine.checks.data import check_datasets

NAME = "tiny_voc_checked"
CLASSES = ["cat", "dog/wolf", "bird"]
WIDTH, HEIGHT = 64, 48
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
REST = "<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
BOX = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>"


def thing(name="cat", rest=REST, box=BOX):
    return f"<object><name>{name}</name>{rest}{box}</object>"


def annotation(*things, size=SIZE):
    return f"<annotation>{size}{''.join(things) or thing()}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Writes a registered data set: two images unless they are named, with the annotation that is given."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / "VOC" / part).mkdir(parents=True)

    def write(text=annotation(), ids=("a", "b"), lines=None, ending=".jpg"):
        for image_id in ids:
            (tmp_path / "VOC" / "Annotations" / f"{image_id}.xml").write_text(text)
            path = tmp_path / "VOC" / "JPEGImages" / f"{image_id}{ending}"
            Image.new("RGB", (WIDTH, HEIGHT), (9, 99, 199)).save(path)
        path = tmp_path / "VOC" / "ImageSets" / "Main" / "train.txt"
        path.write_text("\n".join(ids) + "\n" if lines is None else lines)
        return tmp_path / "VOC"

    register_pascal_voc(NAME, str(tmp_path / "VOC"), "train", 2007, class_names=CLASSES)
    MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"
    yield write
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def check():
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (NAME,)
    check_datasets(cfg)


def refusal():
    with pytest.raises(DataSetError) as caught:
        check()
    return str(caught.value)


def corners(xmin, xmax):
    return f"<bndbox><xmin>{xmin}</xmin><ymin>6</ymin><xmax>{xmax}</xmax><ymax>30</ymax></bndbox>"


REFUSED = {
    "undeclared class": (thing("catt"), ["not declared", "a.xml: object 1: 'catt'", "names of register_pascal_voc"]),
    "no name": ("<object></object>", ["not declared", "a.xml: object 1: ''"]),
    "no box": (thing(box=""), ["four finite numbers", "a.xml: object 1"]),
    "no number": (thing(box=corners("x", 40)), ["four finite numbers", "a.xml: object 1"]),
    "NaN": (thing(box=corners("nan", 40)), ["four finite numbers"]),
    "negative": (thing(box=corners(40, 11)), ["negative width or height", "a.xml: object 1"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(voc, kind):
    text, words = REFUSED[kind]
    folder = voc(annotation(text))
    message = refusal()
    assert f"DATASETS.TRAIN names '{NAME}' ({folder})" in message
    for word in words:
        assert word in message
    with pytest.raises(DataSetError, match=words[0]):
        load_dataset(NAME)


def test_refused_files(voc, tmp_path):
    folder = voc("<annotation>")
    assert "no XML" in refusal() and "a.xml" in refusal()
    voc(lines="a\nb\na\n")
    assert "image ids occur more than once" in refusal() and "These: 'a' ('" in refusal()
    voc(annotation(size="<size><width>48</width><height>64</height></size>"))
    assert "is 64 x 48 pixels, annotated as 48 x 64" in refusal()
    voc()
    (folder / "JPEGImages" / "b.jpg").write_text("no image")
    assert "no images that can be read (1)" in refusal() and "b.jpg" in refusal()
    (folder / "JPEGImages" / "b.jpg").unlink()
    assert "1 files of them are missing" in refusal()
    voc(lines="\n\n")
    assert "lists no image" in refusal()


def test_a_year_without_a_rule(voc):
    voc()
    vars(MetadataCatalog.get(NAME))["year"] = 2026
    assert "year 2026; register it with 2007 or 2012" in refusal()


READ = {
    "no difficult, truncated, pose": dict(text=annotation(thing(rest=""))),
    "difficult without a value": dict(text=annotation(thing(rest="<difficult/>"))),
    "numbers with a point": dict(text=annotation(thing(box=BOX.replace("11", "11.0").replace("40", "40.0")))),
    "blanks in a text": dict(text=annotation(thing("\n cat "))),
    "no size": dict(text=annotation(size="")),
    "size 0": dict(text=annotation(size="<size><width>0</width><height>0</height></size>")),
    "size with a point": dict(text=annotation(size="<size><width>64.0</width><height>48.0</height></size>")),
    "blank lines": dict(lines="\na\n\nb\n\n"),
    "blanks after a name, Windows' lines": dict(lines="a \r\nb\r\n"),
    "flags": dict(lines="a  1\nb -1\n"),
    "a byte order mark": dict(lines="\ufeffa\nb\n"),
    "upper case": dict(ending=".JPG"),
    "png": dict(ending=".png"),
    "a class with a slash": dict(text=annotation(thing("dog/wolf"))),
}


@pytest.mark.parametrize("kind", READ)
def test_read(voc, kind):
    folder = voc(**READ[kind])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check()
    dicts = load_dataset(NAME)
    assert [each["image_id"] for each in dicts] == ["a", "b"]
    for each in dicts:
        assert (each["width"], each["height"]) == (WIDTH, HEIGHT)
        label = CLASSES.index("dog/wolf") if "slash" in kind else 0
        item, = each["annotations"]
        assert (item["bbox"], item["category_id"]) == ([10.0, 5.0, 40.0, 30.0], label)
    assert ap50_of_perfect_detections(dicts) == pytest.approx(100.0 / len(CLASSES))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_list_of_one_line_and_an_id_with_a_blank(voc):
    voc(ids=("my photo",), lines="my photo")
    check()
    assert [each["image_id"] for each in load_dataset(NAME)] == ["my photo"]
    assert ap50_of_perfect_detections(load_dataset(NAME)) == pytest.approx(100.0 / len(CLASSES))


def test_an_id_that_ends_with_a_number_is_no_flag(voc):
    folder = voc(ids=("shot 1", "shot 0"))
    assert voc_image_ids(str(folder), "train") == ["shot 1", "shot 0"]


def test_notes_name_the_file(voc, caplog):
    voc(annotation(thing(rest=""), size=""))
    check()
    assert "no usable <difficult> (2)" in caplog.text and "a.xml: object 1" in caplog.text
    assert "no usable <size> (2)" in caplog.text and "64 x 48" in caplog.text


def test_coordinates_with_a_point_count_exactly(voc):
    folder = voc(annotation(thing(box=corners(11.25, 40.5))))
    assert load_pascal_voc(str(folder), "train", CLASSES)[0]["annotations"][0]["bbox"] == [10.25, 5.0, 40.5, 30.0]


def test_a_correction_is_seen_by_the_next_evaluation(voc):
    voc()
    dicts = load_dataset(NAME)
    assert ap50_of_perfect_detections(dicts) == pytest.approx(100.0 / len(CLASSES))
    voc(annotation(thing(box=corners(50, 60))))
    assert ap50_of_perfect_detections(dicts) == 0.0


def ap50_of_perfect_detections(dicts):
    import torch
    from detectron2.structures import Boxes, Instances

    evaluator = Trainer.build_evaluator(tiny_cfg(), NAME)
    evaluator.reset()
    for image in dicts:
        found = Instances((HEIGHT, WIDTH))
        found.pred_boxes = Boxes(torch.tensor([each["bbox"] for each in image["annotations"]]))
        found.scores = torch.full((len(found.pred_boxes),), 0.9)
        found.pred_classes = torch.tensor([each["category_id"] for each in image["annotations"]])
        evaluator.process([{"image_id": image["image_id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP50_area"]
