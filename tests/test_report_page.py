"""The report's page: what it holds, that it loads nothing and escapes everything, the command, the demo."""

import builtins
import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import metrics_lines, write_run
from test_command_line import status_of
from tiny_coco import registered_coco

import qmimic_d2.report
from qmimic_d2.report import Run, collect_run, collect_runs
from qmimic_d2.report.measure import Measurements
from qmimic_d2.report.page import render_page, write_report

ROOT = Path(__file__).resolve().parent.parent
NASTY = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with registered_coco(tmp_path_factory.mktemp("data")) as name:
        yield name


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "student", dataset)
    write_run(folder / "scratch", dataset, "MODEL.VGG.WIDTH_DIVISOR", 16, is_mimic=False)
    write_run(folder / "running", dataset, metrics=metrics_lines(19, evaluated_at=[9, 19]), is_finished=False)
    return collect_runs([f"{NASTY}={folder / 'student'}", str(folder / "scratch"), str(folder / "running")])


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, str(path), title=f"Title {NASTY}", made_by="the tests", num_images=2)
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the page outside of style and script."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("style", "script"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data):
        if not self._open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def elements(page):
    return Elements(page)


@pytest.mark.slow
def test_it_holds_what_was_found(elements):
    text = re.sub(r"\s+", " ", elements.text)
    for part in (
        *("3 runs, tested on tiny_coco (4 images)", "Uniform, s = 0.25", "VGG-1-32 (11 layers, BN)"),
        *("not finished: iteration 20 of 40", "AP of each class (3)", "class 5", "45.0", "80.0"),
        *("AP against parameters", "Detection loss", "Match ratio, not both 0", "Gradient share on the feature map"),
        *("On held-out images", "48 RoIs of 4 images of tiny_coco at iteration 40", "1 of 1 found, 0 wrong"),
        *("no held-out measurement: mimic.json is not there", "by the tests with PyTorch"),
    ):
        assert part in text, part


@pytest.mark.slow
def test_whatever_is_a_name_is_escaped(page, elements):
    assert NASTY not in page and "<script>alert" not in page
    assert f"Title {NASTY}" in elements.text and NASTY in elements.text
    assert any(NASTY in attributes.get("aria-label", "") for attributes in elements.all("button"))
    assert len(elements.all("script")) == 1


def test_it_loads_nothing(page, elements):
    for tag, attributes in elements.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style and "url(" not in style
    (policy,) = [each["content"] for each in elements.all("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none';") and "sha256-" in policy


def test_it_can_be_read_aloud(elements):
    assert elements.all("html")[0]["lang"] == "en"
    assert all("scope" in attributes for attributes in elements.all("th"))
    sortable = [attributes for attributes in elements.all("th") if "aria-sort" in attributes]
    assert sortable and all(attributes["aria-sort"] == "none" for attributes in sortable)
    for attributes in elements.all("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label"), attributes
    ids = [attributes["id"] for _, attributes in elements.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    labels = [each for _, attributes in elements.tags for each in attributes.get("aria-labelledby", "").split()]
    targets = [attributes["href"][1:] for attributes in elements.all("a")]
    assert labels and targets and set(labels) | set(targets) <= set(ids)


def test_its_size_is_bounded(page):
    assert len(page.encode()) < 600_000


def relative_luminance(color):
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    channels = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    lighter, darker = sorted((relative_luminance(first), relative_luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_of_black_on_white():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)


@pytest.mark.parametrize("number", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(number):
    style = (ROOT / "qmimic_d2" / "report" / "page.css").read_text()
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style.split(":root {")[1 + number].split("}")[0]))
    for text in ("text", "quiet", "link"):
        assert all(contrast(colors[text], colors[ground]) >= 4.5 for ground in ("page", "panel")), text
    series = [colors[f"s{index}"] for index in range(7)]
    assert all(contrast(color, colors["page"]) >= 3.0 for color in series), series


@pytest.mark.slow
def test_two_test_sets_and_nothing_else(dataset, tmp_path):
    with registered_coco(tmp_path / "data", name="another") as another:
        first = collect_run(str(write_run(tmp_path / "first", dataset)))
        second = collect_run(str(write_run(tmp_path / "second", another)))
        path = tmp_path / "report.html"
        write_report([first, second], str(path), num_images=1, threads=0)
    text = re.sub(r"\s+", " ", Elements(path.read_text()).text)
    assert "tested on tiny_coco (4 images), another (4 images)" in text
    assert "Nothing: every file that this page reads was there." in text and "CPU ms" not in text


def test_a_run_of_which_next_to_nothing_is_known():
    measured = Measurements([None], {}, {})
    page = render_page([Run("bare", "bare")], measured, title="T", footer="F", score_threshold=0.5)
    text = re.sub(r"\s+", " ", Elements(page).text)
    assert "1 run " in text and "None of the runs has a result yet." in text and "not known" in text
    assert "Pictures" not in text and "Training" not in text.replace("Training data", "")


# ------------------------------------------------------------------------------------------ command


@pytest.mark.slow
def test_command(tmp_path, dataset, capsys):
    folder = write_run(tmp_path / "student", dataset, is_finished=False)
    target = tmp_path / "new" / "page.html"
    arguments = ["report", folder, "-o", target, "--images", 1, "--no-latency", "--title", "Mine"]
    assert status_of(*arguments) == 0
    output = capsys.readouterr().out
    assert "student: no checkpoint" in output and output.splitlines()[-1].startswith(f"{target}: runs: 1, ")
    assert "<title>Mine</title>" in target.read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent"], "there is no folder 'absent'"),
        (["."], "is no output folder of train_net.py"),
        ([".", "-o", "."], "--output is '.', which is a folder"),
        ([".", "--images", "-1"], "--images: '-1'"),
        ([".", "--images", "few"], "--images: 'few'"),
        ([".", "--threads", "0"], "--threads: '0'"),
        ([".", "--score-threshold", "2"], "--score-threshold: '2'"),
        ([".", "MODEL.DEVICE", "cpu"], "takes no KEY VALUE pairs"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of("report", *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra(tmp_path, dataset, monkeypatch, package, capsys):
    folder = write_run(tmp_path / "student", dataset, is_finished=False)
    real_import = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real_import(name, *arguments, **keywords)

    for name in [name for name in sys.modules if name.startswith("qmimic_d2.report.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(qmimic_d2.report, name.split(".")[2])
    monkeypatch.setattr(builtins, "__import__", without)
    assert status_of("report", folder, "-o", tmp_path / "report.html") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert package in error and "pip install jinja2 matplotlib" in error
    assert not (tmp_path / "report.html").exists()


# --------------------------------------------------------------------------------------------- demo


@pytest.mark.slow
def test_the_demo_writes_it(tmp_path, dataset, monkeypatch, capsys):
    folder = write_run(tmp_path / "student", dataset)
    spec = importlib.util.spec_from_file_location("demo_results", ROOT / "demo" / "results.py")
    results = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_results", results)  # dataclasses look their module up
    spec.loader.exec_module(results)
    cfg = collect_run(str(folder)).cfg
    quantized = tmp_path / "teacher_quant"
    quantized.mkdir()
    (quantized / "evaluation.json").write_bytes((folder / "evaluation.json").read_bytes())
    weights = str(folder / "model_final.pth")
    models = [
        results.Model("teacher, quantized", "teacher_quant", cfg, weights, 1.0),
        results.Model("student, quantization mimic", "student", cfg, weights, 2.0),
    ]
    results.write_results(models, str(tmp_path))
    assert f"page, with curves and larger pictures: {tmp_path}/report.html" in capsys.readouterr().out
    for name in ("results.json", "detections.png"):
        assert (tmp_path / name).is_file()
    text = re.sub(r"\s+", " ", Elements((tmp_path / "report.html").read_text()).text)
    assert "Quantization Mimic: the demo" in text and "teacher, quantized" in text and "evaluation only" in text
    assert "no curves: metrics.json is not there" in text
