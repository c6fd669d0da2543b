"""WIDER FACE's protocol, its files, its evaluator and its command, against a slow reference and by hand."""

import json
import math
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from scipy.io import loadmat, savemat
from wider_face_reference import (
    random_ground_truth,
    random_predictions,
    reference_evaluation,
    save_ground_truth,
)

from qmimic_d2.__main__ import main
from qmimic_d2.engine import build_evaluator
from qmimic_d2.evaluation import (
    SUBSETS,
    WiderFaceEvaluator,
    WiderFaceGroundTruth,
    evaluate_predictions,
    load_ground_truth,
    read_predictions,
    write_predictions,
)
from qmimic_d2.evaluation.wider_face.predictions import as_written
from qmimic_d2.evaluation.wider_face.protocol import average_precision, pairwise_iou

IMAGE = "0--Parade/0_Parade_1"
OTHER = "1--Riot/1_Riot_2"
# Ten pixels wide and high, far from each other.
FACES = np.array([[0.0, 0.0, 9.0, 9.0], [40.0, 0.0, 9.0, 9.0], [80.0, 0.0, 9.0, 9.0]])
NOWHERE = [200.0, 200.0, 9.0, 9.0]


def ground_truth_of(boxes, kept=None):
    """One image with these boxes, of which all, or those of ``kept``, are in every subset."""
    kept = np.ones(len(boxes), dtype=bool) if kept is None else np.array(kept, dtype=bool)
    return WiderFaceGroundTruth(
        {IMAGE: np.asarray(boxes, dtype=np.float64).reshape(-1, 4)}, {subset: {IMAGE: kept} for subset in SUBSETS}
    )


def ap(ground_truth, *detections):
    """The AP of boxes with scores in IMAGE."""
    results = evaluate_predictions(ground_truth, {IMAGE: np.array(detections, dtype=np.float64).reshape(-1, 5)})
    assert len({str(value) for value in results.values()}) == 1
    return results["hard"]


# ------------------------------------------------------------------------------------ the protocol


def test_both_corners_belong_to_a_box():
    detections = np.array([[5.0, 0.0, 9.0, 9.0], [10.0, 0.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    # 5 x 10 of 10 x 10 pixels are shared; none; one; and the box of one pixel lies in the other
    expected = [50 / 150, 0.0, 1 / 199, 1 / 100]
    assert pairwise_iou(detections, FACES[:1])[:, 0] == pytest.approx(expected, abs=1e-15)
    assert pairwise_iou(np.zeros((0, 4)), FACES).shape == (0, 3)
    # the official files have a box of width -2, and a division by an area of 0 must not reach the result
    without_area = np.array([[0.0, 0.0, -1.0, 3.0], [0.0, 0.0, -2.0, 9.0]])
    assert pairwise_iou(without_area[:1], without_area).tolist() == [[0.0, 0.0]]


def test_average_precision_by_hand():
    # envelope: 1 up to recall 0.5, then 0.75 up to 0.75
    assert average_precision(np.array([0.25, 0.5, 0.5, 0.75]), np.array([0.5, 1.0, 0.6, 0.75])) == pytest.approx(0.6875)
    assert average_precision(np.zeros(3), np.zeros(3)) == 0.0


def test_hits_and_a_wrong_detection():
    # precision 1 at recall 1/3, 2/3 at recall 2/3, and the third face is never found
    expected = 1 / 3 + (2 / 3) * (1 / 3)
    assert ap(ground_truth_of(FACES), [*FACES[0], 0.9], [*NOWHERE, 0.5], [*FACES[1], 0.1]) == pytest.approx(expected)


def test_the_order_of_detections_is_that_of_their_scores():
    forward = [[*FACES[0], 0.9], [*NOWHERE, 0.5], [*FACES[1], 0.1]]
    assert ap(ground_truth_of(FACES), *forward[::-1]) == ap(ground_truth_of(FACES), *forward)


def test_a_second_detection_of_a_face_is_wrong():
    # precision 1 at recall 1/2, 2/3 at recall 1
    detections = [[*FACES[0], 0.9], [*FACES[0], 0.8], [*FACES[1], 0.1]]
    assert ap(ground_truth_of(FACES[:2]), *detections) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_detections_of_ignored_faces_do_not_count():
    detections = [[*FACES[0], 0.9], [*FACES[1], 0.8], [*FACES[1], 0.7], [*FACES[2], 0.1]]
    assert ap(ground_truth_of(FACES, [1, 0, 1]), *detections) == pytest.approx(1.0)
    # what misses the ignored face as well is wrong: 1 at recall 1/2, 2/3 at recall 1
    detections[1][:4] = NOWHERE
    detections.pop(2)
    assert ap(ground_truth_of(FACES, [1, 0, 1]), *detections) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_the_face_of_the_greatest_iou_is_taken_though_it_is_found_already():
    near = [[0.0, 0.0, 9.0, 9.0], [2.0, 0.0, 9.0, 9.0]]
    # both overlap the second face by 8 / 12 and more, and both are nearer to the first
    detections = [[0.0, 0.0, 9.0, 9.0, 0.9], [0.0, 0.0, 9.0, 10.0, 0.1]]
    assert ap(ground_truth_of(near), *detections) == pytest.approx(0.5)


def test_an_iou_of_exactly_one_half_is_a_hit():
    # 10 x 10 and 10 x 5 pixels
    half = [0.0, 0.0, 9.0, 4.0]
    assert ap(ground_truth_of(FACES[:1]), [*half, 0.9], [*NOWHERE, 0.1]) == pytest.approx(1.0)
    assert ap(ground_truth_of(FACES[:1]), [0.0, 0.0, 9.0, 3.9, 0.9], [*NOWHERE, 0.1]) == 0.0


def test_scores_between_two_thresholds_fall_together():
    # 0.5005 and 0.5001 both pass first at the threshold 0.5: the precision there is 2 / 3, not 1 and then 1 / 2
    detections = [[*FACES[0], 1.0], [*FACES[1], 0.5005], [*NOWHERE, 0.5001], [*NOWHERE, 0.0]]
    assert ap(ground_truth_of(FACES[:2]), *detections) == pytest.approx(0.5 + 0.5 * 2 / 3)
    detections[1][4] = 0.502
    assert ap(ground_truth_of(FACES[:2]), *detections) == pytest.approx(1.0)


def test_any_range_of_scores():
    logits = [[*FACES[0], 7.5], [*NOWHERE, -2.0], [*FACES[1], -30.0]]
    scores = [[*FACES[0], 1.0], [*NOWHERE, 28 / 37.5], [*FACES[1], 0.0]]
    assert ap(ground_truth_of(FACES), *logits) == pytest.approx(ap(ground_truth_of(FACES), *scores))


def test_equal_scores_cannot_be_mapped(caplog):
    assert ap(ground_truth_of(FACES), *([*face, 0.7] for face in FACES)) == 0.0
    assert "All scores are equal" in caplog.text


def test_images_without_boxes_or_detections():
    kept = {IMAGE: np.ones(1, dtype=bool), OTHER: np.zeros(0, dtype=bool)}
    ground_truth = WiderFaceGroundTruth(
        {IMAGE: FACES[:1], OTHER: np.zeros((0, 4))}, {subset: kept for subset in SUBSETS}
    )
    wrong = np.array([[*NOWHERE, 0.95], [*NOWHERE, 0.0]])
    found = np.array([[*FACES[0], 0.9]])
    # where there is no box, not even a wrong detection counts; it does where there is one
    assert evaluate_predictions(ground_truth, {IMAGE: found, OTHER: wrong})["easy"] == pytest.approx(1.0)
    assert evaluate_predictions(ground_truth, {OTHER: wrong})["easy"] == 0.0
    assert evaluate_predictions(ground_truth, {})["easy"] == 0.0
    ground_truth.boxes[OTHER] = np.zeros((1, 4))
    kept[OTHER] = np.zeros(1, dtype=bool)
    assert evaluate_predictions(ground_truth, {IMAGE: found, OTHER: wrong})["easy"] == pytest.approx(0.5)
    assert evaluate_predictions(ground_truth, {IMAGE: np.zeros((0, 5))})["easy"] == 0.0


def test_a_subset_without_a_face():
    assert math.isnan(ap(ground_truth_of(FACES, [0, 0, 0]), [*FACES[0], 0.9], [*NOWHERE, 0.1]))


def test_an_image_outside_of_the_ground_truth_changes_nothing():
    detections = np.array([[*FACES[0], 0.9], [*NOWHERE, 0.5], [*FACES[1], 0.1]])
    alone = evaluate_predictions(ground_truth_of(FACES), {IMAGE: detections})
    other = np.array([[*NOWHERE, 99.0]])
    assert evaluate_predictions(ground_truth_of(FACES), {IMAGE: detections, "2--x/y": other}) == alone


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_slow_reference(seed):
    ground_truth = random_ground_truth(num_images=40, num_faces=500, num_events=4, seed=seed)
    predictions = random_predictions(ground_truth, per_image=30, seed=seed + 100)
    for image_id in list(predictions)[::9]:
        del predictions[image_id]
    expected = reference_evaluation(ground_truth, predictions)
    assert all(0.02 < value < 0.9 for value in expected.values()) and len(set(expected.values())) == 3
    assert evaluate_predictions(ground_truth, predictions) == pytest.approx(expected, abs=1e-9)


# -------------------------------------------------------------------------- ground-truth files


@pytest.fixture(scope="module")
def truth():
    return random_ground_truth(num_images=12, num_faces=80, num_events=3, seed=5)


@pytest.fixture
def folder(tmp_path, truth):
    return Path(save_ground_truth(tmp_path / "ground_truth", truth))


def test_ground_truth_is_read_as_it_was_written(folder, truth):
    loaded = load_ground_truth(str(folder))
    assert list(loaded.boxes) == list(truth.boxes) and loaded.events == ["0--Event", "1--Event", "2--Event"]
    for image_id, boxes in truth.boxes.items():
        assert np.array_equal(loaded.boxes[image_id], boxes) and loaded.boxes[image_id].dtype == np.float64
        for subset in SUBSETS:
            assert np.array_equal(loaded.kept[subset][image_id], truth.kept[subset][image_id])
    assert any(not kept.any() for kept in loaded.kept["easy"].values())


def test_missing_mat_files(folder):
    (folder / "wider_easy_val.mat").unlink()
    with pytest.raises(FileNotFoundError, match="wider_easy_val.mat is not there.*eval_tools.zip"):
        load_ground_truth(str(folder))
    with pytest.raises(FileNotFoundError, match="wider_face_val.mat, wider_easy_val.mat, .* are not there"):
        load_ground_truth(str(folder / "nowhere"))


def change_mat(path, **values):
    content = {key: value for key, value in loadmat(path).items() if not key.startswith("_")}
    content.update(values)
    savemat(path, {key: value for key, value in content.items() if value is not None})


def cells(*values):
    column = np.empty((len(values), 1), dtype=object)
    for index, value in enumerate(values):
        column[index, 0] = value
    return column


def test_broken_mat_files(folder, truth):
    hard = folder / "wider_hard_val.mat"
    good = hard.read_bytes()
    hard.write_bytes(b"\x00" * 200)
    with pytest.raises(ValueError, match="wider_hard_val.mat is no MATLAB file"):
        load_ground_truth(str(folder))
    # the version and the byte order stand behind the text
    hard.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x00" * 64)
    with pytest.raises(ValueError, match="MATLAB 7.3 file; take the one in ground_truth"):
        load_ground_truth(str(folder))
    hard.write_bytes(good)
    change_mat(hard, gt_list=None)
    with pytest.raises(ValueError, match="not the structure.*gt_list"):
        load_ground_truth(str(folder))
    hard.write_bytes(good)
    change_mat(hard, gt_list=np.zeros((3, 1)))
    with pytest.raises(ValueError, match="not the structure.*gt_list"):
        load_ground_truth(str(folder))


def test_mat_files_that_do_not_belong_together(folder, truth):
    medium = folder / "wider_medium_val.mat"
    good, content = medium.read_bytes(), loadmat(medium)
    other = random_ground_truth(num_images=12, num_faces=80, num_events=2)
    save_ground_truth(folder.parent / "other", other)
    medium.write_bytes((folder.parent / "other" / "wider_medium_val.mat").read_bytes())
    with pytest.raises(ValueError, match="wider_medium_val.mat lists other images"):
        load_ground_truth(str(folder))
    medium.write_bytes(good)
    numbers = content["gt_list"]
    numbers[1, 0][0, 0] = np.array([[len(list(truth.boxes.values())[4]) + 1]], dtype=np.uint8)
    change_mat(medium, gt_list=numbers)
    with pytest.raises(ValueError, match="gt_list of 1--Event/1_Event_4 names a face that is not among"):
        load_ground_truth(str(folder))
    numbers[1, 0] = cells(np.zeros((0, 1)))
    change_mat(medium, gt_list=numbers)
    with pytest.raises(ValueError, match="gt_list of 1--Event has 1 cells for 4 images"):
        load_ground_truth(str(folder))
    faces = folder / "wider_face_val.mat"
    boxes = loadmat(faces)["face_bbx_list"]
    boxes[0, 0][2, 0] = np.zeros((2, 3))
    change_mat(faces, face_bbx_list=boxes)
    with pytest.raises(ValueError, match=r"0--Event/0_Event_2 has the shape \(2, 3\)"):
        load_ground_truth(str(folder))


# --------------------------------------------------------------------------- files of detections


def test_detections_are_read_as_they_were_written(tmp_path, truth):
    predictions = {
        image_id: each.astype(np.float32) for image_id, each in random_predictions(truth, per_image=5).items()
    }
    empty = list(truth.boxes)[3]
    predictions[empty] = np.zeros((0, 5), dtype=np.float32)
    write_predictions(str(tmp_path / "out"), predictions)
    write_predictions(str(tmp_path / "out"), predictions)
    read = read_predictions(str(tmp_path / "out"), truth)
    assert list(read) == list(truth.boxes)
    for image_id, detections in predictions.items():
        assert np.array_equal(read[image_id], as_written(detections))
        assert np.array_equal(read[image_id].astype(np.float32), detections)
    assert (tmp_path / "out" / f"{empty}.txt").read_text() == f"{empty}.jpg\n0\n"
    assert not list(tmp_path.rglob("*.part"))


def test_the_format(tmp_path):
    write_predictions(str(tmp_path), {IMAGE: np.array([[1.0, 2.5, 30.0, 40.125, 0.9], [0, 0, 1, 1, 1e-7]])})
    text = (tmp_path / "0--Parade" / "0_Parade_1.txt").read_text()
    assert text == f"{IMAGE}.jpg\n2\n1.0 2.5 30.0 40.125 0.9\n0.0 0.0 1.0 1.0 1e-07\n"


def test_missing_predictions(tmp_path, truth, caplog):
    with pytest.raises(FileNotFoundError, match="no such folder.*folder for every event"):
        read_predictions(str(tmp_path / "nowhere"), truth)
    with pytest.raises(FileNotFoundError, match="0--Event/0_Event_0.txt"):
        read_predictions(str(tmp_path), truth)
    last = list(truth.boxes)[-1]
    write_predictions(str(tmp_path), {last: np.array([[*NOWHERE, 0.5]])})
    assert list(read_predictions(str(tmp_path), truth)) == [last]
    assert "11 of 12 images have no file" in caplog.text and "0--Event/0_Event_0" in caplog.text


def test_predictions_for_something_else(tmp_path, truth, caplog):
    predictions = {**random_predictions(truth, per_image=2), "2--Event/other": np.zeros((0, 5))}
    write_predictions(str(tmp_path), predictions)
    (tmp_path / "readme.txt").write_text("a file beside the events is no event")
    (tmp_path / "2--Event" / "notes.md").write_text("")
    assert list(read_predictions(str(tmp_path), truth)) == list(truth.boxes)
    assert "1 files in" in caplog.text and "2--Event/other.txt" in caplog.text
    (tmp_path / "9--Press_Conference").mkdir()
    with pytest.raises(ValueError, match=r"\['9--Press_Conference'\], which are no events of the ground truth"):
        read_predictions(str(tmp_path), truth)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "line 2: '' is not the number of detections"),
        (["name.jpg", "1 2 3 4 0.5"], "line 2: '1 2 3 4 0.5' is not the number"),
        (["name.jpg", "-1"], "line 2: '-1' is not the number"),
        (["name.jpg", "2", "1 2 3 4 0.5"], "line 2 says 2 detections, and 1 lines follow"),
        (["name.jpg", "0", "1 2 3 4 0.5"], "line 2 says 0 detections, and 1 lines follow"),
        (["name.jpg", "2", "1 2 3 4 0.5", "1 2 3 4"], "line 4: 4 columns; there should be 5: x y w h score"),
        (["name.jpg", "1", "1 2 3 4 0.5 6"], "line 3: 6 columns"),
        (["name.jpg", "2", "1 2 3 4 0.5", "1 2 3 x 0.5"], "line 4: '1 2 3 x 0.5' are not five numbers"),
        (["name.jpg", "1", "1 2 3 4 nan"], "line 3: '1 2 3 4 nan' are not five numbers"),
    ],
)
def test_malformed_files_of_detections(tmp_path, lines, message):
    ground_truth = ground_truth_of(FACES)
    path = tmp_path / f"{IMAGE}.txt"
    path.parent.mkdir()
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as caught:
        read_predictions(str(tmp_path), ground_truth)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_shares_of_the_images_size_are_no_pixels(tmp_path):
    write_predictions(str(tmp_path), {IMAGE: np.array([[0.1, 0.2, 0.3, 0.4, 0.9], [0.9, -0.1, 0.2, 1.1, 0.8]])})
    with pytest.raises(ValueError, match="of the 2 detections in .* shares of the image's size.*Write pixels"):
        read_predictions(str(tmp_path), ground_truth_of(FACES))
    write_predictions(str(tmp_path), {IMAGE: np.array([[0.1, 0.2, 0.3, 0.4, 0.9], [1.0, 1.0, 9.0, 9.0, 0.8]])})
    assert len(read_predictions(str(tmp_path), ground_truth_of(FACES))[IMAGE]) == 2


def test_files_of_other_tools(tmp_path):
    path = tmp_path / f"{IMAGE}.txt"
    path.parent.mkdir()
    path.write_text("whatever stands here\r\n 1 \r\n1\t2  3 4 .5 \r\n\r\n")
    read = read_predictions(str(tmp_path), ground_truth_of(FACES))
    assert read[IMAGE].tolist() == [[1.0, 2.0, 3.0, 4.0, 0.5]]


# ---------------------------------------------------------------------------------- the evaluator


@pytest.fixture
def dataset(folder):
    MetadataCatalog.get("tiny_wider").set(evaluator_type="wider_face", ground_truth_dir=str(folder))
    yield "tiny_wider"
    MetadataCatalog.remove("tiny_wider")


def process(evaluator, predictions):
    for image_id, rows in predictions.items():
        rows = torch.as_tensor(rows, dtype=torch.float32)
        instances = Instances((700, 1000))
        instances.pred_boxes = Boxes(torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1))
        instances.scores = rows[:, 4]
        instances.pred_classes = torch.zeros(len(rows), dtype=torch.long)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])


def test_evaluator(dataset, truth, tmp_path, caplog):
    predictions = {image_id: np.round(rows * 64) / 64 for image_id, rows in random_predictions(truth, 20).items()}
    evaluator = WiderFaceEvaluator(dataset, str(tmp_path / "out"))
    process(evaluator, predictions)
    results = evaluator.evaluate()
    expected = reference_evaluation(truth, predictions)
    assert list(results) == ["bbox"]
    assert results["bbox"] == pytest.approx(
        {"AP": 100 * np.mean(list(expected.values())), **{f"AP_{each}": 100 * expected[each] for each in SUBSETS}}
    )
    # the files that it wrote are what it scored
    read = read_predictions(str(tmp_path / "out" / dataset), truth)
    assert {f"AP_{k}": 100 * v for k, v in evaluate_predictions(truth, read).items()}.items() <= results["bbox"].items()
    assert not caplog.records
    evaluator.reset()
    assert evaluator.evaluate()["bbox"]["AP"] == 0.0
    assert "12 of 12 images of the ground truth were not predicted" in caplog.text


def test_evaluator_in_several_processes(dataset, truth, monkeypatch):
    predictions = random_predictions(truth, 10)
    whole, parts = WiderFaceEvaluator(dataset), [WiderFaceEvaluator(dataset) for _ in range(2)]
    process(whole, predictions)
    items = list(predictions.items())
    process(parts[0], dict(items[:5]))
    process(parts[1], dict(items[5:]))
    expected = whole.evaluate()
    sent = []
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda data, dst: sent.append(data) or [])
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: False)
    assert [part.evaluate() for part in parts] == [None, None]
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda data, dst: sent)
    monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda: True)
    assert parts[0].evaluate() == expected


@pytest.mark.parametrize(
    "image_id, message",
    [("9--Riot/x", "'9--Riot' .* is no event of the ground truth"), ("0--Event/x", "'0--Event/x' is no image of")],
)
def test_evaluator_with_images_of_another_set(dataset, image_id, message):
    evaluator = WiderFaceEvaluator(dataset)
    process(evaluator, {image_id: np.zeros((0, 5))})
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate()


def test_evaluator_without_ground_truth(dataset, folder):
    (folder / "wider_hard_val.mat").unlink()
    with pytest.raises(FileNotFoundError, match="wider_hard_val.mat is not there"):
        WiderFaceEvaluator(dataset)
    MetadataCatalog.remove(dataset)
    with pytest.raises(ValueError, match="'tiny_wider', whose metadata has no ground_truth_dir.*wider_face_val"):
        WiderFaceEvaluator(dataset)


def test_evaluator_is_chosen_by_metadata(dataset, tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    evaluator = build_evaluator(cfg, dataset)
    assert isinstance(evaluator, WiderFaceEvaluator)
    process(evaluator, {"0--Event/0_Event_0": np.zeros((0, 5))})
    evaluator.evaluate()
    assert (tmp_path / "output" / "inference" / dataset / "0--Event" / "0_Event_0.txt").is_file()


# ------------------------------------------------------------------------------------ the command


def status_of(*arguments):
    try:
        return main(["eval-widerface", *map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code


def test_command(folder, truth, tmp_path, capsys):
    predictions = random_predictions(truth, 10)
    write_predictions(str(tmp_path / "out"), predictions)
    file = tmp_path / "new" / "result.json"
    arguments = ["--predictions", tmp_path / "out", "--ground-truth", folder]
    assert status_of(*arguments, "--json", file) == 0
    expected = reference_evaluation(truth, {image_id: as_written(rows) for image_id, rows in predictions.items()})
    assert json.loads(file.read_text()) == pytest.approx(expected, abs=1e-9)
    output = capsys.readouterr().out
    assert "12 of 12 images predicted, 120 detections" in output
    assert all(f"{subset:<8}{expected[subset]:.4f}" in output for subset in SUBSETS)
    assert status_of(*arguments) == 0
    (tmp_path / "out" / "9--Riot").mkdir()
    assert status_of(*arguments) == 2
    assert "9--Riot" in capsys.readouterr().err
    assert status_of("--predictions", tmp_path / "out", "--ground-truth", tmp_path) == 2
    assert "wider_face_val.mat" in capsys.readouterr().err
    assert status_of(*arguments, "--json", tmp_path) == 2
    assert "--json" in capsys.readouterr().err and os.listdir(tmp_path)


# ---------------------------------------------------------------------------------- the benchmark


def test_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    module = runpy.run_path(str(Path(__file__).resolve().parent.parent / "benchmarks" / "wider_face_evaluation.py"))
    arguments = ["--images", "70", "--faces", "300", "--detections", "4", "--json", str(tmp_path / "out.json")]
    module["main"]([*arguments, "--reference"])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["difference"] < 1e-9 and set(report["AP"]) == set(SUBSETS)
    assert {"evaluate", "read the text files", "read the .mat files"} < set(report["seconds"])
    assert "largest difference from the reference" in capsys.readouterr().out
