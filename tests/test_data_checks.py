"""The check of all data sets of a run: their classes, dicts of users' own functions, what evaluation sees."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from tiny_coco import write_images
from tiny_training import registered_data, write_coco

from qmimic_d2.data.checks import DataSetError
from qmimic_d2.data.loading import build_coco_evaluator, class_names, load_dataset_dicts
from qmimic_d2.engine.average_precision import APEvaluation
from qmimic_d2.engine.checks.data import ModelClasses, check_datasets, class_difference

ROOT = Path(__file__).resolve().parent.parent
TRAIN, OTHER, OWN = "tiny_classes_train", "tiny_classes_other", "tiny_own_function"


def config(train=(), test=(), *options):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.merge_from_list(list(options))
    return cfg


def refusal(*args, **options):
    with pytest.raises(DataSetError) as caught:
        check_datasets(*args, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- classes


@pytest.fixture
def sets(tmp_path):
    """A training set with the classes "class 0" to "class 2"; writes the names of another one's categories."""
    with registered_data(tmp_path / "train", TRAIN):
        folder = tmp_path / "other"

        def write(names, ids=None):
            write_coco(folder / "annotations.json", folder / "images", 3)
            content = json.loads((folder / "annotations.json").read_text())
            ids = ids or list(range(1, len(names) + 1))
            content["categories"] = [{"id": number, "name": name} for number, name in zip(ids, names)]
            for index, annotation in enumerate(content["annotations"]):
                annotation["category_id"] = ids[index % len(ids)]
            (folder / "annotations.json").write_text(json.dumps(content))

        register_coco_instances(OTHER, {}, str(folder / "annotations.json"), str(folder / "images"))
        yield write
        DatasetCatalog.remove(OTHER)
        MetadataCatalog.remove(OTHER)


NAMES = ["class 0", "class 1", "class 2"]
DIFFERENT = {
    "reversed ids": (NAMES, [3, 2, 1], "the order differs"),
    "another order": (["class 1", "class 0", "class 2"], None, "the order differs"),
    "missing at the end": (NAMES[:2], None, "they differ"),
    "missing at the beginning": (NAMES[1:], None, "they differ"),
    "one more": ([*NAMES, "class 3"], None, "they differ"),
    "another name": (["class 0", "klass 1", "class 2"], None, "they differ"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_classes_that_differ(sets, kind, key):
    names, ids, words = DIFFERENT[kind]
    sets(names, ids)
    is_train = key == "DATASETS.TRAIN"
    message = refusal(config((TRAIN, OTHER), ()) if is_train else config((TRAIN,), (OTHER,)))
    shown = [name for _, name in sorted(zip(ids or range(len(names)), names))]
    assert f"'{TRAIN}' of DATASETS.TRAIN has the classes {NAMES}" in message
    assert f"'{OTHER}' of {key} has {shown}" in message and words in message


@pytest.mark.parametrize("kind", DIFFERENT)
def test_an_evaluation_knows_the_training_sets_classes(sets, kind):
    names, ids, _ = DIFFERENT[kind]
    sets(names, ids)
    assert f"{NAMES}" in refusal(config((TRAIN,), (OTHER,)), eval_only=True)
    check_datasets(config(("nothing",), (OTHER,)), eval_only=True)


def test_a_single_evaluation_compares_classes_too(sets, tmp_path):
    """As of ``calibrate --eval`` and ``export --verify``."""
    sets(NAMES, [3, 2, 1])
    cfg = config((TRAIN,), (), "DATALOADER.NUM_WORKERS", 0)
    with pytest.raises(DataSetError, match="the order differs"):
        APEvaluation(cfg, OTHER)
    assert APEvaluation(cfg, TRAIN).num_images == 9
    cfg.DATASETS.TRAIN = ("nothing",)
    assert APEvaluation(cfg, OTHER).num_images == 3


def test_other_ids_of_the_same_order_do_no_harm(sets):
    sets(NAMES, [4, 7, 9])
    check_datasets(config((TRAIN, OTHER), (OTHER, TRAIN)), ModelClasses("K", 3))


def test_a_model_of_more_classes_than_the_test_set_has(sets):
    sets(NAMES)
    message = refusal(config((), (OTHER,)), ModelClasses("MODEL.ROI_HEADS.NUM_CLASSES", 4), eval_only=True)
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 4" in message and "has 3 classes" in message and "Set it to 3" in message
    message = refusal(config((), (OTHER,)), ModelClasses("MODEL.ROI_HEADS.NUM_CLASSES", 2), eval_only=True)
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 2" in message


def test_registered_names_and_those_of_the_file(sets):
    sets(NAMES)
    MetadataCatalog.get(OTHER).thing_classes = NAMES[::-1]
    assert f"its registration has the classes {NAMES[::-1]}" in refusal(config((OTHER,)))


def test_classes_without_loading(sets):
    sets(NAMES, [3, 2, 1])
    assert class_names(OTHER) == NAMES[::-1]
    assert class_names("digits_det_val") == [str(digit) for digit in range(10)]
    with pytest.raises(KeyError, match="'nothing' is not registered"):
        class_names("nothing")
    assert class_difference("a", NAMES, "b", NAMES) == ""


def test_every_data_set_is_in_the_summary(sets):
    sets(["a", "b", "c"])
    path = MetadataCatalog.get(OTHER).json_file
    content = json.loads(Path(path).read_text())
    content["annotations"][0]["bbox"] = None
    Path(path).write_text(json.dumps(content))
    path = MetadataCatalog.get(TRAIN).json_file
    Path(path).write_text("{")
    message = refusal(config((TRAIN,), (OTHER,)))
    start = f"DATASETS.TRAIN names '{TRAIN}' ({path}), which cannot be used: "
    assert f"{start}the annotation file {path} is not in COCO's format" in message
    assert f"DATASETS.TEST names '{OTHER}'" in message and "four finite numbers" in message


# ------------------------------------------------------------------------------ dicts of a function of the user's


@pytest.fixture
def own(tmp_path):
    """A registered function; its dicts are the list that is yielded, two images with one object each."""
    paths = write_images(tmp_path / "images", 2)
    dicts = [
        {
            "file_name": path,
            "image_id": index,
            "width": 64,
            "height": 64,
            "annotations": [{"bbox": [4.0, 6.0, 30.0, 40.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": index}],
        }
        for index, path in enumerate(paths)
    ]
    DatasetCatalog.register(OWN, lambda: dicts)
    MetadataCatalog.get(OWN).set(thing_classes=["a", "b"], evaluator_type="coco")
    yield dicts
    DatasetCatalog.remove(OWN)
    MetadataCatalog.remove(OWN)


def test_good_dicts(own, caplog):
    own[0]["annotations"][0]["bbox"] = np.array([4.0, 6.0, 30.0, 40.0])
    check_datasets(config((OWN,), (OWN,)), ModelClasses("K", 2))
    assert caplog.text == ""


def of_object(**values):
    def change(dicts):
        dicts[0]["annotations"][0].update(values)

    return change


WRONG_DICTS = {
    "nothing": (lambda d: d.clear(), "gives no image"),
    "no dict": (lambda d: d.append(3), "no dicts of an image"),
    "no file_name": (lambda d: d[0].pop("file_name"), "no file_name"),
    "missing file": (lambda d: d[0].update(file_name="gone.jpg"), "'gone.jpg'"),
    "another size": (lambda d: d[0].update(width=63), "64 x 64 pixels, annotated as 63 x 64"),
    "no size": (lambda d: d[0].pop("width"), "no usable height and width"),
    "no image_id": (lambda d: d[0].pop("image_id"), "no image_id"),
    "image_id twice": (lambda d: d[0].update(image_id=1), "image ids occur more than once"),
    "no annotations": (lambda d: d[0].pop("annotations"), "no list of annotations"),
    "no box": (of_object(bbox=None), "four finite numbers"),
    "texts in a box": (of_object(bbox=["1", "2", "30", "40"]), "four finite numbers"),
    "no bbox_mode": (of_object(bbox_mode=None), "no bbox_mode"),
    "relative": (of_object(bbox_mode=BoxMode.XYXY_REL), "no bbox_mode that Detectron2 can convert"),
    "corners as sizes": (of_object(bbox=[30.0, 40.0, 4.0, 6.0]), "negative width or height"),
    "a label too high": (of_object(category_id=2), "a class that is not declared"),
    "a label that is a name": (of_object(category_id="a"), "a class that is not declared"),
    "no category_id": (lambda d: d[0]["annotations"][0].pop("category_id"), "a class that is not declared"),
    "rotated": (of_object(bbox=[9, 9, 4, 4], bbox_mode=BoxMode.XYWHA_ABS), "five finite numbers"),
}


@pytest.mark.parametrize("kind", WRONG_DICTS)
def test_wrong_dicts(own, kind):
    change, words = WRONG_DICTS[kind]
    change(own)
    message = refusal(config((OWN,), (OWN,)))
    assert f"DATASETS.TRAIN names '{OWN}'" in message and words in message


def test_dicts_that_are_only_trained_on(own):
    for image in own:
        del image["image_id"], image["width"], image["height"]
    check_datasets(config((OWN,)))


def test_a_crowd_may_have_any_box(own):
    """As WIDER FACE's invalid faces, one of which has a negative width."""
    own[0]["annotations"].append(
        {"bbox": [9.0, 9.0, -5.0, 4.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1}
    )
    check_datasets(config((OWN,), (OWN,)))


def test_a_function_that_fails(own):
    DatasetCatalog.remove(OWN)
    DatasetCatalog.register(OWN, lambda: {}["annotations"])
    assert "its function fails: KeyError: 'annotations'" in refusal(config((OWN,)))


def test_dicts_of_an_evaluation_need_names(own):
    MetadataCatalog.remove(OWN)
    MetadataCatalog.get(OWN).evaluator_type = "coco"
    check_datasets(config((OWN,)))
    assert "no thing_classes" in refusal(config((), (OWN,)))


# -------------------------------------------------------------------------------------------- what evaluation sees


def test_an_evaluation_sees_corrected_boxes(own, tmp_path):
    """Also in the same process and in the same OUTPUT_DIR; and nothing of it stays in the metadata."""
    found = []
    for box in ([4.0, 6.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0]):
        own[0]["annotations"][0]["bbox"] = box
        evaluator = build_coco_evaluator(OWN, str(tmp_path / "inference"))
        found.append(evaluator._coco_api.loadAnns([1])[0]["bbox"])
        assert "json_file" not in MetadataCatalog.get(OWN).as_dict()
    assert found == [[4.0, 6.0, 26.0, 34.0], [1.0, 2.0, 2.0, 2.0]]


def test_a_file_of_an_earlier_evaluation_is_not_used(own, tmp_path):
    (tmp_path / f"{OWN}_coco_format.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    assert build_coco_evaluator(OWN, str(tmp_path))._coco_api.getImgIds() == [0, 1]


def test_keypoints_are_not_moved_by_an_evaluation(own, tmp_path):
    own[0]["annotations"][0]["keypoints"] = [3.5, 4.5, 2]
    for _ in range(2):
        build_coco_evaluator(OWN, str(tmp_path))
    assert own[0]["annotations"][0]["keypoints"] == [3.5, 4.5, 2]


def test_catalogs_are_as_before(sets):
    sets(NAMES)
    path = Path(MetadataCatalog.get(OTHER).json_file)
    path.write_text(path.read_text().replace('"info": {}, ', ""))
    function = DatasetCatalog[OTHER]
    assert len(load_dataset_dicts(OTHER)) == 3
    build_coco_evaluator(OTHER, "")
    assert DatasetCatalog[OTHER] is function and MetadataCatalog.get(OTHER).json_file == str(path)


def test_the_benchmark_runs(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("data_check", ROOT / "benchmarks" / "data_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        report = module.measure(num_annotations=40, per_image=4)
    finally:
        for name in ("data_check_whole", "data_check_repaired"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    assert (report["annotations"], report["images"]) == (40, 10)
    assert set(report["seconds"]) == {
        f"{what}, {kind}" for what in ("check", "Detectron2's loading") for kind in ("whole", "repaired")
    }
