"""What is open, what is run for it, and what is kept: with a stand-in for train_net.py that trains nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import evidence_lib.runs
from evidence_lib.matrix import load_matrix
from evidence_lib.records import Records, digest_of_weights, figures_of_run, versions
from evidence_lib.runs import DONE, FAILED, NOT_YET, OPEN, Runs
from qmimic_d2.analysis import measure_cost
from qmimic_d2.cli import task_runner
from qmimic_d2.cli.task_runner import run_tasks

MATRIX = """
revision: 1
seeds: {reporting: [101, 102]}
common: [MODEL.DEVICE, cpu]
expected: {seconds_per_iteration: 0.1, seconds_besides: 20}
variants:
  teacher: {label: "teacher", config: Digits/teacher_vgg_1_8.yaml, seed: 1}
  tuned: {label: "tuned", config: Digits/teacher_vgg_1_8_quant.yaml, seed: 1, weights: teacher}
  quantized: {label: "q", config: Digits/teacher_vgg_1_8_quant.yaml, seed: 1, weights: teacher, eval_only: true}
  scratch: {label: "from scratch", config: Digits/student_vgg_1_16_scratch.yaml}
  student: {label: "student", config: Digits/student_vgg_1_16_qmimic.yaml, teacher: teacher}
  deep: {label: "student of the tuned", config: Digits/student_vgg_1_16_qmimic.yaml, teacher: tuned}
  later: {label: "later", config: Digits/student_vgg_1_16_scratch.yaml, not_yet: "no such thing"}
groups:
  all: {title: "All", seeds: reporting, count: 2, variants: [teacher, quantized, scratch, student, later]}
  deep: {title: "Deep", seeds: reporting, count: 1, variants: [deep, tuned]}
"""

# Notes its arguments, fails where the file "failing" names its SEED, and leaves what a training leaves.
STAND_IN = """
import json, os, shutil, sys
arguments = sys.argv[1:]
pairs = arguments[arguments.index("--config-file") + 2 :]
if pairs[0] == "--eval-only":
    pairs = pairs[1:]
opts = dict(zip(pairs[::2], pairs[1::2]))
folder = opts["OUTPUT_DIR"]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([os.path.basename(folder), arguments]) + "\\n")
if os.path.exists("failing") and opts["SEED"] in open("failing").read().split():
    sys.exit("FloatingPointError: Loss became infinite or NaN at iteration=3!")
for key in ("MODEL.WEIGHTS", "MODEL.QMIMIC.TEACHER.WEIGHTS"):
    assert key not in opts or os.path.isfile(opts[key]), opts[key]
os.makedirs(folder + "/inference", exist_ok=True)
boxes = {"AP": 40.0 + int(opts["SEED"]) % 100, "AP50": 70.0, "AP75": None, "AP-0": 41.5}
json.dump({"results": {"bbox": boxes}}, open(folder + "/evaluation.json", "w"))
if "--eval-only" not in arguments:
    for name in ("model_0000199.pth", "model_final.pth"):
        shutil.copy("weights.pth", folder + "/" + name)
    open(folder + "/last_checkpoint", "w").write("model_final.pth")
"""


@pytest.fixture(scope="module")
def costs():
    return {}


@pytest.fixture(autouse=True)
def measured_once(costs, monkeypatch):
    """What a detector costs is measured once for all tests."""

    def measure(cfg, *size):
        if cfg.OUTPUT_DIR not in costs:  # as the YAML has it
            costs[cfg.OUTPUT_DIR] = measure_cost(cfg, *size)
        return costs[cfg.OUTPUT_DIR]

    monkeypatch.setattr(evidence_lib.runs, "measure_cost", measure)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(task_runner, "_POLL_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    (tmp_path / "train_net.py").write_text(STAND_IN)
    write_weights(1.0)


def write_weights(value):
    torch.save({"model": {"w": torch.tensor([value])}, "iteration": 7}, "weights.pth")


def open_runs(text=MATRIX, **arguments):
    Path("matrix.yaml").write_text(text)
    return Runs(load_matrix("matrix.yaml"), Records("records"), "out", **arguments)


def run_all(runs, *selection, **keywords):
    """Runs a selection; returns the names of what was run, in order, and forgets the calls."""
    tasks = runs.tasks(runs.matrix.runs(*selection, **keywords))
    run_tasks(tasks, "out", 1, {}, keeps_going=True)
    return [name for name, _ in calls()]


def calls():
    path = Path("calls.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def states(runs, *selection):
    return {run.name: runs.state(run) for run in runs.matrix.runs(*selection)}


@pytest.mark.slow
def test_everything_is_run_once_and_kept(capsys):
    runs = open_runs()
    assert set(states(runs, ["all"]).values()) == {OPEN, NOT_YET}
    assert run_all(runs, ["all"]) == ["teacher_1", "quantized_1"] + [
        f"{name}_{seed}" for seed in (101, 102) for name in ("scratch", "student")
    ]
    assert set(states(runs, ["all"]).values()) == {DONE, NOT_YET}
    assert states(runs, ["all"])["later_101"] == NOT_YET
    assert run_all(open_runs(), ["all"]) == []

    weights = digest_of_weights("weights.pth")
    record = json.loads(Path("records/runs/student/102.json").read_text())
    assert (record["variant"], record["seed"], record["status"]) == ("student", 102, DONE)
    assert record["config"] == "Digits/student_vgg_1_16_qmimic.yaml" and record["opts"] == ["MODEL.DEVICE", "cpu"]
    assert record["inputs"] == {"teacher": weights} and record["weights"] == weights
    assert (record["AP"], record["AP50"], record["AP75"]) == (42.0, 70.0, None)
    assert record["per_class"] == {"0": 41.5} and record["measures"] == {}
    assert (record["parameters"], record["iterations"]) == (254101, 800) and record["flops"] > 1e7
    assert record["versions"] == versions()
    quantized = json.loads(Path("records/runs/quantized/1.json").read_text())
    assert quantized["iterations"] == 0 and "weights" not in quantized
    # checkpoints are gone, except what others need
    assert sorted(path.as_posix() for path in Path("out").rglob("*.pth")) == ["out/teacher_1/model_final.pth"]
    assert not list(Path("out").rglob("last_checkpoint")) and not list(Path("out").rglob("inference"))


def test_commands_are_ordinary(capsys):
    run_tasks(open_runs(opts=["SOLVER.MAX_ITER", "9"]).tasks(open_runs().matrix.runs(["all"])), "out", 1, {})
    found = dict(calls())
    assert found["student_101"] == (
        "--config-file configs/Digits/student_vgg_1_16_qmimic.yaml OUTPUT_DIR out/student_101 SEED 101 "
        "MODEL.DEVICE cpu SOLVER.MAX_ITER 9 MODEL.QMIMIC.TEACHER.WEIGHTS out/teacher_1/model_final.pth"
    ).split()
    assert found["quantized_1"] == (
        "--config-file configs/Digits/teacher_vgg_1_8_quant.yaml --eval-only OUTPUT_DIR out/quantized_1 SEED 1 "
        "MODEL.DEVICE cpu SOLVER.MAX_ITER 9 MODEL.WEIGHTS out/teacher_1/model_final.pth"
    ).split()


def test_another_config_or_revision_is_open_again():
    run_all(open_runs(), ["all"])
    # the same settings, written in another way
    same = MATRIX.replace("teacher: teacher}", "teacher: teacher, opts: [SOLVER.MAX_ITER, 800]}")
    assert run_all(open_runs(same), ["all"]) == []
    other = MATRIX.replace("teacher: teacher}", "teacher: teacher, opts: [SOLVER.MAX_ITER, 801]}")
    assert states(open_runs(other), ["all"])["student_101"] == OPEN
    assert run_all(open_runs(other), ["all"]) == ["student_101", "student_102"]
    assert set(states(open_runs(MATRIX.replace("revision: 1", "revision: 2")), ["all"]).values()) == {OPEN, NOT_YET}


def test_records_of_another_machine_need_no_teacher_until_something_is_open():
    run_all(open_runs(), ["all"])
    shutil.rmtree("out")
    runs = open_runs()
    assert run_all(runs, ["all"]) == []
    Path("records/runs/student/101.json").unlink()
    # the teacher is trained again, comes out the same, and the other student's record holds
    assert run_all(runs, ["all"]) == ["teacher_1", "student_101"]


@pytest.mark.slow
def test_a_teacher_that_comes_out_otherwise_opens_what_is_below_it():
    run_all(open_runs(), ["all"])
    run_all(open_runs(), ["deep"])
    shutil.rmtree("out/teacher_1")
    Path("records/runs/student/101.json").unlink()
    write_weights(2.0)
    found = run_all(open_runs(), [], ["student", "deep", "scratch", "quantized"])
    assert found == ["teacher_1", "quantized_1", "student_101", "tuned_1", "deep_101", "student_102"]
    assert set(states(open_runs(), ["all", "deep"]).values()) == {DONE, NOT_YET}


def test_the_teacher_of_a_teacher_is_trained_only_where_it_is_needed():
    assert run_all(open_runs(), ["deep"]) == ["teacher_1", "tuned_1", "deep_101"]
    shutil.rmtree("out/teacher_1")
    Path("records/runs/deep/101.json").unlink()
    assert run_all(open_runs(), ["deep"]) == ["deep_101"]


def test_a_failed_run_is_recorded_and_left_alone_until_asked_for(capsys):
    Path("failing").write_text("102")
    runs = open_runs()
    assert len(run_all(runs, ["all"])) == 6
    assert states(runs, ["all"])["student_102"] == states(runs, ["all"])["scratch_102"] == FAILED
    record = json.loads(Path("records/runs/student/102.json").read_text())
    assert record["reason"] == "stopped with status 1: FloatingPointError: Loss became infinite or NaN at iteration=3!"
    assert "failed: student_102" in capsys.readouterr().out
    Path("failing").unlink()
    assert run_all(open_runs(), ["all"]) == []
    assert run_all(open_runs(retries_failed=True), ["all"]) == ["scratch_102", "student_102"]
    assert states(open_runs(), ["all"])["student_102"] == DONE


def test_a_failed_teacher_stops_its_students_alone(capsys):
    Path("failing").write_text("1")
    assert run_all(open_runs(), ["all"]) == ["teacher_1", "scratch_101", "scratch_102"]
    assert states(open_runs(), ["all"])["student_101"] == OPEN
    assert "not run: student_101 needs teacher_1" in capsys.readouterr().out
    Path("failing").unlink()
    # what needs the teacher has it tried again; its own failure is otherwise left alone
    assert run_all(open_runs(), ["all"], ["teacher"]) == []
    assert run_all(open_runs(), ["all"]) == ["teacher_1", "quantized_1", "student_101", "student_102"]


def test_an_interrupted_run_is_resumed_and_another_config_begins_in_an_empty_folder():
    runs = open_runs()
    (task,) = runs.tasks(runs.matrix.runs(["all"], ["scratch"], [101]))
    logs, old = Path("out/logs"), Path("out/scratch_101/metrics.json")
    logs.mkdir(parents=True)
    old.parent.mkdir()
    old.write_text('{"iteration": 399}\n')
    interrupted = {"digest": task.digest, "done": False, "seconds": 50.0}
    (logs / "scratch_101.json").write_text(json.dumps(interrupted))
    run_tasks([task], "out", 1, {})
    ((_, arguments),) = calls()
    assert arguments[0] == "--resume" and old.exists()
    assert json.loads(Path("records/runs/scratch/101.json").read_text())["seconds"] == pytest.approx(50.0, abs=9.0)

    runs = open_runs(opts=["SOLVER.MAX_ITER", "9"])
    run_tasks(runs.tasks(runs.matrix.runs(["all"], ["scratch"], [101])), "out", 1, {})
    ((_, arguments),) = calls()
    assert "--resume" not in arguments and not old.exists()


def test_expected_time():
    runs = open_runs()
    scratch, teacher = (runs.matrix.runs(["all"], [name])[0] for name in ("scratch", "teacher"))
    assert runs.expected_seconds(scratch) == pytest.approx(20 + 0.1 * 800)
    assert runs.expected_seconds(teacher) == pytest.approx(20 + 0.1 * 1500)
    for seed, seconds in ((101, 60.0), (102, 80.0)):
        record = {"variant": "scratch", "seed": seed, "status": DONE, "seconds": seconds}
        runs.records.write(record)
    assert open_runs().expected_seconds(scratch) == 70.0


def test_damaged_records_are_named():
    runs = open_runs()
    path = Path(runs.records.path("scratch", 101))
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"status": "good"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"scratch/101\.json is no .*remove it"):
            states(runs, ["all"])


def test_figures_of_a_run_folder(tmp_path):
    boxes = {"AP": 54.8367841, "AP50": 81.7, "AP75": 66.7, "APl": None, "AP-0": 66.0, "AP-1": None}
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": {"bbox": boxes}}))
    rows = [{"iteration": i, "qmimic/match_ratio": i / 100, "loss_cls": 1.0} for i in range(20)]
    rows += [{"iteration": 19, "qmimic/match_ratio": 0.5}]  # written again after --resume
    rows += [{"iteration": 5, "qmimic/weight": 20.0}, {"iteration": 6, "qmimic/weight": float("nan")}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    level = {"match_ratio": 0.25, "code_histogram": {"codes": [0.0], "student": [3], "teacher": [4]}}
    (tmp_path / "mimic.json").write_text(json.dumps({"levels": {"conv5": level}}))
    figures = figures_of_run(str(tmp_path))
    assert (figures["AP"], figures["AP50"], figures["per_class"]) == (54.8368, 81.7, {"0": 66.0, "1": None})
    measures = figures["measures"]
    assert measures["weight"] == {"early": 20.0, "late": 20.0, "last": 20.0, "mean": 20.0}
    assert measures["heldout_match_ratio"] == {"early": 0.25, "late": 0.25, "last": 0.25, "mean": 0.25}
    assert measures["match_ratio"] == pytest.approx(
        {"early": 0.045, "late": (1.26 + 0.5) / 10, "last": 0.5, "mean": (1.71 + 0.5) / 20}
    )
    assert set(measures) == {"weight", "match_ratio", "heldout_match_ratio"}

    (tmp_path / "mimic.json").write_text(json.dumps({"levels": {"p3": {"cosine": 0.5}, "p4": {"cosine": 0.25}}}))
    measures = figures_of_run(str(tmp_path))["measures"]
    assert (measures["heldout_cosine_p3"]["last"], measures["heldout_cosine_p4"]["last"]) == (0.5, 0.25)
    (tmp_path / "metrics.json").unlink()
    (tmp_path / "mimic.json").unlink()
    assert figures_of_run(str(tmp_path))["measures"] == {}


def test_a_run_without_a_result_is_no_success(tmp_path):
    with pytest.raises(FileNotFoundError):
        figures_of_run(str(tmp_path))
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": {"bbox": {"AP": None}}}))
    with pytest.raises(ValueError, match="has no AP"):
        figures_of_run(str(tmp_path))


def test_a_model_that_detects_nothing_has_an_ap_of_zero(tmp_path):
    boxes = {"AP": None, "AP50": None, "AP75": None, "APs": None}
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": {"bbox": boxes}}))
    (tmp_path / "inference").mkdir()
    detections = tmp_path / "inference" / "coco_instances_results.json"
    detections.write_text("[]")
    figures = figures_of_run(str(tmp_path))
    assert (figures["AP"], figures["AP50"], figures["AP75"], figures["per_class"]) == (0.0, 0.0, 0.0, {})
    detections.write_text('[{"image_id": 1}]')  # then it is the annotations that are missing
    with pytest.raises(ValueError, match="has no AP"):
        figures_of_run(str(tmp_path))


def test_digest_is_of_the_model_alone(tmp_path):
    torch.save({"model": {"w": torch.tensor([1.0])}, "optimizer": {"state": [1, 2]}}, tmp_path / "other.pth")
    assert digest_of_weights(str(tmp_path / "other.pth")) == digest_of_weights("weights.pth")
    before = digest_of_weights("weights.pth")
    write_weights(2.0)
    assert digest_of_weights("weights.pth") != before


def test_versions_outside_of_a_checkout(monkeypatch):
    assert versions()["torch"] == torch.__version__
    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] == ""
