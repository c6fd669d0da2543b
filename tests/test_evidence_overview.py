"""Every claim in every setting, from made-up records."""

import json
from pathlib import Path

import cv2
import pytest
from made_up_evidence import made_up_record
from matplotlib.axes import Axes
from test_evidence_report import AP, MATRIX

from evidence_lib import plots
from evidence_lib.matrix import load_matrix
from evidence_lib.overview import summarize_overview
from evidence_lib.plots import draw_overview
from evidence_lib.records import Records
from evidence_lib.report import write_report
from evidence_lib.runs import Runs
from evidence_lib.summary import summarize
from evidence_lib.tables import overview_table

OVERVIEW = """
overview:
  claims:
    - {label: "quantization − plain", of: [quantization, plain], paper: 2.4}
    - {label: "quantization − scratch", of: [quantization, scratch]}
  settings:
    - {label: "weight 20", group: main, roles: {scratch: scratch, plain: mimic, quantization: qmimic}}
    - {label: "weight 200", group: lambda, roles: {scratch: scratch, quantization: strong}}
    - {label: "on two seeds", group: lambda, roles: {scratch: scratch, quantization: qmimic}}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Runs of the matrix with the overview, in a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def load(old="", new=""):
        assert old in OVERVIEW
        Path("matrix.yaml").write_text(MATRIX + OVERVIEW.replace(old, new))
        return Runs(load_matrix("matrix.yaml"), Records("records"), "out")

    return load


@pytest.fixture
def recorded(load):
    runs = load()
    (teacher,) = runs.matrix.runs(variants=["teacher"])
    runs.records.write(made_up_record(runs, teacher, 69.7))
    for name, values in {**AP, "strong": {101: 60.0}}.items():
        for run in runs.matrix.runs(variants=[name], seeds=list(values)):
            runs.records.write(made_up_record(runs, run, values[run.seed]))
    return runs


def summary_of(runs):
    return summarize_overview(runs.matrix.overview, summarize(runs))


def rows_of(runs):
    lines = overview_table(summary_of(runs)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], {row[0]: row[1:] for row in cells[2:]}


def test_differences_are_within_a_seed_of_the_settings_group(recorded):
    plain, scratch = summary_of(recorded).claims
    assert plain.contrasts[0].differences == {101: 2.0, 102: 1.0}
    assert plain.contrasts[1:] == [None, None]  # these settings have no plain mimic
    assert [each.differences for each in scratch.contrasts] == [
        {101: 3.0, 102: 3.0, 103: 4.0},
        {101: 10.0},
        {101: 3.0, 102: 3.0},  # the group has two seeds
    ]


def test_table(recorded):
    headers, rows = rows_of(recorded)
    assert headers == ["setting", "seeds", "quantization − plain", "quantization − scratch"]
    assert rows["the paper"] == ["-", "+2.4", "-"]
    # 2 and 1: 1.5 with 12.706 x 0.5 to either side. 3, 3 and 4: 10/3 with 4.303 x 0.577/sqrt(3), and 7.649 times it
    # for three settings together, which is above 0
    assert rows["weight 20"] == ["2 to 3", "+1.5, -4.9 to +7.9", "**+3.3**, +1.9 to +4.8"]
    assert rows["weight 200"] == ["1", "-", "+10.0"]


def test_a_mean_outside_the_axes_is_written_at_their_end(recorded, monkeypatch):
    written = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **look: written.append((text, look["ha"])))
    draw_overview(summary_of(recorded), "plots")
    assert written == []
    monkeypatch.setattr(plots, "_OVERVIEW_LIMITS", (4.0, 5.0))
    draw_overview(summary_of(recorded), "plots")
    assert written == [("+1.5", "left"), ("+3.3", "left"), ("+10.0", "right"), ("+3.0", "left")]


def test_what_was_not_run_has_no_figure(load):
    _, rows = rows_of(load())
    assert rows["weight 20"] == ["0", "-", "-"]
    assert draw_overview(summary_of(load()), "plots") == [] and not Path("plots").exists()


def test_report(recorded):
    Path("guide.md").write_text(
        "<!-- evidence overview: begin -->\n<!-- evidence overview: end -->\ntext\n"
        "<!-- evidence: begin -->\n<!-- evidence: end -->\n"
    )
    written = write_report(recorded, "report", "guide.md")
    assert "report/plots/overview.png" in written
    picture = cv2.imread("report/plots/overview.png")
    assert picture.shape[1] > 400 and picture.std() > 5.0
    text = Path("guide.md").read_text()
    before, after = text.split("\ntext\n")
    assert "| weight 20 " in before and "![overview](report/plots/overview.png)" in before and "### Main" in after
    overview = json.loads(Path("report/summary.json").read_text())["overview"]
    assert overview["quantization − plain"]["paper"] == 2.4
    assert list(overview["quantization − plain"]["settings"]) == ["weight 20"]
    assert overview["quantization − scratch"]["settings"]["weight 200"]["differences"] == {"101": 10.0}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("group: main", "group: mian", "overview: there is no 'mian'"),
        ("quantization: strong", "quantization: mimic", "overview, weight 200: there is no 'mimic'"),
        ("{scratch: scratch, plain", "{scrath: scratch, plain", "overview, weight 20: there is no 'scrath'"),
        ("claims:", "claim:", "is no matrix: KeyError: 'claims'"),
    ],
)
def test_mistakes_are_named(load, old, new, message):
    with pytest.raises(ValueError, match=message):
        load(old, new)
