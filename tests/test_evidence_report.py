"""Summary, tables, plots and the command, from made-up records."""

import json
import os
import re
from pathlib import Path

import cv2
import pytest
from made_up_evidence import made_up_record, write_made_up

import evidence
from evidence_lib.matrix import load_matrix
from evidence_lib.plots import draw_group
from evidence_lib.records import Records
from evidence_lib.report import write_report
from evidence_lib.runs import Runs
from evidence_lib.summary import measure_of, summarize, to_dict
from evidence_lib.tables import comparison_table, contrast_table, group_section, insert_between_markers, seed_table
from qmimic_d2.cli import task_runner

ROOT = Path(__file__).resolve().parent.parent
MATRIX = """
seeds: {reporting: [101, 102, 103], choosing: [11]}
common: [MODEL.DEVICE, cpu]
variants:
  teacher: {label: "teacher", config: Digits/teacher_vgg_1_8.yaml, seed: 1}
  scratch: {label: "from scratch", config: Digits/student_vgg_1_16_scratch.yaml}
  mimic: {label: "plain mimic", config: Digits/student_vgg_1_16_mimic.yaml, teacher: teacher}
  qmimic: {label: "quantization mimic", config: Digits/student_vgg_1_16_qmimic.yaml, teacher: teacher}
  strong: {label: "weight 200", config: Digits/student_vgg_1_16_qmimic.yaml, teacher: teacher,
           opts: [MODEL.QMIMIC.MIMIC.LOSS_WEIGHT, 200.0]}
  later: {label: "later", config: Digits/student_vgg_1_16_scratch.yaml, opts: [SEED, 3], not_yet: "No such thing"}
groups:
  main:
    {title: "Main", seeds: reporting, count: 3, variants: [teacher, scratch, mimic, qmimic, later],
     contrasts: [[qmimic, mimic], [mimic, scratch]], measures: [AP, match_ratio]}
  lambda:
    {title: "Weight", seeds: reporting, count: 2, variants: [scratch, qmimic, strong], against: qmimic,
     x: {label: "weight", lines: {"quantization mimic": {qmimic: 20, strong: 200}}, beside: [scratch]}}
  chosen: {title: "Chosen", seeds: choosing, count: 1, variants: [scratch], on_request: true}
quick: {count: 1, variants: [scratch, qmimic]}
"""
AP = {
    "scratch": {101: 50.0, 102: 51.0, 103: 52.0},
    "mimic": {101: 51.0, 102: 53.0},
    "qmimic": {101: 53.0, 102: 54.0, 103: 56.0},
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    return Runs(load_matrix("matrix.yaml"), Records("records"), "out")


@pytest.fixture
def recorded(runs):
    """Three variants; plain mimic failed on one seed and was not run on none."""
    write(runs, "teacher", 1, 69.7)
    for name, values in AP.items():
        for seed, ap in values.items():
            measures = {"match_ratio": ap / 100, "grad_share_backbone": 0.25} if name != "scratch" else {}
            write(runs, name, seed, ap, measures)
    write(runs, "mimic", 103, None)
    return runs


def write(runs, name, seed, ap, measures={}):
    (run,) = runs.matrix.runs(variants=[name], seeds=[seed])
    runs.records.write(made_up_record(runs, run, ap, measures))


def summary_of(runs, name):
    return next(each for each in summarize(runs) if each.group.name == name)


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_summary_takes_valid_records(recorded):
    summary = summary_of(recorded, "main")
    mimic, qmimic = summary.variant("mimic"), summary.variant("qmimic")
    assert mimic.values["AP"] == AP["mimic"] and qmimic.values["AP50"] == {101: 78.0, 102: 79.0, 103: 81.0}
    assert (qmimic.samples["AP"].n, qmimic.samples["AP"].mean) == (3, pytest.approx(163 / 3))
    assert list(mimic.failed) == [103] and "FloatingPointError" in mimic.failed[103] and mimic.open_seeds == ()
    assert summary.variant("teacher").values["AP"] == {1: 69.7} and summary.variant("teacher").parameters == 254101
    assert summary.variant("later").open_seeds == (101, 102, 103)
    first, second = summary.contrasts["AP"]
    assert first.differences == {101: 2.0, 102: 1.0} and second.differences == {101: 1.0, 102: 2.0}
    assert summary.contrasts["match_ratio"][0].differences == pytest.approx({101: 0.02, 102: 0.01})
    assert summary.contrasts["match_ratio"][1].differences == {}  # nobody teaches the other

    # a record of another config, or beside another teacher, does not count
    path = Path("records/runs/qmimic/101.json")
    record = json.loads(path.read_text())
    for change in ({"config_digest": "0" * 16}, {"inputs": {"teacher": "another"}}):
        path.write_text(json.dumps({**record, **change}))
        qmimic = summary_of(recorded, "main").variant("qmimic")
        assert (list(qmimic.values["AP"]), qmimic.open_seeds) == ([102, 103], (101,))


def test_figures_of_a_measure():
    record = {"AP": 50.0, "AP50": 70.0, "measures": {"weight": {"early": 1.0, "late": 2.0, "mean": 3.0}}}
    assert measure_of(record, "AP") == 50.0 and measure_of(record, "AP50") == 70.0
    assert [measure_of(record, f"weight{figure}") for figure in ("", ":early", ":mean")] == [2.0, 1.0, 3.0]
    assert measure_of(record, "cosine") is None and measure_of(record, "weight:last") is None


def test_group_section(recorded):
    text = group_section(summary_of(recorded, "main"))
    assert text.startswith("### Main\n\n`--group main`. Seeds 101 to 103.\n\n|")
    table = cells(text.split("\n\n")[2])
    assert table[0] == ["model", "runs", "AP", "95 %", "AP50", "gradient share, early", "gradient share", "parameters"]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert rows["teacher"] == ["1", "69.7", "-", "94.7", "-", "-", "254 k"]
    # 51 +- 1, and 4.303 / sqrt(3) to either side
    assert rows["from scratch"] == ["3", "51.0 ± 1.0", "48.5 to 53.5", "76.0", "-", "-", "254 k"]
    assert rows["quantization mimic"][4:6] == ["25.0 %", "25.0 %"]
    assert rows["later"] == ["0", "-", "-", "-", "-", "-", "-"]
    assert "- plain mimic, seed 103: failed. stopped with status 1: FloatingPointError: Loss became" in text
    assert text.endswith("- later: not run. No such thing")
    assert "Paired differences, AP:" in text and "Paired differences, `match_ratio`, in percentage points:" in text


def test_contrast_table(recorded):
    table = cells(contrast_table(summary_of(recorded, "main"), "AP"))
    assert table[0][:5] == ["difference", "pairs", "mean", "95 %", "95 %, all 2"]
    # differences 2 and 1: sd 0.707, 12.706 x 0.5 to either side; twice the error probability per side: 25.452 x 0.5
    assert table[2][:6] == ["quantization mimic − plain mimic", "2", "+1.5", "-4.9 to +7.9", "-11.2 to +14.2", "2 of 2"]
    # t = 3 with one degree of freedom: p = 1 - 2 atan(3) / pi = 0.205
    assert table[2][6:] == ["0.205", "0.410"]
    ratios = cells(contrast_table(summary_of(recorded, "main"), "match_ratio"))
    assert ratios[2][2] == "+1.5" and ratios[3][1:] == ["0", "-", "-", "-", "-", "-", "-"]


def test_seed_table(recorded):
    table = cells(seed_table(summary_of(recorded, "main")))
    assert table[0] == ["", "101", "102", "103", "once"]
    assert table[2] == ["teacher", "-", "-", "-", "69.7"] and table[4] == ["plain mimic", "51.0", "53.0", "-", "-"]
    assert cells(seed_table(summary_of(recorded, "lambda")))[0] == ["", "101", "102"]


def test_nothing_run_is_said(runs, tmp_path):
    for summary in summarize(runs):
        assert group_section(summary).endswith("Not run.")
        assert draw_group(summary, "plots") == []
    assert not os.path.exists("plots")
    assert "Seeds 11 (choosing)." in group_section(summary_of(runs, "chosen"))


def test_comparison_of_a_repetition():
    table = cells(comparison_table([("a|b", 101, 50.0, 49.5), ("other", 102, None, 50.0)]))
    assert table[2] == ["a\\", "b", "101", "50.0", "49.5", "+0.5"]
    assert table[3] == ["other", "102", "-", "50.0", "-"]


def test_markers():
    text = "before\n<!-- evidence: begin -->\nold\n<!-- evidence: end -->\nafter\n"
    new = insert_between_markers(text, "evidence", "new\n")
    assert new == "before\n<!-- evidence: begin -->\n\nnew\n\n<!-- evidence: end -->\nafter\n"
    assert insert_between_markers(new, "evidence", "new") == new
    for wrong in ("", text.replace("begin", "start"), text + text):
        with pytest.raises(ValueError, match="<!-- evidence: begin -->"):
            insert_between_markers(wrong, "evidence", "new")


def test_report_is_written_and_the_same_again(recorded, tmp_path):
    document = tmp_path / "docs" / "evidence.md"
    document.parent.mkdir()
    document.write_text("# Evidence\n<!-- evidence: begin -->\n<!-- evidence: end -->\n")
    write(recorded, "strong", 101, 54.5, {"grad_share_backbone": 0.75})
    written = write_report(recorded, "report", str(document))
    assert [Path(path).name for path in written] == [
        "summary.json", "tables.md", "main.png", "lambda.png", "lambda_over_x.png", "evidence.md",
    ]  # fmt: skip
    for path in written[2:5]:
        picture = cv2.imread(path)
        assert picture.shape[1] > 600 and picture.std() > 5.0
    text = document.read_text()
    assert text.startswith("# Evidence\n<!-- evidence: begin -->\n\n### Main") and "Not run." in text
    assert "![lambda_over_x](../report/plots/lambda_over_x.png)" in text
    tables = Path("report/tables.md").read_text()
    assert "\n## Main\n" in tables and "AP of every run:" in tables
    content = json.loads(Path("report/summary.json").read_text())
    assert content["versions"]["torch"]
    main = content["groups"]["main"]
    assert main["variants"][2]["values"] == {"AP": {"101": 51.0, "102": 53.0}}
    assert main["variants"][3]["samples"]["match_ratio"]["mean"] == pytest.approx(1.63 / 3)
    assert (main["contrasts"]["AP"][0]["a"], main["contrasts"]["AP"][0]["sample"]["mean"]) == ("qmimic", 1.5)
    assert main == json.loads(json.dumps(to_dict(summarize(recorded))["groups"]["main"]))

    before = {path: Path(path).read_bytes() for path in written}
    assert write_report(recorded, "report", str(document)) == written
    assert {path: Path(path).read_bytes() for path in written} == before


def test_a_report_without_matplotlib_has_no_plots(recorded, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "evidence_lib.plots", None)
    assert [Path(path).name for path in write_report(recorded, "report")] == ["summary.json", "tables.md"]


def test_made_up_results_of_the_whole_matrix_can_be_reported(tmp_path):
    matrix = load_matrix(str(ROOT / "benchmarks" / "evidence" / "matrix.yaml"))
    runs = Runs(matrix, Records(str(tmp_path / "records")), "out")
    for variant in matrix.variants.values():
        if variant.seed is not None:
            write_made_up(runs, matrix.runs(variants=[variant.name]))
    write_made_up(runs, matrix.runs(["main", "stride"], ["scratch", "mimic", "qmimic", "s05"], [101, 102]))
    summaries = {each.group.name: each for each in summarize(runs)}
    assert len(summaries["main"].contrasts["AP"][0].differences) == 2
    assert len(draw_group(summaries["stride"], str(tmp_path / "plots"))) == 2
    assert "| quantization mimic " in group_section(summaries["lambda"])


@pytest.fixture
def command(runs, tmp_path, monkeypatch, capsys):
    """Runs benchmarks/evidence.py in a folder of its own; returns what it prints."""
    monkeypatch.setattr(evidence, "ROOT", str(tmp_path))
    monkeypatch.setattr(evidence.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(task_runner, "_POLL_SECONDS", 0.02)

    def run(*arguments):
        evidence.main([*arguments, "--matrix", "matrix.yaml"])
        return capsys.readouterr().out

    return run


def test_list_shows_what_is_open(command, recorded):
    printed = command("--list", "--records", "records", "--group", "main", "--jobs", "2")
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert rows["mimic"].split() == ["mimic", "plain", "mimic", "2", "1", "0", "0"]
    assert rows["teacher"].split() == ["teacher", "teacher", "1", "0", "0", "0"]
    assert "No such thing" in rows["later"]
    assert "13 runs; what is open takes about 0 minutes with --jobs 2" in printed
    # the failed one took 90 seconds on other seeds
    again = ["--list", "--records", "records", "--group", "main", "--jobs", "1", "--retry-failed"]
    assert "about 2 minutes" in command(*again)


def test_report_only_runs_nothing(command, recorded, monkeypatch):
    monkeypatch.setattr(evidence, "run_tasks", None)
    printed = command("--report-only", "--records", "records")
    assert "written: records/summary.json" in printed and os.path.isfile("records/plots/main.png")


def test_report_of_the_repository_fills_the_document(command, runs):
    Path("docs").mkdir()
    Path(evidence.DOCUMENT).write_text("<!-- evidence: begin --><!-- evidence: end -->")
    assert f"written: {evidence.DOCUMENT}" in command("--report-only")
    assert "### Main" in Path(evidence.DOCUMENT).read_text()


def test_runs_are_started_and_failures_named(command):
    Path("train_net.py").write_text("raise SystemExit('ValueError: SOLVER.BASE_LR is -1')")
    printed = command("--records", "records", "--output", "out", "--group", "chosen", "--jobs", "1")
    assert "1 runs selected, 1 to run (with teachers), about" in printed
    assert "failed: scratch_11. Their logs are in out/logs" in printed
    assert "from scratch, seed 11: failed. stopped with status 1: ValueError" in Path("records/tables.md").read_text()


def test_quick_compares_with_what_is_recorded(command, runs, monkeypatch):
    recorded_there = Runs(runs.matrix, Records(evidence.RECORDS), "out")
    write(recorded_there, "scratch", 101, 54.0)

    def run_tasks(tasks, *arguments, **keywords):
        assert [task.name for task in tasks] == ["teacher_1", "scratch_101", "qmimic_101"]
        write(Runs(runs.matrix, Records("output/evidence_quick/records"), "out"), "scratch", 101, 54.5)

    monkeypatch.setattr(evidence, "run_tasks", run_tasks)
    printed = command("--quick", "--jobs", "1")
    rows = [cells(line)[0] for line in printed.splitlines() if line.startswith("|")]
    assert ["from scratch", "101", "54.5", "54.0", "+0.5"] in rows
    assert ["quantization mimic", "101", "-", "-", "-"] in rows


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--quick", "--group", "main"], "--quick has its own"),
        (["--opts", "SOLVER.MAX_ITER", "20"], "--opts changes every run"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        evidence.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_wrong_names_and_interruptions_end_in_a_message(command, monkeypatch):
    with pytest.raises(SystemExit, match="ValueError: --group: there is no 'mian'"):
        command("--group", "mian")

    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "run_tasks", interrupt)
    with pytest.raises(SystemExit, match="the same command continues from here"):
        command("--records", "records")


def test_the_guide_has_its_markers_and_commands_that_exist():
    text = (ROOT / "docs" / "evidence.md").read_text()
    for name in ("evidence", "evidence overview"):
        assert insert_between_markers(text, name, "new").count("new\n") >= 1
    commands = re.findall(r"^    python benchmarks/evidence\.py (.*?)\s*(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 7
    matrix = load_matrix(str(ROOT / "benchmarks" / "evidence" / "matrix.yaml"))
    for each in commands:
        args = evidence.parse(each.split())
        assert args.quick or matrix.runs(args.group, args.variant, args.seeds)
