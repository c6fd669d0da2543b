"""WIDER FACE as Detectron2 gets it: the annotation file, the images' sizes in their cache, and the dicts."""

import json
import logging
import os
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode
from PIL import Image

from miniature_lib.wider_face import format_annotations
from qmimic_d2.data import load_wider_face, register_wider_face
from qmimic_d2.data.wider_face import index as wider_face_index
from qmimic_d2.data.wider_face.annotations import WiderFaceRecord, parse_annotations
from qmimic_d2.evaluation import WiderFaceEvaluator

FIRST, SECOND, EMPTY = "0--Parade/0_Parade_a_1.jpg", "0--Parade/0_Parade_a_2.jpg", "1--Riot/1_Riot_b_3.jpg"
# x y w h blur expression illumination invalid occlusion pose; images are 64 x 48
TEXT = f"""{FIRST}
2
10 20 30 8 0 1 0 0 2 1 
1 2 3 4 2 0 1 1 0 0 
{EMPTY}
0
0 0 0 0 0 0 0 0 0 0 
{SECOND}
4
60 -3 10 20 0 0 0 0 0 0 
5 5 0 9 1 0 0 0 0 0 
64 10 5 5 0 0 0 0 0 0 
0 0 64 48 0 0 0 0 0 0 
"""  # noqa: W291  (the official files have blanks at the end of lines)


@pytest.fixture
def root(tmp_path):
    """DETECTRON2_DATASETS with a validation set of three images, one of which has no face."""
    folder = tmp_path / "widerface"
    (folder / "wider_face_split").mkdir(parents=True)
    (folder / "wider_face_split" / "wider_face_val_bbx_gt.txt").write_text(TEXT)
    for image in (FIRST, SECOND, EMPTY):
        path = folder / "WIDER_val" / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (90, 120, 30)).save(path)
    return tmp_path


@pytest.fixture
def paths(root):
    """Annotation file and image folder."""
    folder = root / "widerface"
    return folder / "wider_face_split" / "wider_face_val_bbx_gt.txt", folder / "WIDER_val" / "images"


@pytest.fixture
def catalogs(monkeypatch):
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})


@pytest.fixture
def opened(monkeypatch):
    """Names of the images whose size was read from the file."""
    names = []
    read = wider_face_index.image_size

    def counting(path):
        names.append(os.path.basename(path))
        return read(path)

    monkeypatch.setattr(wider_face_index, "image_size", counting)
    return names


def load(paths):
    return load_wider_face(*map(str, paths))


# --------------------------------------------------------------------------------- the text


def test_records():
    records = parse_annotations(TEXT, "file")
    assert [record.image for record in records] == [FIRST, EMPTY, SECOND]
    assert records[0].faces == ((10, 20, 30, 8, 0, 1, 0, 0, 2, 1), (1, 2, 3, 4, 2, 0, 1, 1, 0, 0))
    assert records[1].faces == () and len(records[2].faces) == 4
    assert format_annotations(records) == TEXT


def test_an_image_without_a_face_without_the_line_of_zeros():
    text = f"{EMPTY}\r\n0\r\n{FIRST}\r\n1\r\n1 2 3 4 0 0 0 0 0 0\r\n\r\n{SECOND}\r\n0\r\n"
    faces = [record.faces for record in parse_annotations(text, "file")]
    assert faces == [(), ((1, 2, 3, 4, 0, 0, 0, 0, 0, 0),), ()]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "file holds no record"),
        ("\n\n", "file holds no record"),
        ("3\n", "file, line 1: '3' is no image"),
        ("0--Parade/a.txt\n", "file, line 1: '0--Parade/a.txt' is no image"),
        ("0--Parade/b/a.jpg\n", "file, line 1: '0--Parade/b/a.jpg' is no image"),
        ("e/a.jpg\n", "file ends behind 'e/a.jpg': the number of its faces is missing"),
        ("e/a.jpg\ntwo\n", "file, line 2: 'two' is not the number of faces in 'e/a.jpg'"),
        ("e/a.jpg\n-1\n", "file, line 2: '-1' is not the number"),
        ("\ne/a.jpg\n1\n1 2 3 4 0 0 0 0 0\n", "file, line 4: '1 2 3 4 0 0 0 0 0' is no face of 'e/a.jpg'.* 10 whole"),
        ("e/a.jpg\n1\n1 2 3 4 0 0 0 0 0 0 0\n", "file, line 3: .* is no face"),
        ("e/a.jpg\n1\n1 2 3 4.5 0 0 0 0 0 0\n", "file, line 3: .* is no face"),
        ("e/a.jpg\n2\n1 2 3 4 0 0 0 0 0 0\n", "file ends within the faces of 'e/a.jpg'"),
        ("e/a.jpg\n2\n1 2 3 4 0 0 0 0 0 0\ne/b.jpg\n", "file, line 4: 'e/b.jpg' is no face of 'e/a.jpg'"),
        ("e/a.jpg\n0\n1 2 3 4 0 0 0 0 0 0\n", "file, line 3: 'e/a.jpg' is said to have 0 faces, and here is one"),
        ("e/a.jpg\n0\n0 0 0\n", "file, line 3: '0 0 0' is no face"),
        ("e/a.jpg\n0\n" * 2, "file, line 3: 'e/a.jpg' has a record already, in line 1"),
    ],
)
def test_malformed_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse_annotations(text, "file")


def test_malformed_file(paths):
    paths[0].write_text(TEXT.replace("1 2 3 4 2", "1 2 3 2"))
    with pytest.raises(ValueError, match="wider_face_val_bbx_gt.txt, line 4: .* is no face"):
        load(paths)
    paths[0].write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="wider_face_val_bbx_gt.txt is no text file"):
        load(paths)


# ---------------------------------------------------------------------------------- the dicts


def test_dicts(paths, caplog):
    first, empty, second = load(paths)
    assert first["file_name"] == str(paths[1] / FIRST) and first["image_id"] == FIRST[: -len(".jpg")]
    assert (first["height"], first["width"]) == (48, 64)
    assert first["annotations"][0] == {
        **{"bbox": [10.0, 20.0, 30.0, 8.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0},
        **{"blur": 0, "expression": 1, "illumination": 0, "invalid": 0, "occlusion": 2, "pose": 1},
    }
    # invalid
    assert first["annotations"][1]["iscrowd"] == 1 and first["annotations"][1]["invalid"] == 1
    assert first["annotations"][1]["bbox"] == [1.0, 2.0, 3.0, 4.0] and first["annotations"][1]["blur"] == 2
    assert empty["annotations"] == []
    clipped, without_width, outside, whole = second["annotations"]
    assert (clipped["bbox"], clipped["iscrowd"]) == ([60.0, 0.0, 4.0, 17.0], 0)
    assert (without_width["bbox"], without_width["iscrowd"]) == ([5.0, 5.0, 0.0, 9.0], 1)
    assert (outside["bbox"], outside["iscrowd"]) == ([64.0, 10.0, 5.0, 5.0], 1)
    assert (whole["bbox"], whole["iscrowd"]) == ([0.0, 0.0, 64.0, 48.0], 0)
    assert "1 boxes reach over the border of their image and were clipped; 1 lie wholly outside" in caplog.text


def test_what_detectron2_trains_on(root, catalogs):
    register_wider_face(str(root))
    assert len(get_detection_dataset_dicts("wider_face_val", filter_empty=False)) == 3
    used = get_detection_dataset_dicts("wider_face_val", filter_empty=True)
    assert [Path(each["file_name"]).name for each in used] == [Path(FIRST).name, Path(SECOND).name]
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (48,), "none"
    mapped = [DatasetMapper(cfg, is_train=True)(each) for each in used]
    assert mapped[0]["instances"].gt_boxes.tensor.tolist() == [[10.0, 20.0, 40.0, 28.0]]
    assert mapped[1]["instances"].gt_boxes.tensor.tolist() == [[60.0, 0.0, 64.0, 17.0], [0.0, 0.0, 64.0, 48.0]]


def test_registration(root, catalogs, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    register_wider_face()
    folder = str(root / "widerface")
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"wider_face_{split}")
        assert metadata.thing_classes == ["face"] and metadata.evaluator_type == "wider_face"
        assert metadata.image_root == os.path.join(folder, f"WIDER_{split}", "images")
    assert MetadataCatalog.get("wider_face_val").ground_truth_dir == os.path.join(folder, "eval_tools", "ground_truth")
    assert len(DatasetCatalog.get("wider_face_val")) == 3
    with pytest.raises(FileNotFoundError, match="eval_tools.ground_truth"):
        WiderFaceEvaluator("wider_face_val")
    with pytest.raises(ValueError, match="'wider_face_train', whose metadata has no ground_truth_dir"):
        WiderFaceEvaluator("wider_face_train")
    # a name that is taken is left alone
    register_wider_face(str(root / "elsewhere"))
    assert MetadataCatalog.get("wider_face_val").image_root.startswith(folder)


# ---------------------------------------------------------------------------------- missing files


def test_missing_folder(root, catalogs):
    register_wider_face(str(root))
    with pytest.raises(FileNotFoundError) as caught:
        DatasetCatalog.get("wider_face_train")
    message = str(caught.value)
    assert str(root / "widerface" / "wider_face_split" / "wider_face_train_bbx_gt.txt") in message
    assert f"Unpack wider_face_split.zip into {root / 'widerface'}" in message and "DETECTRON2_DATASETS" in message
    (root / "widerface" / "wider_face_split" / "wider_face_train_bbx_gt.txt").write_text(TEXT)
    with pytest.raises(FileNotFoundError, match=f"Unpack WIDER_train.zip into {root / 'widerface'}"):
        DatasetCatalog.get("wider_face_train")


def test_missing_image(paths):
    (paths[1] / SECOND).unlink()
    with pytest.raises(FileNotFoundError, match=f"record of {SECOND}, and there is no image {paths[1] / SECOND}"):
        load(paths)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_image_that_cannot_be_read(paths, content):
    (paths[1] / SECOND).write_bytes(content)
    with pytest.raises(ValueError, match=f"{paths[1] / SECOND} is no image that can be read"):
        load(paths)


def test_size_is_that_of_the_image_as_detectron2_reads_it(paths):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (64, 48)).save(paths[1] / FIRST, exif=exif)
    record = load(paths)[0]
    assert (record["height"], record["width"]) == (64, 48)
    cfg = get_cfg()
    assert DatasetMapper(cfg, is_train=False)(record)["image"].shape[0] == 3  # it compares the sizes


# ------------------------------------------------------------------------------------- the cache


def test_images_are_opened_once(paths, opened):
    expected = load(paths)
    assert len(opened) == 3
    assert load(paths) == expected and len(opened) == 3
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [paths[0].name, paths[0].name + ".index"]


def test_annotations_that_changed_are_read_again(paths, opened):
    load(paths)
    state = paths[0].stat()
    paths[0].write_text(TEXT.replace("10 20 30 8", "11 20 30 8"))
    os.utime(paths[0], ns=(state.st_atime_ns, state.st_mtime_ns))  # neither length nor date tells
    assert load(paths)[0]["annotations"][0]["bbox"] == [11.0, 20.0, 30.0, 8.0]
    assert len(opened) == 6


def test_an_image_that_changed_is_opened_again(paths, opened):
    load(paths)
    Image.new("RGB", (32, 16)).save(paths[1] / EMPTY)
    assert [(each["width"], each["height"]) for each in load(paths)] == [(64, 48), (32, 16), (64, 48)]
    assert opened[3:] == [Path(EMPTY).name]
    load(paths)
    assert len(opened) == 4
    (paths[1] / EMPTY).unlink()
    with pytest.raises(FileNotFoundError, match=EMPTY):
        load(paths)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"64", b"65"),
        lambda data: data.replace(b'"format": 1', b'"format": 0'),
        lambda data: b"\x80\x04pickle?\n" + data,
        lambda data: b"[]\n[]\n",
    ],
    ids=["empty", "cut", "changed", "older", "binary", "other"],
)
def test_a_damaged_cache_is_made_again(paths, opened, damage):
    expected = load(paths)
    cache = Path(f"{paths[0]}.index")
    good = cache.read_bytes()
    cache.write_bytes(damage(good))
    assert cache.read_bytes() != good
    assert load(paths) == expected and len(opened) == 6
    assert cache.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_done_without(paths, opened, monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise PermissionError("read-only")

    expected = load(paths)
    os.remove(f"{paths[0]}.index")
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", failing)
        with caplog.at_level(logging.WARNING):
            assert load(paths) == expected
    assert "cannot be written: read-only" in caplog.text and not os.path.exists(f"{paths[0]}.index")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", failing)
        assert load(paths) == expected
    assert os.listdir(paths[0].parent) == [paths[0].name]


def test_the_cache_is_json_that_anybody_may_read(paths):
    load(paths)
    cache = Path(f"{paths[0]}.index")
    head, rows = map(json.loads, cache.read_text().splitlines())
    assert sorted(head) == ["annotations_sha256", "format", "images_sha256"]
    assert rows[0][0] == FIRST and rows[0][3:5] == [64, 48]
    assert cache.stat().st_mode & 0o777 == 0o644


def test_a_record_is_a_value():
    assert WiderFaceRecord("e/a.jpg", ()) == WiderFaceRecord("e/a.jpg", ())
