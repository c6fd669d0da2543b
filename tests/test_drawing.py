"""Detections drawn on images: class names of any kind, fonts, sizes at the limits."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from qmimic_d2.inference import fonts
from qmimic_d2.inference.categories import Category
from qmimic_d2.inference.drawing import draw_detections, label_names, missing_characters_note

LATIN = "".join(chr(code) for code in range(32, 127))


def write_font(path, characters):
    """A font in which every character is a box, of another width for each; that of a missing one is narrower."""
    names = [f"glyph{index}" for index in range(len(characters))]

    def glyph(width):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 700), (width, 700), (width, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(each): name for each, name in zip(characters, names)})
    shapes = {name: glyph(300 + 2 * index) for index, name in enumerate(names)}
    builder.setupGlyf({".notdef": glyph(100), **shapes})
    builder.setupHorizontalMetrics({name: (800, 0) for name in [".notdef", *names]})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(str(path))
    return str(path)


@pytest.fixture
def machine_with(monkeypatch, tmp_path):
    """A machine that has certain fonts and no other."""

    def install(damaged=(), **characters):
        paths = [write_font(tmp_path / f"{name}.ttf", each) for name, each in characters.items()]
        monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [*map(str, damaged), *paths])
        monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path / "nowhere"))
        clear()
        return paths

    def clear():
        for each in vars(fonts).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()

    yield install
    monkeypatch.undo()
    clear()


def draw(image, boxes, classes, names):
    return draw_detections(image, np.array(boxes, float), [0.5] * len(boxes), classes, names)


# --------------------------------------------------------------------------------------- fonts


def test_the_font_that_has_the_characters(machine_with):
    latin, chinese = machine_with(a_latin=LATIN, b_chinese="数字")
    assert fonts.find_font("cat") == (latin, 0)
    assert fonts.find_font("数字") == (chinese, 0)
    assert fonts.find_font("数字 cat") is None, "no font has both"
    assert fonts.find_font("猫") is None
    assert fonts.unprintable_characters("a数猫") == "猫"


def test_what_has_no_shape_of_its_own_takes_no_font(machine_with):
    machine_with(latin=LATIN)
    assert fonts.find_font("a \u200d\u0301") is not None
    assert fonts.find_font("") is not None


def test_a_machine_without_fonts_has_pillows(machine_with):
    machine_with()
    assert fonts.find_font("cat") == ("", 0)
    assert fonts.find_font("数") is None
    assert fonts.load_font(("", 0), 20).getbbox("cat")[2] > 0


def test_a_damaged_font_is_passed_over(machine_with, tmp_path):
    (tmp_path / "a_bad.ttf").write_bytes(b"no font")
    good, = machine_with(damaged=[tmp_path / "a_bad.ttf"], z_good=LATIN)
    assert fonts.find_font("cat") == (good, 0)


def test_fonts_of_this_machine():
    assert fonts.find_font("cat") is not None


# --------------------------------------------------------------------------------------- names


def test_names_that_no_font_has_become_ids(machine_with):
    machine_with(latin=LATIN)
    categories = [Category(7, "cat"), Category(9, "数字")]
    assert label_names(categories) == ["cat", "#9"]
    note = missing_characters_note(categories)
    assert "数" in note and "Noto" in note and "predictions.json" in note
    assert missing_characters_note(categories[:1]) == ""


def test_names_in_a_script_are_drawn_in_its_font(machine_with):
    machine_with(a_latin=LATIN, b_chinese=LATIN + "数字")
    names = label_names([Category(1, "数字"), Category(2, "cat")])
    assert names == ["数字", "cat"]
    image = np.zeros((640, 640, 3), np.uint8)
    one, two = (draw(image, [[50, 300, 400, 500]], [0], [each]) for each in ("数", "字"))
    assert (one != two).any()


def test_names_are_one_line_and_not_too_long():
    names = label_names([Category(1, "two\nlines\x1b"), Category(2, "x" * 100), Category(3, "")])
    assert names[0] == "two lines" and len(names[1]) == 40 and names[1].endswith("...") and names[2] == ""


@pytest.mark.parametrize("name", ["$", "$x_1$", r"\frac{", "a$b", "_^{", "%d", "&<>"])
def test_any_name_is_drawn_as_it_is(name):
    image = np.zeros((640, 640, 3), np.uint8)
    drawn, plain = (draw(image, [[50, 300, 400, 500]], [0], label_names([Category(1, each)])) for each in (name, "n"))
    assert (drawn != plain).any()


# --------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 700), (641, 640)])
def test_images_of_any_shape(size):
    height, width = size
    drawn = draw(np.zeros((height, width, 3), np.uint8), [[0, 0, width, height]], [0], ["name"])
    factor = max(1, -(-640 // max(size)))
    assert drawn.shape == (height * factor, width * factor, 3)
    assert drawn.any()


def test_boxes_at_and_beyond_the_edge():
    boxes = [[0, 0, 640, 640], [639.9, 639.9, 640, 640], [-50, -50, 2000, 2000], [300, 300, 300, 300]]
    drawn = draw(np.zeros((640, 640, 3), np.uint8), boxes, [0, 1, 2, 0], ["a", "b", "c"])
    assert drawn.shape == (640, 640, 3) and drawn[0, 320].any() and drawn[639, 320].any()


def test_the_label_says_name_and_score():
    """Another score, another picture; the box is where it was."""
    image = np.zeros((640, 640, 3), np.uint8)
    box = np.array([[100.0, 200.0, 300.0, 400.0]])
    one = draw_detections(image, box, [0.5], [0], ["cat"])
    other = draw_detections(image, box, [0.6], [0], ["cat"])
    rows, columns = np.nonzero((one != other).any(axis=2))
    assert len(rows) and rows.max() < 200 and 100 <= columns.min() and columns.max() < 300
