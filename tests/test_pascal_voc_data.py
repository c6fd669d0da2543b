"""Pascal VOC's files: what is missing, damaged, outside of its image or empty."""

import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import register_all_pascal_voc
from helpers import tiny_cfg
from PIL import Image

from qmimic_d2.data.mapper import FileNamingMapper
from qmimic_d2.data.pascal_voc import check_pascal_voc
from qmimic_d2.data.resumable_loader import build_resumable_train_loader
from qmimic_d2.engine import Trainer
from qmimic_d2.image_file import UnusableImageError

IDS = ("000001", "000002", "000003")
WIDTH, HEIGHT = 48, 32


def annotation(*boxes):
    objects = "".join(
        f"<object><name>dog</name><difficult>0</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>"
        for x0, y0, x1, y1 in boxes
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>"


@pytest.fixture
def folder(tmp_path):
    """VOC2007 with three images: a box each, two of them in the first, none in the last."""
    folder = tmp_path / "VOC2007"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    for image_id, boxes in zip(IDS, ([(1, 1, 20, 20), (5, 5, 48, 32)], [(3, 4, 30, 31)], [])):
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30)).save(folder / "JPEGImages" / f"{image_id}.jpg")
        (folder / "Annotations" / f"{image_id}.xml").write_text(annotation(*boxes))
    for split in ("trainval", "test"):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(IDS) + "\n")
    return folder


@pytest.fixture
def registered(folder, monkeypatch):
    """Catalogs that hold that folder's sets."""
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    register_all_pascal_voc(str(folder.parent))
    return folder


def check(folder, split="trainval", year=2007):
    check_pascal_voc(str(folder), split, year)


def test_a_whole_folder(folder):
    check(folder)
    check(folder, "test")


@pytest.mark.parametrize(
    "name, split, year, archive",
    [
        ("VOC2007", "trainval", 2007, "VOCtrainval_06-Nov-2007.tar"),
        ("VOC2007", "test", 2007, "VOCtest_06-Nov-2007.tar"),
        ("VOC2012", "train", 2012, "VOCtrainval_11-May-2012.tar"),
    ],
)
def test_a_missing_folder(tmp_path, name, split, year, archive):
    with pytest.raises(FileNotFoundError) as caught:
        check(tmp_path / name, split, year)
    message = str(caught.value)
    assert str(tmp_path / name / "ImageSets" / "Main" / f"{split}.txt") in message
    assert f"Unpack {archive} and move its VOCdevkit/{name} to {tmp_path}, so that {name}/Annotations" in message
    assert "DETECTRON2_DATASETS" in message


def test_a_year_of_which_no_archive_is_known(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f". Move VOC2010 to {tmp_path}, so that VOC2010/")):
        check(tmp_path / "VOC2010", "train", 2010)


@pytest.mark.parametrize("part, suffix", [("JPEGImages", "jpg"), ("Annotations", "xml")])
def test_missing_files(folder, part, suffix):
    for image_id in IDS[1:]:
        (folder / part / f"{image_id}.{suffix}").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        check(folder)
    message = str(caught.value)
    assert "lists 3 images, and 2 files of them are missing" in message
    assert f"the first {str(folder / part / f'000002.{suffix}')!r}. Unpack VOCtrainval_06-Nov-2007.tar" in message


def test_a_part_that_is_missing_altogether(folder):
    (folder / "JPEGImages").rename(folder / "images")
    with pytest.raises(FileNotFoundError, match="3 files of them are missing"):
        check(folder)


def test_an_empty_list(folder):
    (folder / "ImageSets" / "Main" / "test.txt").write_text("\n")
    check(folder)
    with pytest.raises(ValueError, match="test.txt' lists no image. Unpack VOCtest_06-Nov-2007.tar"):
        check(folder, "test")


# ----------------------------------------------------------------------------- images that are damaged


def voc_cfg(*options):
    return tiny_cfg(
        *("DATASETS.TRAIN", ("voc_2007_trainval",), "DATASETS.TEST", ("voc_2007_test",), "SOLVER.IMS_PER_BATCH", 1),
        *("DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SIZE_TEST", 32),
        *options,
    )


def damaged(folder, kept):
    path = folder / "JPEGImages" / f"{IDS[0]}.jpg"
    path.write_bytes(path.read_bytes()[:kept])
    return path


@pytest.mark.parametrize("kept", [0, 10, 400], ids=["empty", "no header", "cut short"])
def test_an_image_that_cannot_be_decoded_stops_a_training(registered, kept):
    path = damaged(registered, kept)
    loader, _ = build_resumable_train_loader(voc_cfg(), seed=0)
    with pytest.raises(UnusableImageError) as caught:
        for _, _ in zip(range(5), loader):
            pass
    assert f"{str(path)!r} cannot be read as an image" in str(caught.value) and "Replace the file" in str(caught.value)


def test_and_an_evaluation(registered):
    path = damaged(registered, 400)
    with pytest.raises(UnusableImageError, match=re.escape(f"{str(path)!r} cannot be read as an image")):
        list(Trainer.build_test_loader(voc_cfg(), "voc_2007_test"))


def test_other_errors_of_a_mapper_stay_as_they_are(tmp_path):
    def missing(dataset_dict):
        return open(tmp_path / "gone.jpg")

    def broken(dataset_dict):
        raise KeyError("file_name")

    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        FileNamingMapper(missing)({"file_name": "gone.jpg"})
    with pytest.raises(KeyError):
        FileNamingMapper(broken)({})


# ------------------------------------------------------------------------------ boxes and empty images


def first_batches(count, *options):
    loader, _ = build_resumable_train_loader(voc_cfg("INPUT.RANDOM_FLIP", "none", *options), seed=0)
    images = [batch[0] for _, batch in zip(range(count), loader)]
    return {each["image_id"]: each["instances"].gt_boxes.tensor.tolist() for each in images}


def test_boxes_outside_of_the_image(registered):
    """Detectron2 cuts them at the border and leaves out what then has no area: documented in docs/reproduce.md."""
    path = registered / "Annotations" / f"{IDS[0]}.xml"
    path.write_text(annotation((1, 1, 20, 20), (40, 20, 90, 70), (60, 5, 70, 9)))
    boxes = first_batches(8)[IDS[0]]
    assert boxes == [[0.0, 0.0, 20.0, 20.0], [39.0, 19.0, 48.0, 32.0]]


def test_an_image_without_an_object(registered):
    """It is not trained on, unless the config asks for it, and it is evaluated."""
    assert set(first_batches(8)) == set(IDS[:2])
    found = first_batches(12, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    assert set(found) == set(IDS) and found[IDS[2]] == []
    assert [each[0]["image_id"] for each in Trainer.build_test_loader(voc_cfg(), "voc_2007_test")] == list(IDS)
