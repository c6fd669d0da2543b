"""Reading run folders: metrics, held-out measurements, what is missing, what was trained."""

import json
import math

import pytest
import yaml
from helpers import ONE_STAGE
from report_runs import AP, CLASS_AP, HELD_OUT, metrics_lines, write_run
from tiny_coco import registered_coco

from qmimic_d2.report import Run, collect_run, collect_runs
from qmimic_d2.report.facts import describe_backbone, describe_run, split_common
from qmimic_d2.report.held_out import read_held_out
from qmimic_d2.report.metrics import last_mean, read_metrics, thinned


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data")) as name:
        yield name


@pytest.fixture(scope="module")
def complete(tmp_path_factory, dataset):
    return write_run(tmp_path_factory.mktemp("runs") / "student", dataset)


# -------------------------------------------------------------------------------------- metrics.json


def metrics_of(tmp_path, text):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    return read_metrics(str(path))


def test_losses_and_figures_by_iteration(tmp_path):
    metrics = metrics_of(tmp_path, metrics_lines(last=39))
    assert metrics.iterations == 40 and metrics.num_unreadable == 0
    assert metrics.detection_loss() == pytest.approx({19: 3 / 20, 39: 3 / 40})
    assert metrics.mimic_loss() == pytest.approx({19: 4 / 20, 39: 4 / 40})
    assert metrics.of("qmimic/grad_share_map") == {0: 0.6, 20: 0.6}
    assert metrics.of("qmimic/absent") == {} and metrics.of("qmimic/absent", ["p3"]) == {}


def test_a_run_without_teacher_has_no_mimic_loss(tmp_path):
    metrics = metrics_of(tmp_path, metrics_lines(is_mimic=False))
    assert metrics.mimic_loss() == {} and metrics.detection_loss()


def test_several_levels(tmp_path):
    rows = [
        {"iteration": 19, "total_loss": 3.0, "loss_cls": 1.0, "loss_mimic_p3": 0.5, "loss_mimic_p4": 1.5},
        {"iteration": 0, "qmimic/match_ratio_p3": 0.2, "qmimic/match_ratio_p4": 0.4},
        {"iteration": 0, "qmimic/match_ratio_nonzero_p3": 1.0},
        {"iteration": 20, "qmimic/match_ratio_p4": 0.5},
    ]
    metrics = metrics_of(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    assert metrics.detection_loss() == {19: 1.0} and metrics.mimic_loss() == {19: 2.0}
    assert metrics.of("qmimic/match_ratio", ["p3", "p4"]) == pytest.approx({0: 0.3, 20: 0.5})


@pytest.mark.parametrize("text, iterations", [("", 0), ('{"iter', 0), ("\n\n", 0), ('{"iteration": 5}\n', 0)])
def test_nothing_written_yet(tmp_path, text, iterations):
    metrics = metrics_of(tmp_path, text)
    assert metrics.iterations == iterations and metrics.series == {} and metrics.num_unreadable == 0


def test_an_unfinished_last_line_is_passed_over_and_others_are_counted(tmp_path):
    text = metrics_lines(last=39, is_mimic=False)
    assert metrics_of(tmp_path, text + '{"iteration": 59, "total_l').num_unreadable == 0
    broken = metrics_of(tmp_path, 'no JSON\n["no", "object"]\n{"no": "iteration"}\n' + text)
    assert broken.num_unreadable == 3 and broken.iterations == 40


def test_values_that_are_not_finite_are_left_out(tmp_path):
    text = '{"iteration": 19, "total_loss": NaN, "loss_cls": Infinity, "loss_box_reg": 1.0, "name": "x"}\n'
    metrics = metrics_of(tmp_path, text)
    assert metrics.series == {"loss_box_reg": {19: 1.0}} and metrics.iterations == 20


def test_what_a_resumed_training_threw_away_is_dropped(tmp_path):
    def row(iteration, value):
        return json.dumps({"iteration": iteration, "total_loss": value, "loss_cls": value}) + "\n"

    match = '{"iteration": 40, "qmimic/match_ratio": 0.9}\n'
    text = row(19, 1.0) + row(39, 2.0) + row(59, 3.0) + match + row(39, 4.0)
    metrics = metrics_of(tmp_path, text)
    assert metrics.series["loss_cls"] == {19: 1.0, 39: 4.0}
    assert "qmimic/match_ratio" not in metrics.series and metrics.iterations == 40


def test_last_mean_and_thinned():
    assert last_mean({0: 1.0, 20: 2.0, 40: 6.0}, count=2) == 4.0
    assert math.isnan(last_mean({}))
    series = {iteration: float(iteration) for iteration in range(5)}
    assert thinned(series, 5) is series
    assert thinned(series, 2) == {1: 0.5, 4: 3.0}
    assert thinned({}, 2) == {}


# ---------------------------------------------------------------------------------------- mimic.json


def held_out_of(tmp_path, content):
    (tmp_path / "mimic.json").write_text(json.dumps(content))
    return read_held_out(str(tmp_path / "mimic.json"))


def test_held_out(tmp_path):
    held_out = held_out_of(tmp_path, HELD_OUT)
    assert (held_out.num_images, held_out.num_rois, held_out.iteration) == (4, 48, 40)
    assert held_out.figures["conv5"]["cosine"] == 0.875 and "code_histogram" not in held_out.figures["conv5"]
    assert held_out.histograms["conv5"].teacher == [40, 40, 20]


def test_held_out_without_histogram_or_with_null(tmp_path):
    held_out = held_out_of(tmp_path, {"levels": {"p3": {"match_ratio": 0.5, "cosine": None}}})
    assert held_out.figures == {"p3": {"match_ratio": 0.5}} and held_out.histograms == {}
    assert held_out.num_images == 0 and held_out.quantizer == ""


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "no object 'levels'"),
        ({"levels": {"p3": 1}}, "'p3' is no object"),
        ({"levels": {"p3": {"code_histogram": [1]}}}, "has not the lists"),
        ({"levels": {"p3": {"code_histogram": {"codes": [0], "student": ["x"], "teacher": [1]}}}}, "has not the lists"),
        ({"levels": {"p3": {"code_histogram": {"codes": [0], "student": [1, 2], "teacher": [1]}}}}, "[1, 2, 1]"),
    ],
)
def test_held_out_of_another_make(tmp_path, content, message):
    with pytest.raises(ValueError) as raised:
        held_out_of(tmp_path, content)
    assert message in str(raised.value)


# --------------------------------------------------------------------------------------- run folders


def test_a_complete_run(complete, dataset):
    run = collect_run(str(complete))
    assert run.notes == []
    assert (run.name, run.dataset, run.levels, run.state) == ("student", dataset, ["conv5"], "finished")
    assert run.has_teacher and run.teacher_config["MODEL"]["VGG"]["WIDTH_DIVISOR"] == 16
    assert run.figures["AP"] == AP and run.figures["AP-class 5"] == CLASS_AP[1] and "APl" not in run.figures
    assert run.weights == str(complete / "model_final.pth")
    assert run.detections == str(complete / "inference" / "coco_instances_results.json")
    assert run.held_out.figures["conv5"]["match_ratio"] == 0.75
    assert run.cfg.is_frozen() and run.cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE == ""


def test_a_running_one(tmp_path, dataset):
    text = metrics_lines(last=19, evaluated_at=[9, 19]) + '{"iteration": 39, "lo'
    folder = write_run(tmp_path / "running", dataset, metrics=text, is_finished=False)
    run = collect_run(str(folder), name="mine")
    assert run.name == "mine" and run.state == "not finished: iteration 20 of 40"
    assert run.ap_series == {9: AP, 19: AP - 10.0}
    assert run.figures == {"AP": AP - 10.0}, "the last evaluation so far"
    assert run.weights == "" and run.detections == "" and run.held_out is None
    assert [note.partition(":")[0] for note in run.notes] == ["no checkpoint", "no held-out measurement"]
    (folder / "model_0000019.pth").touch()
    (folder / "last_checkpoint").write_text("model_0000019.pth")
    assert collect_run(str(folder)).weights == str(folder / "model_0000019.pth")


def test_before_anything_was_measured(tmp_path, dataset):
    folder = write_run(tmp_path / "new", dataset, metrics="", is_finished=False)
    run = collect_run(str(folder))
    assert run.state == "nothing measured yet" and run.figures == {}
    assert "no AP: neither evaluation.json nor metrics.json has one" in run.notes


def test_several_test_sets(tmp_path, dataset):
    pairs = ("DATASETS.TEST", (dataset, "another"))
    text = '{"iteration": 9, "tiny_coco/bbox/AP": 50.0, "another/bbox/AP": 1.0}\n'
    folder = write_run(tmp_path / "two", dataset, *pairs, metrics=text)
    boxes = {dataset: {"bbox": {"AP": 51.0}}, "another": {"bbox": {"AP": 1.0}}}
    (folder / "evaluation.json").write_text(json.dumps({"datasets": [], "results": boxes}))
    run = collect_run(str(folder))
    assert run.dataset == dataset and run.figures == {"AP": 51.0} and run.ap_series == {9: 50.0}
    assert run.detections == "", "both sets write to the same file"
    (folder / "evaluation.json").unlink()
    assert collect_run(str(folder)).figures == {"AP": 50.0}


def test_an_evaluation_alone(tmp_path, complete):
    folder = tmp_path / "quantized"
    folder.mkdir()
    (folder / "evaluation.json").write_bytes((complete / "evaluation.json").read_bytes())
    run = collect_run(str(folder))
    assert run.state == "evaluation only" and run.figures["AP"] == AP
    assert run.config == {} and run.cfg is None and not run.has_teacher and run.dataset == "" and run.levels == []
    assert [note.partition(":")[2] for note in run.notes][:2] == [
        " config.yaml is not there (an evaluation alone writes none)",
        " metrics.json is not there",
    ]
    given = collect_run(str(complete)).cfg
    run = collect_run(str(folder), cfg=given, weights="somewhere.pth")
    assert run.dataset == "tiny_coco" and run.weights == "somewhere.pth" and run.cfg is not None
    assert run.notes == ["no curves: metrics.json is not there"]


@pytest.mark.parametrize(
    "name, text, note",
    [
        ("config.yaml", "MODEL: [unclosed", "config.yaml cannot be read (ParserError"),
        ("config.yaml", "just words", "config.yaml cannot be read (ValueError: it is no Detectron2 config"),
        ("config.yaml", "MODEL: !!python/object/apply:os.getcwd []", "config.yaml cannot be read (ConstructorError"),
        ("config.yaml", "MODEL: {NO_SUCH_KEY: 1}", "this version cannot use config.yaml (KeyError"),
        ("teacher_config.yaml", "[]", "no architecture of the teacher: teacher_config.yaml cannot be read"),
        ("metrics.json", "{}\n", "lines of metrics.json that cannot be read: 1"),
        ("evaluation.json", '{"results"', "no last evaluation: evaluation.json cannot be read (JSONDecodeError"),
        ("evaluation.json", '{"results": {"bbox": []}}', "no AP"),
        ("evaluation.json", "[]", "no AP"),
        ("mimic.json", "{", "no held-out measurement: mimic.json cannot be read (JSONDecodeError"),
        ("mimic.json", "{}", "mimic.json cannot be read (ValueError: it has no object 'levels')"),
        ("last_checkpoint", "gone.pth", None),
    ],
)
def test_broken_files_are_named_and_the_rest_is_kept(tmp_path, dataset, name, text, note):
    folder = write_run(tmp_path / "broken", dataset)
    (folder / name).write_text(text)
    run = collect_run(str(folder))
    assert (note is None and not run.notes) or any(note in each for each in run.notes), run.notes
    assert run.metrics.iterations == (0 if name == "metrics.json" else 40)
    assert run.figures == {} or run.figures["AP"] == AP


def test_metrics_that_cannot_be_opened(tmp_path, dataset, monkeypatch):
    folder = write_run(tmp_path / "locked", dataset)
    monkeypatch.setattr("qmimic_d2.report.collect.read_metrics", lambda path: open(tmp_path / "absent"))
    (note,) = collect_run(str(folder)).notes
    assert note.startswith("no curves: metrics.json cannot be read (FileNotFoundError")


def test_what_is_no_run_is_an_error(tmp_path, complete):
    with pytest.raises(FileNotFoundError, match="there is no folder 'absent'"):
        collect_run("absent")
    with pytest.raises(ValueError, match="no output folder of train_net.py: it holds none of config.yaml") as raised:
        collect_run(str(tmp_path))
    assert "The folders in it" not in str(raised.value)
    with pytest.raises(ValueError, match="The folders in it that do: student"):
        collect_run(str(complete.parent))


def test_names_of_runs(tmp_path, complete):
    for parent in ("a", "b"):
        (tmp_path / parent / "student").mkdir(parents=True)
        (tmp_path / parent / "student" / "metrics.json").touch()
    a, b = str(tmp_path / "a" / "student"), str(tmp_path / "b" / "student") + "/"
    assert [run.name for run in collect_runs([a])] == ["student"]
    assert [run.name for run in collect_runs([a, b])] == ["a/student", "b/student"]
    assert [run.name for run in collect_runs([f"s = 0.25={a}", b])] == ["s = 0.25", "b/student"]
    (tmp_path / "x=y").mkdir()
    (tmp_path / "x=y" / "metrics.json").touch()
    assert [run.name for run in collect_runs([str(tmp_path / "x=y"), f"z={tmp_path / 'x=y'}/../b/student"])] == [
        "x=y",
        "z",
    ]
    with pytest.raises(FileNotFoundError, match="'absent=folder'"):
        collect_runs(["name=absent=folder"])
    assert collect_runs([]) == []
    with pytest.raises(ValueError, match="given twice"):
        collect_runs([a, f"x={a}"])
    with pytest.raises(ValueError, match="two runs have the name 'x'"):
        collect_runs([f"x={a}", f"x={b}"])


# -------------------------------------------------------------------------------------------- facts


def test_facts_of_a_student(complete):
    facts = describe_run(collect_run(str(complete)))
    assert facts["Backbone"] == "VGG-1-32 (11 layers, BN)"
    assert facts["Teacher"] == "VGG-1-16 (11 layers, BN), teacher/model_final.pth"
    assert facts["Quantizer"] == "Uniform, s = 0.25"
    assert facts["Quantized"] == "teacher, own map, adapted features"
    assert facts["λ"] == "1 (constant)"
    assert facts["Mimic loss"] == "divided by roi, adapter conv1x1"
    assert facts["Mimic RoIs"] == "sampled, ROIAlignV2 3 × 3"
    assert facts["Schedule"] == "40 iterations of 2 images" and facts["Seed"] == "1"
    assert facts["Training data"] == facts["Test data"] == "tiny_coco"
    assert facts["Done"] == "finished"


def changed(run, *pairs):
    """A copy of a run with other settings."""
    config = yaml.safe_load(yaml.safe_dump(run.config))
    for key, value in zip(pairs[::2], pairs[1::2]):
        *nodes, last = key.split(".")
        node = config
        for name in nodes:
            node = node[name]
        node[last] = value
    return Run(run.name, run.folder, config, run.teacher_config)


def test_facts_of_other_settings(complete):
    run = collect_run(str(complete))
    quantizer, mimic = "MODEL.QMIMIC.QUANTIZER", "MODEL.QMIMIC.MIMIC"
    facts = describe_run(
        changed(
            run,
            *(f"{quantizer}.NUM_CODES", 8, f"{quantizer}.SIGNED", True, f"{quantizer}.ON_BACKBONE", False),
            *(f"{mimic}.QUANTIZE_STUDENT", False),
            *(f"{mimic}.SCHEDULE", "warmup", f"{mimic}.WARMUP_ITERS", 1500, f"{mimic}.MAX_ROIS_PER_IMAGE", 32),
            *(f"{mimic}.ADAPTER", "", "MODEL.QMIMIC.TEACHER.INPUT_SCALE", 2.0),
        )
    )
    assert facts["Quantizer"] == "Uniform, s = 0.25, 8 codes, signed" and facts["Quantized"] == "teacher"
    assert facts["λ"] == "1 (warm-up of 1,500 iterations)"
    assert facts["Mimic loss"].endswith("adapter none") and "at most 32 per image" in facts["Mimic RoIs"]
    assert "input enlarged by 2, " in facts["Teacher"]
    facts = describe_run(changed(run, f"{quantizer}.NAME", ""))
    assert facts["Quantizer"] == "none" and facts["Quantized"] == ""
    facts = describe_run(changed(run, "MODEL.META_ARCHITECTURE", "QuantRCNN"))
    assert (facts["Teacher"], facts["Quantized"], facts["λ"]) == ("none", "own map", "")
    off = changed(run, "MODEL.META_ARCHITECTURE", "QuantRCNN", f"{quantizer}.ON_BACKBONE", False)
    assert describe_run(off)["Quantized"] == "nothing"
    facts = describe_run(changed(run, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "SOLVER.MAX_ITER", None))
    assert facts["Quantizer"] == "none" and facts["Schedule"] == "not known"


@pytest.mark.parametrize("family", ONE_STAGE)
def test_facts_of_one_stage_detectors(tmp_path, dataset, family):
    """The class that is registered under the name decides, not the name."""
    pairs = ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["neighbourhood"], "MODEL.QMIMIC.QUANTIZER.STRIDE", 0.5)
    options = (*ONE_STAGE[family], *pairs)
    folder = write_run(tmp_path / "run", dataset, *options, is_finished=False)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("QuantMimicRCNN", f"QuantMimic{family}"))
    run = collect_run(str(folder))
    assert run.has_teacher and run.levels == ["conv5"]
    facts = describe_run(run)
    assert facts["Heads"] == f"{family} on conv5" and facts["Quantizer"] == "Uniform, s = 0.5"
    assert facts["Quantized"] == "teacher, own map, adapted features"
    assert facts["Mimic RoIs"].startswith("neighbourhood") and facts["Teacher"].startswith("VGG-1-16")
    quantized = changed(run, "MODEL.META_ARCHITECTURE", f"Quant{family}")
    assert not quantized.has_teacher and quantized.levels == ["conv5"]
    assert describe_run(quantized)["Quantizer"] == "Uniform, s = 0.5"
    plain = describe_run(changed(run, "MODEL.META_ARCHITECTURE", "RetinaNet" if family == "RetinaNet" else "Unheard"))
    assert plain["Quantizer"] == "none"


def test_a_class_that_is_not_registered_here_may_have_a_teacher(complete):
    run = changed(collect_run(str(complete)), "MODEL.META_ARCHITECTURE", "MyOwnMimic")
    assert run.has_teacher and run.levels == ["conv5"]
    assert not changed(run, "MODEL.QMIMIC.TEACHER.CONFIG_FILE", "").has_teacher


def test_facts_without_a_config():
    facts = describe_run(Run("x", "x"))
    assert set(facts.values()) == {"not known", "", "nothing measured yet"}


@pytest.mark.parametrize(
    "name, text",
    [
        ("build_divided_resnet_backbone", "ResNet18-1-16 (BN)"),
        ("build_divided_resnet_fpn_backbone", "ResNet18-1-16 (BN), FPN"),
        ("build_resnet_backbone", "ResNet18 (BN)"),
        ("build_something", "build_something"),
    ],
)
def test_backbones(name, text):
    resnets = {"DEPTH": 18, "WIDTH_DIVISOR": 16, "NORM": "BN"}
    assert describe_backbone({"MODEL": {"BACKBONE": {"NAME": name}, "RESNETS": resnets}}) == text


def test_common_facts():
    facts = [{"a": "1", "b": "", "c": "x", "d": ""}, {"a": "1", "b": "2", "c": "y", "d": ""}]
    assert split_common(facts) == ({"a": "1", "b": "2"}, ["c"])
    assert split_common([{"a": "not known", "b": "not known"}, {"a": "1", "b": "not known"}]) == (
        {"a": "1", "b": "not known"},
        [],
    )
    assert split_common([]) == ({}, [])
