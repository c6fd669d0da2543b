"""The report's page in a real browser, at the width of a desktop and of a phone."""

import pytest
from browser import browser_or_skip, running_browser
from report_runs import metrics_lines, write_run
from tiny_coco import registered_coco

from qmimic_d2.report import collect_runs
from qmimic_d2.report.page import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with running_browser(browser_or_skip()) as page:
        yield page


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Five runs, one with a long name, as wide as a page may become."""
    folder = tmp_path_factory.mktemp("report")
    with registered_coco(folder / "data") as dataset:
        write_run(folder / "student", dataset)
        write_run(folder / "small", dataset, "MODEL.VGG.WIDTH_DIVISOR", 64, metrics=metrics_lines(39, True, [19, 39]))
        write_run(folder / "teacher", dataset, "MODEL.VGG.WIDTH_DIVISOR", 16, is_mimic=False)
        names = ("a-name-without-any-place-to-break-it-at-all-that-is-long", "running")
        for name in names:
            write_run(folder / name, dataset, is_finished=False)
        runs = collect_runs([str(folder / name) for name in ("student", "small", "teacher", *names)])
        write_report(runs, str(folder / "report.html"), num_images=2, threads=0)
    return folder / "report.html"


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(request, browser, path):
    browser.open(path, width=request.param)
    yield browser
    assert browser.errors == []


def column(page, table, number):
    """The text of a column's cells, top to bottom."""
    rows = f"[...document.querySelectorAll('#{table} tbody tr')]"
    return page.evaluate(f"{rows}.map(row => row.cells[{number}].textContent.trim())")


def is_open(page):
    return page.evaluate("document.getElementById('viewer').open")


def test_it_loads_alone_and_fits_the_window(page, path):
    assert page.requests[0] == path.resolve().as_uri()
    assert page.requests[1:] and all(each.startswith("data:") for each in page.requests[1:])
    width, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window, "the page is wider than the window"
    assert page.evaluate("document.documentElement.scrollHeight") > 1500, "the page is nearly empty"


def test_what_is_expanded_fits_the_window_too(page):
    page.click("#classes summary")
    assert page.evaluate("document.getElementById('classes').open")
    assert len(column(page, "class-table", 0)) == 3
    width, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window


def test_a_heading_sorts(page):
    heading = "#results-table th:nth-child(4) button"
    assert page.evaluate(f"document.querySelector('{heading}').textContent") == "parameters"
    order = "document.querySelector('#results-table th:nth-child(4)').ariaSort"
    assert page.evaluate(order) == "none"
    values = "[...document.querySelectorAll('#results-table tbody td:nth-child(4)')].map(c => Number(c.dataset.value))"
    before = page.evaluate(values)
    page.click(heading)
    falling = page.evaluate(values)
    assert page.evaluate(order) == "descending"
    assert falling == sorted(before, reverse=True) != before
    page.click(heading)
    assert page.evaluate(order) == "ascending" and page.evaluate(values) == sorted(before)


def test_what_is_not_known_stands_last_and_names_sort_by_letters(page):
    page.click("#results-table th:nth-child(2) button")
    assert column(page, "results-table", 1)[3:] == ["–"] * 2
    page.click("#results-table th:nth-child(2) button")
    assert column(page, "results-table", 1)[3:] == ["–"] * 2
    page.click("#results-table th:nth-child(1) button")
    assert column(page, "results-table", 0) == sorted(column(page, "results-table", 0))
    assert page.evaluate("document.querySelector('#results-table th:nth-child(2)').ariaSort") == "none"


def test_a_heading_sorts_by_the_keyboard(page):
    page.evaluate("document.querySelector('#class-table').closest('details').open = true")
    page.evaluate("document.querySelector('#class-table th:nth-child(2) button').focus()")
    page.press("Enter")
    assert column(page, "class-table", 1) == ["60.0", "45.0", "30.0"]


def test_a_picture_opens_by_the_mouse_and_closes_by_its_button(page):
    page.click(".enlarge")
    assert is_open(page)
    assert page.evaluate("document.getElementById('viewer-caption').textContent") == "0.jpg, ground truth: 1 object"
    width_of = "(each => document.querySelector(each).getBoundingClientRect().width)"
    shown, thumb = page.evaluate(f"['#viewer-picture svg', '.enlarge svg'].map{width_of}")
    assert shown > 1.5 * thumb
    box = page.evaluate("(box => [box.left, box.right, window.innerWidth])(viewer.getBoundingClientRect())")
    assert 0 <= box[0] and box[1] <= box[2]
    page.click("#viewer-close")
    assert not is_open(page)


def test_a_picture_opens_and_closes_by_the_keyboard(page):
    page.evaluate("document.querySelectorAll('.enlarge')[1].focus()")
    page.press("Enter")
    assert is_open(page)
    caption = "document.getElementById('viewer-caption').textContent"
    assert page.evaluate(caption) == "0.jpg, student: 1 of 1 found, 0 wrong"
    page.press("ArrowRight")
    assert page.evaluate(caption).startswith("0.jpg, small: ")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.evaluate(caption).startswith("0.jpg, teacher: "), "it goes round within the image's pictures"
    page.press("Escape")
    assert not is_open(page)
    assert page.evaluate("document.activeElement === document.querySelectorAll('.enlarge')[1]"), "the focus comes back"


def test_everything_that_does_something_is_reached_by_tab(page):
    reachable = "[...document.querySelectorAll('button, a[href], summary')].every(each => each.tabIndex === 0)"
    assert page.evaluate(reachable)
    page.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "What was trained"


def test_in_the_dark(browser, path):
    browser.open(path, width=1280, is_dark=True)
    ground, text = browser.evaluate(
        "(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))"
    )
    assert ground == "rgb(20, 23, 27)" and text == "rgb(232, 235, 238)"
    assert browser.errors == []


def test_errors_of_a_page_are_noticed(browser, tmp_path):
    page = "<script>console.error('told'); undefinedName()</script><img src='http://127.0.0.1:9/x.png'>"
    (tmp_path / "broken.html").write_text(page)
    browser.open(tmp_path / "broken.html", width=800)
    assert any("told" in each for each in browser.errors)
    assert any("undefinedName" in each for each in browser.errors)
    assert "http://127.0.0.1:9/x.png" in browser.requests
