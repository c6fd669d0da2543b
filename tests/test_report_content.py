"""What the report shows: matching, costs, tables, plots, pictures."""

import re

import numpy as np
import pytest
import torch
from data_sources import IMAGES, catalogs_as_before, write_yolo  # noqa: F401
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import tiny_cfg
from report_runs import write_run
from tiny_coco import registered_coco, write_images

from qmimic_d2.analysis import measure_cost
from qmimic_d2.config_files import changed
from qmimic_d2.report import Run, charts, collect_run, plots
from qmimic_d2.report.cost import Cost, alternating_medians, run_cost
from qmimic_d2.report.held_out import Histogram
from qmimic_d2.report.measure import measure, register_run_sources
from qmimic_d2.report.metrics import Metrics
from qmimic_d2.report.samples import (
    GROUND_TRUTH,
    Box,
    Sample,
    load_samples,
    match,
    predicted_boxes,
    read_detections,
)
from qmimic_d2.report.tables import (
    class_columns,
    class_names,
    held_out_columns,
    held_out_rows,
    result_columns,
    size_text,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data")) as name:
        yield name


@pytest.fixture(scope="module")
def complete(tmp_path_factory, dataset):
    return write_run(tmp_path_factory.mktemp("runs") / "student", dataset)


def box(x0, y0, x1, y1, category=0, score=None):
    return Box((x0, y0, x1, y1), category, f"class {category}", score)


# ----------------------------------------------------------------------------------------- matching


def test_match_needs_class_and_overlap():
    truth = [box(0, 0, 10, 10), box(20, 0, 30, 10, category=1)]
    found = [
        box(0, 0, 10, 5, score=0.9),  # IoU 0.5
        box(0, 0, 10, 10, score=0.8),  # better, but the first one took it
        box(20, 0, 30, 10, category=2, score=0.7),  # another class
        box(20, 0, 30, 4, category=1, score=0.6),  # IoU 0.4
    ]
    assert match(truth, found) == ([True, False], [True, False, False, False])


def test_match_takes_the_box_that_overlaps_most():
    truth = [box(0, 0, 10, 10), box(0, 0, 10, 8)]
    assert match(truth, [box(0, 0, 10, 8, score=0.9)]) == ([False, True], [True])
    assert match(truth, [box(0, 0, 10, 8, score=0.9), box(0, 0, 10, 8, score=0.8)]) == ([True, True], [True, True])


def test_match_of_nothing():
    assert match([], []) == ([], [])
    assert match([box(0, 0, 1, 1)], []) == ([False], [])
    assert match([], [box(0, 0, 1, 1, score=0.9)]) == ([], [False])


# ------------------------------------------------------------------------------------------ samples


def test_samples_are_the_first_images_with_their_truth(dataset):
    samples, size = load_samples(dataset, 2)
    assert size == 4 and [sample.image_id for sample in samples] == [10, 11]
    assert samples[0].pixels.shape == (64, 64, 3)
    assert samples[1].truth == [Box((8.0, 8.0, 32.0, 40.0), 1, "class 5")]
    assert load_samples(dataset, 0) == ([], 4)


def test_crowds_are_left_out_and_unknown_classes_are_numbers(tmp_path):
    (path,) = write_images(tmp_path, 1)
    annotation = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 7}
    crowd = {**annotation, "iscrowd": 1}
    image = {"image_id": "a", "file_name": path, "annotations": [annotation, crowd]}
    DatasetCatalog.register("crowded", lambda: [image])
    try:
        (sample,), _ = load_samples("crowded", 3)
        assert sample.truth == [Box((1.0, 2.0, 3.0, 4.0), 7, "7")]
    finally:
        DatasetCatalog.remove("crowded")
        MetadataCatalog.remove("crowded")


def test_detections_of_an_evaluation(complete, dataset):
    samples, _ = load_samples(dataset, 4)
    path = str(complete / "inference" / "coco_instances_results.json")
    found = read_detections(path, dataset, samples, 0.5)
    assert [len(each) for each in found] == [1, 1, 1, 0]
    assert found[0] == [Box((9.0, 9.0, 33.0, 41.0), 0, "class 3", 0.9)]
    assert found[2][0].category == 2
    both = read_detections(path, dataset, samples, 0.0)[2]
    assert [each.score for each in both] == [0.7, 0.2]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"image_id": 10}]'])
def test_detections_of_another_make(tmp_path, dataset, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError):
        read_detections(str(tmp_path / "x.json"), dataset, load_samples(dataset, 1)[0], 0.5)


def test_detections_of_a_predictor(dataset):
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 6.0, 6.0], [2.0, 2.0, 7.0, 7.0]])
    instances = Instances((8, 8), pred_boxes=Boxes(boxes))
    instances.scores, instances.pred_classes = torch.tensor([0.5, 0.9, 0.4]), torch.tensor([0, 2, 1])
    found = predicted_boxes(instances, dataset, 0.45)
    assert [(each.label, each.corners[0]) for each in found] == [("class 9", 1.0), ("class 3", 0.0)]
    assert predicted_boxes(instances[:0], dataset, 0.0) == []


# --------------------------------------------------------------------------------------------- cost


class Clock:
    """Stands still but for what the calls add."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_medians_of_calls_in_turn():
    clock, order = Clock(), []

    def call(name, seconds):
        def run(round_number):
            order.append((round_number, name))
            clock.now += seconds(round_number)

        return run

    # the first call takes 0.001 and, every third round, 1.0 seconds; those that warm up do not count
    first = call("a", lambda number: 1.0 if number % 3 == 0 or number < 0 else 0.001)
    medians = alternating_medians([first, call("b", lambda number: 0.002)], clock)
    assert medians == pytest.approx([0.001, 0.002])
    assert [name for _, name in order[:4]] == ["b", "a", "a", "b"], "each round begins with another one"
    assert order[0][0] == -3


def test_slow_calls_are_repeated_less():
    clock, rounds = Clock(), []

    def call(round_number):
        rounds.append(round_number)
        clock.now += 10.0

    assert alternating_medians([call], clock) == [10.0]
    assert rounds == [-3, -2, -1, 0, 1, 2, 3, 4]
    assert alternating_medians([], clock) == []


def test_cost_of_a_config_without_weights():
    cfg = tiny_cfg("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 128)
    cost = run_cost(cfg, None, "", [])
    assert (cost.height, cost.width) == (96, 96) and cost.weight_bytes is None and cost.file_bytes is None
    expected = measure_cost(cfg, 96, 96)
    assert (cost.parameters, cost.flops) == (expected.parameters, expected.flops)
    image = np.zeros((48, 96, 3), np.uint8)  # 96 x 192 would be too long, so 64 x 128
    cost = run_cost(cfg, None, "", [image])
    assert (cost.height, cost.width) == (64, 128)
    cost = run_cost(tiny_cfg("INPUT.MIN_SIZE_TEST", 0), None, "", [image])
    assert (cost.height, cost.width) == (48, 96)


# ------------------------------------------------------------------------------------------ measure


def test_measure_reads_detections_and_times_images(complete, dataset):
    run = collect_run(str(complete))
    measured = measure([run], num_images=3, threads=1, score_threshold=0.5)
    assert run.notes == [] and measured.dataset_sizes == {dataset: 4}
    (cost,) = measured.costs
    assert cost.seconds > 0.0 and cost.threads == 1
    assert cost.file_bytes == (complete / "model_final.pth").stat().st_size
    assert 4 * cost.parameters < cost.weight_bytes < cost.file_bytes
    (rows,) = measured.samples.values()
    assert [row.name for row in rows] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [picture.summary for picture in rows[0].pictures] == ["1 object", "1 of 1 found, 0 wrong"]
    kinds = [[kind for _, kind in row.pictures[1].boxes] for row in rows]
    assert kinds == [["right"], ["missed", "wrong"], ["missed", "wrong"]]


def test_measure_without_latency_and_without_images(complete):
    run = collect_run(str(complete))
    assert measure([run], num_images=2, threads=0, score_threshold=0.5).costs[0].seconds is None
    measured = measure([run], num_images=0, threads=1, score_threshold=0.5)
    assert measured.samples == {} and measured.costs[0].seconds is None and run.notes == []


def test_without_detections_the_detector_runs(tmp_path, dataset):
    folder = write_run(tmp_path / "student", dataset)
    path = folder / "inference" / "coco_instances_results.json"
    path.write_text("{")
    run = collect_run(str(folder))
    (broken,) = measure([run], num_images=1, threads=0, score_threshold=0.0).samples.values()
    path.unlink()
    (absent,) = measure([collect_run(str(folder))], num_images=1, threads=0, score_threshold=0.0).samples.values()
    assert len(absent[0].pictures[1].boxes) > 1
    assert absent[0].pictures[1].boxes == broken[0].pictures[1].boxes


def test_what_cannot_be_measured_is_named(tmp_path, dataset):
    bare = collect_run(str(write_run(tmp_path / "bare", dataset, is_finished=False)))
    elsewhere = collect_run(str(write_run(tmp_path / "elsewhere", "no_such_set")))
    folder = write_run(tmp_path / "misfit", dataset)
    run = collect_run(str(folder))
    run.cfg = tiny_cfg("MODEL.VGG.WIDTH_DIVISOR", 16, "DATASETS.TEST", (dataset,), "MODEL.WEIGHTS", run.weights)
    unknown = collect_run(str(write_run(tmp_path / "unknown", dataset)))
    unknown.cfg = tiny_cfg("MODEL.BACKBONE.NAME", "build_my_own")
    empty = Run("empty", "empty")
    for each in (bare, elsewhere, run, unknown):
        each.notes.clear()
    measured = measure([bare, elsewhere, run, unknown, empty], num_images=1, threads=1, score_threshold=0.5)
    assert bare.notes == [
        "no pictures: there are no detections of an evaluation, and there is no detector to run"
    ]
    (note,) = elsewhere.notes
    what = "no pictures and no time of an image: the data set 'no_such_set' cannot be read here"
    assert note == f"{what} (nobody has registered it)"
    (note,) = run.notes
    assert note.startswith("no time of an image: the detector cannot be loaded (ValueError: model_final.pth")
    assert "\n" not in note
    assert [note.partition(":")[0] for note in unknown.notes] == ["no time of an image", "no parameters and FLOPs"]
    assert [cost is None for cost in measured.costs] == [False, False, False, True, True]
    assert [picture.number for picture in measured.samples[dataset][0].pictures] == [GROUND_TRUTH, 2, 3]


def test_data_that_a_config_names_are_opened_when_asked(tmp_path):
    entry = {"NAME": "mine", "FORMAT": "yolo", "PATH": str(write_yolo(tmp_path / "yolo")), "SPLIT": "val"}
    run = collect_run(str(write_run(tmp_path / "run", "mine")))
    run.cfg = changed(run.cfg, "DATASETS.SOURCES", [{**entry, "CLASSES": ["cat", "dog"]}])
    run.notes.clear()
    assert measure([run], num_images=6, threads=0, score_threshold=0.5).samples == {}
    (note,) = run.notes
    assert note.endswith("cannot be read here (its files are named by the run's config; --sources opens them)")
    register_run_sources([run, Run("empty", "empty")])
    samples = measure([run], num_images=6, threads=0, score_threshold=0.5).samples["mine"]
    assert len(samples) == len(IMAGES["val"]) and samples[0].truth[0].label in ("cat", "dog")


# ------------------------------------------------------------------------------------------- tables


def shown(columns):
    return {column.heading: column.texts for column in columns}


def test_result_columns():
    metrics = Metrics({"qmimic/match_ratio": {0: 0.5, 20: 0.75}})
    runs = [Run("a", "a", figures={"AP": 12.345, "AP50": 50.0}), Run("b", "b", metrics=metrics)]
    cost = Cost(592400, 87654321, 128, 128, weight_bytes=2370000, file_bytes=999, seconds=0.0047, threads=2)
    columns = result_columns(runs, [cost, None])
    assert shown(columns) == {
        "AP": ["12.3", "–"],
        "AP50": ["50.0", "–"],
        "parameters": ["592 k", "–"],
        "FLOPs": ["87.7 M", "–"],
        "weights": ["2.37 MB", "–"],
        "checkpoint": ["999 B", "–"],
        "CPU ms, 2 threads": ["4.7", "–"],
        "match": ["–", "62.5 %"],
    }
    assert columns[0].values == [12.345, None]
    assert "128 × 128" in columns[3].hint
    assert result_columns([Run("a", "a")], [None]) == []
    assert shown(result_columns([Run("a", "a")], [Cost(900, 1000, 8, 8)])) == {"parameters": ["900"], "FLOPs": ["1 k"]}
    assert size_text(1500) == "1.5 kB" and size_text(2.5e9) == "2.5 GB"
    assert size_text(999_600) == "1 MB" and size_text(999_400) == "999 kB"


def test_class_columns():
    runs = [Run("a", "a", figures={"AP": 1.0, "AP-x": 10.0, "AP-y": 20.0}), Run("b", "b", figures={"AP-z": 30.0})]
    assert class_names(runs) == ["x", "y", "z"]
    assert shown(class_columns(runs)) == {"a": ["10.0", "20.0", "–"], "b": ["–", "–", "30.0"]}
    assert class_names([Run("a", "a")]) == []


def test_held_out_columns(complete):
    runs = [Run("a", "a"), collect_run(str(complete))]
    assert held_out_rows(runs) == [(1, "conv5")]
    columns = shown(held_out_columns(runs))
    assert columns["match"] == ["75.0 %"] and columns["cosine"] == ["0.875"] and columns["zero, teacher"] == ["40.0 %"]
    assert "relative error" not in columns
    assert held_out_rows(runs[:1]) == [] and held_out_columns(runs[:1]) == []


# -------------------------------------------------------------------------------------------- plots


def test_charts_of_a_student(complete):
    runs = [collect_run(str(complete)), Run("bare", "bare")]
    assert [chart.title for chart in charts.training_charts(runs)] == ["Detection loss", "Mimic loss"]
    match_ratio, *others = charts.agreement_charts(runs)
    assert match_ratio.alt == "Match ratio over iterations: student ends at 73.9 %." and match_ratio.numbers == [0]
    assert [chart.title for chart in others] == [
        "Match ratio, not both 0",
        "Gradient share on the feature map",
        "Gradient share on the backbone",
        "Angle between the gradients",
    ]
    runs[1].metrics = Metrics({"bbox/AP": {20: 1.0, 40: 2.0}})
    (ap,) = [chart for chart in charts.training_charts(runs) if chart.title == "AP"]
    assert ap.alt == "AP over iterations: bare ends at 2." and ap.numbers == [1]
    assert charts.training_charts([Run("bare", "bare")]) == charts.agreement_charts([Run("bare", "bare")]) == []


def test_charts_of_size():
    runs = [Run("a", "a", figures={"AP": 50.0}), Run("b", "b", figures={"AP": 60.0}), Run("c", "c")]
    costs = [Cost(1000, 5000, 8, 8), Cost(100000, 6000, 8, 8), Cost(1, 1, 8, 8, seconds=0.001)]
    by_parameters, by_flops = charts.size_charts(runs, costs)
    assert by_parameters.alt == "AP against Parameters. a: AP 50.0 at 1,000; b: AP 60.0 at 1e+05."
    assert by_flops.numbers == [0, 1]
    assert charts.size_charts(runs, [None, None, None]) == []


def test_charts_of_codes(complete):
    run = collect_run(str(complete))
    (chart,) = charts.histogram_charts([Run("a", "a"), run])
    assert chart.numbers == [1]
    assert chart.alt == (
        "Histogram of 3 codes of student, conv5: zero are 40.0 % of the teacher's entries and 50.0 % of the student's."
    )
    run.held_out.histograms["conv5"] = Histogram([0.0, 1.0], [0, 0], [1, 1])
    assert charts.histogram_charts([run]) == []


def test_a_plot_is_one_element_with_text_and_the_pages_colours():
    svg = plots.lines("mine", [(0, {0: 1.0, 12000: 100.0}), (8, {0: 2.0})], "loss", logarithmic=True)
    assert svg.startswith("<svg viewBox=") and svg.rstrip().endswith("</svg>")
    assert ">iteration</text>" in svg and ">loss</text>" in svg and ">10 k</text>" in svg
    assert "var(--s0)" in svg and "var(--s1)" in svg and "currentColor" in svg
    assert not re.search(r"#01[0-9a-f]{4}", svg), "a stand-in for a colour is left"
    assert "<style" not in svg and "<metadata" not in svg and "http" not in svg.split(">", 1)[1]
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and all(each.startswith("mine-") for each in ids)
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)
    assert used and {first or second for first, second in used} <= set(ids)


def test_names_in_plots_are_escaped():
    svg = plots.lines("mine", [(0, {0: 1.0})], "<b> & $x$")
    assert "&lt;b&gt; &amp; $x$" in svg


def test_plots_stay_small():
    series = {iteration: float(iteration % 7) for iteration in range(0, 100000, 20)}
    assert len(plots.lines("mine", [(0, series)], "loss")) < 40000


def test_shares_in_percent():
    svg = plots.lines("mine", [(0, {0: 0.0, 20: 1.0})], "share", is_share=True)
    assert re.search(r">\d+ %</text>", svg)


def test_histogram_with_many_codes_and_an_unused_one():
    codes = [0.25 * index for index in range(40)]
    svg = plots.histogram("mine", Histogram(codes, [10] * 39 + [0], [5] * 40))
    assert ">teacher</text>" in svg and ">student</text>" in svg and ">1.25</text>" in svg
    assert "nan" not in svg.lower()


def test_every_run_looks_different():
    assert len({plots.lines("mine", [(number, {0: 0.0, 20: 1.0})], "loss") for number in range(35)}) == 35


# ----------------------------------------------------------------------------------------- pictures


def test_picture_of_detections():
    sample = Sample(1, "x.jpg", np.zeros((64, 64, 3), np.uint8), [box(0, 0, 10, 10), box(20, 20, 30, 30)])
    sample.add_detections(4, [box(0, 0, 10, 10, score=0.9), box(50, 50, 60, 60, score=0.8)])
    truth, picture = sample.pictures
    assert truth.number == GROUND_TRUTH and truth.summary == "2 objects"
    assert picture.number == 4 and picture.summary == "1 of 2 found, 1 wrong"
    assert [kind for _, kind in picture.boxes] == ["missed", "right", "wrong"]


def test_large_images_are_made_smaller():
    sample = Sample(1, "x.jpg", np.zeros((300, 1024, 3), np.uint8), [])
    assert (sample.width, sample.height) == (1024, 300), "boxes keep their pixels"
    assert sample.uri.startswith("data:image/jpeg;base64,") and len(sample.uri) < 5000
    assert sample.pictures[0].number == GROUND_TRUTH and sample.pictures[0].summary == "0 objects"


