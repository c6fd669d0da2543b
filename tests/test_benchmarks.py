"""The benchmark runs and gives what it says; how long anything takes is not looked at."""

import importlib.util
import json
import platform
import sys
from pathlib import Path
from unittest import mock

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from qmimic_d2.data import DigitsSpec, prepare_digits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
DATASET = "digits_det_benchmark_test"
NUM_STEP_ROWS = 6 + 4  # actions and ratios


@pytest.fixture(scope="module")
def step_cost():
    path, modules = list(sys.path), set(sys.modules)
    spec = importlib.util.spec_from_file_location("step_cost", ROOT / "benchmarks" / "step_cost.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    assert "step_cost" in modules or "step_cost" not in sys.modules


@pytest.fixture(scope="module")
def opts(tmp_path_factory):
    """KEY VALUE pairs that make the demo's configs train on four images, two at a time."""
    spec = DigitsSpec(DATASET, split="train", num_images=4)
    folder = Path(prepare_digits(spec, str(tmp_path_factory.mktemp("root"))))
    register_coco_instances(DATASET, {}, str(folder / "annotations.json"), str(folder / "images"))
    yield ["DATASETS.TRAIN", f"('{DATASET}',)", "SOLVER.IMS_PER_BATCH", "2", "MODEL.QMIMIC.DIAGNOSTICS.PERIOD", "2"]
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


@pytest.fixture
def actions(step_cost, opts, tmp_path):
    return step_cost.build_steps(str(tmp_path), opts)


def check_spread(row, name="median"):
    assert 0.0 < row["10th"] <= row[name] <= row["90th"]


def test_steps_and_their_ratios(step_cost, opts):
    rows = step_cost.measure_steps(2, opts)
    assert len(rows) == NUM_STEP_ROWS
    assert [row["what"] for row in rows[-4:]] == ["c / (a + b)", "d / (a + b)", "q / a", "w / a"]
    assert all(row["what"].endswith(", ms") for row in rows[:-4])
    for row in rows:
        check_spread(row)


def test_peak_memory_of_the_steps(step_cost, opts):
    rows = step_cost.measure_memory(1, opts)
    peaks = {row["what"][:3]: row["median"] for row in rows}
    assert len(rows) == NUM_STEP_ROWS
    assert all(row["what"].endswith(", MiB") for row in rows[:-4])
    # the mimic keeps more than the student alone, and a forward without gradient keeps least
    assert peaks["(b)"] < peaks["(a)"] < peaks["(c)"]
    assert rows[-4]["median"] == pytest.approx(peaks["(c)"] / (peaks["(a)"] + peaks["(b)"]))


def test_steps_are_training_steps_of_the_demo(actions):
    steps, period = actions
    assert list(steps) == ["a", "b", "q", "c", "d", "w"] and period == 2
    names = {name: type(steps[name].model).__name__ for name in "aqcd"}
    assert names == {"a": "GeneralizedRCNN", "q": "QuantRCNN", "c": "QuantMimicRCNN", "d": "QuantMimicRCNN"}
    for name in "aqcd":
        before = [parameter.detach().clone() for parameter in steps[name].model.parameters()]
        steps[name]()
        steps[name]()
        after = list(steps[name].model.parameters())
        assert all(not torch.equal(old, new) for old, new in zip(before, after) if new.requires_grad)
        assert steps[name].storage.iter == 2
    for name in "cd":
        measured = steps[name].storage.history("qmimic/match_ratio").values()
        assert [iteration for _, iteration in measured] == [0]


def test_students_begin_alike_and_the_teacher_has_the_batches_statistics(actions):
    steps, _ = actions
    states = {name: steps[name].model.state_dict() for name in "aqcd"}
    for name in "qcd":
        assert all(torch.equal(states["a"][key], states[name][key]) for key in states["a"])
    teacher = steps["b"]._model
    assert not teacher.training
    assert teacher.backbone.conv1.conv1.norm.running_var.ne(1.0).any()


def test_quantizers(step_cost):
    rows = step_cost.measure_quantizer(1, shapes=((2, 3, 200, 900),))
    whats = [row["what"] for row in rows]
    assert whats[:3] == ["copy", "fake_quantize", "Uniform"] and len(whats) == len(set(whats)) == 7
    by_what = dict(zip(whats, rows))
    assert by_what["copy"]["x copy"] == by_what["fake_quantize"]["x fake_quantize"] == 1.0
    for row in rows:
        assert row["map"] == "2 x 3 x 200 x 900"
        check_spread(row, "x fake_quantize")


def test_pooling(step_cost):
    rows = step_cost.measure_pooling(1, maps=((16, 13),), num_rois=8)
    assert [(row["bins"], row["sides, cells"]) for row in rows] == [
        ("7 x 7", "2 to 6.5"),
        ("7 x 7", "2 to 6"),
        ("4 x 4", "2 to 6.5"),
        ("4 x 4", "2 to 6"),
    ]
    for row in rows:
        assert (row["map"], row["cells"]) == ("16 x 13", 208)
        check_spread(row, "sparse / kernel")


def test_random_rois_lie_inside_the_map_and_in_order(step_cost):
    rois = step_cost.random_rois(30, 8, (20, 10), (2.0, 5.0), torch.Generator().manual_seed(0))
    assert rois.shape == (30, 5)
    assert torch.equal(rois[:, 0], rois[:, 0].sort().values) and rois[:, 0].unique().tolist() == list(range(8))
    sides = rois[:, 3:] - rois[:, 1:3]
    assert (sides >= 2.0 - 1e-5).all() and (sides <= 5.0 + 1e-5).all()
    assert (rois[:, 1:] >= 0).all()
    assert (rois[:, 3] <= 10 + 1e-5).all() and (rois[:, 4] <= 20 + 1e-5).all()


def test_forward_backward_gives_the_gradient_anew(step_cost):
    seen = []

    def square(x):
        seen.append(x)
        return x * x

    action = step_cost.forward_backward(square, torch.tensor([1.0, 3.0]))
    action()
    gradient = seen[0].grad.clone()
    action()
    assert torch.equal(seen[0].grad, gradient) and seen[0] is seen[-1]


def test_actions_alternate_and_each_begins_a_round(step_cost):
    order = []
    actions = {name: lambda name=name: order.append(name) for name in "xyz"}
    times = step_cost.time_alternately(actions, repeats=2, calls=4)
    rounds = ["xyz", "xyz", "yzx", "zxy", "xyz"]  # one to warm up, then a repeat
    assert "".join(order) == "".join(rounds + rounds[1:])
    assert {name: len(values) for name, values in times.items()} == {"x": 2, "y": 2, "z": 2}


def test_peak_is_what_was_held_at_a_time(step_cost):
    megabyte = 2**20
    before = [torch.zeros(megabyte, dtype=torch.uint8)]

    def action():
        before.clear()  # freeing what was there before does not make room
        first = torch.zeros(3 * megabyte, dtype=torch.uint8)
        del first
        second = torch.zeros(2 * megabyte, dtype=torch.uint8)
        third = torch.zeros(2 * megabyte, dtype=torch.uint8)
        del second, third

    for _ in range(2):
        assert step_cost.peak_bytes(action) == pytest.approx(4 * megabyte, abs=1000)
    assert step_cost.peak_bytes(lambda: None) == 0


def test_peak_counts_gradients_once_though_the_step_before_left_some(step_cost, actions):
    step = actions[0]["a"]
    step()
    step()
    first = step_cost.peak_bytes(step)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    step()
    assert step_cost.peak_bytes(step) == pytest.approx(first, rel=0.05)


def test_table_shows_three_digits(step_cost):
    lines = step_cost.table([{"what": "one", "ms": 1.0, "n": 3}, {"what": "two", "ms": 123.456, "n": 40}]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["what", "ms", "n"]
    assert cells[2:] == [["one", "1.00", "3"], ["two", "123", "40"]]


def test_machine_names_versions_and_no_host(step_cost):
    facts = step_cost.machine()
    assert facts["PyTorch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert platform.node() not in json.dumps(facts) and "/" not in facts["processor"]


def test_command_prints_tables_and_writes_json(step_cost, opts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(cv2, "setNumThreads", lambda number: None)
    monkeypatch.setattr(step_cost, "logging", mock.Mock())  # levels stay as they are for other tests
    file = tmp_path / "new" / "cost.json"
    quick = ["--repeats", "1", "--threads", "1", "--only", "steps", "memory"]
    step_cost.main([*quick, "--json", str(file), "--opts", *opts])
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert set(results) == {"machine", "repeats", "opts", "steps", "memory"}
    assert results["machine"]["threads"] == torch.get_num_threads() and results["repeats"] == 1
    assert len(results["steps"]) == len(results["memory"]) == NUM_STEP_ROWS
    assert printed.count("c / (a + b)") == 2 and str(tmp_path) not in printed


def test_unwritable_json_is_refused_before_measuring(step_cost, tmp_path):
    with pytest.raises(ValueError, match="--json"):
        step_cost.main(["--json", str(tmp_path)])


def test_last_results_are_in_the_readme(step_cost):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert "python benchmarks/step_cost.py" in text
    for label in [*step_cost.LABELS.values(), "c / (a + b)", "fake_quantize", "sparse / kernel"]:
        assert label in text


def loaded(name):
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_summary_of_start_ups():
    rows = loaded("startup").summary({"stock": [(2.0, 3.0), (4.0, 5.0)], "this": [(3.0, 4.0), (4.0, 6.0)]})
    assert rows[0] == {"name": "stock", "cpu": 3.0, "wall": 4.0, "ratio": 1.0}
    assert rows[1] == {"name": "this", "cpu": 3.5, "wall": 5.0, "ratio": 1.25}


def test_files_of_a_training_step():
    files = loaded("step_files").files_of_a_step("Digits/student_vgg_1_16_qmimic.yaml")
    assert {"modeling/backbone/vgg.py", "modeling/mimic/mimic.py", "modeling/mimic/teacher.py"} <= set(files)
    assert len(files) <= 12
