"""Painted digits: boxes tight, images independent of each other, distractors no digits."""

from dataclasses import replace

import numpy as np
import pytest

from qmimic_d2.data.digits import glyphs as digits_glyphs
from qmimic_d2.data.digits import render as digits_render
from qmimic_d2.data.digits.registration import DIGITS_SPECS
from qmimic_d2.data.digits.render import DigitsPainter, DigitsSpec

EASY = replace(DIGITS_SPECS["digits_det_train"], name="easy", num_images=6)
HARD = replace(DIGITS_SPECS["digits_det_hard_train"], name="hard", num_images=6)
GREY = 100


@pytest.fixture
def grey_background(monkeypatch):
    def background(self, rng):
        size = self._spec.image_size
        return np.full((size, size, 3), GREY, dtype=np.uint8)

    monkeypatch.setattr(DigitsPainter, "_background", background)


def test_images_do_not_depend_on_each_other():
    painter = DigitsPainter(HARD)
    painter.paint(0)
    image, labels = painter.paint(3)
    alone, labels_alone = DigitsPainter(HARD).paint(3)
    assert np.array_equal(image, alone) and labels == labels_alone
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8


def test_names_seed_different_images():
    image, _ = DigitsPainter(EASY).paint(0)
    other, _ = DigitsPainter(replace(EASY, name="other")).paint(0)
    assert not np.array_equal(image, other)


def test_no_scan_in_both_splits():
    train, train_labels = digits_glyphs.load_scans("train")
    val, val_labels = digits_glyphs.load_scans("val")
    assert (len(train), len(val)) == (1297, 500)
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in val}
    assert set(train_labels) == set(val_labels) == set(range(10))
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        digits_glyphs.load_scans("test")


@pytest.mark.parametrize("rotation", [0.0, 25.0, -25.0])
def test_boxes_are_tight(grey_background, rotation):
    spec = DigitsSpec("one", "train", 20, digits_per_image=(1, 1), max_rotation=abs(rotation))
    painter = DigitsPainter(spec)
    for index in range(spec.num_images):
        image, [(_, (x0, y0, x1, y1))] = painter.paint(index)
        change = np.abs(image.astype(int) - GREY).max(axis=2)
        inked = change > 0.51 * change.max()
        rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        # Rounding of colours may hide a rim that is just half opaque.
        assert np.abs(np.subtract(found, (x0, y0, x1, y1))).max() <= 1
        assert x0 <= found[0] and y0 <= found[1] and x1 >= found[2] and y1 >= found[3]


def test_render_glyph_by_hand():
    glyph = np.zeros((8, 8), dtype=np.int64)
    glyph[2:6, 3:7] = 16
    # 10 pixels per scan pixel on a canvas of 128: 40 x 40 of ink, 10 right of the middle.
    alpha, ink = digits_render._render_glyph(glyph, size=80, aspect=1.0, rotation=0.0)
    assert alpha.shape == (128, 128) and alpha.dtype == np.uint8
    assert ink == (64 - 10, 64 - 20, 64 + 30, 64 + 20)
    assert alpha[46:82, 56:92].min() == 255
    # A quarter turn clockwise takes what is right of the middle below it.
    _, ink = digits_render._render_glyph(glyph, size=80, aspect=1.0, rotation=90.0)
    assert ink == (64 - 20, 64 - 10, 64 + 20, 64 + 30)
    _, ink = digits_render._render_glyph(glyph, size=80, aspect=0.5, rotation=0.0)
    assert ink == (64 - 5, 64 - 20, 64 + 15, 64 + 20)


def test_overlap_by_hand():
    assert digits_render._overlap((0, 0, 2, 2), (2, 0, 4, 2)) == (0.0, 0.0)
    assert digits_render._overlap((0, 0, 4, 4), (2, 0, 4, 2)) == (4 / 16, 1.0)
    assert digits_render._overlap((0, 0, 2, 2), (1, 1, 3, 3)) == (1 / 7, 1 / 4)


@pytest.mark.parametrize("spec", [EASY, HARD], ids=lambda spec: spec.name)
def test_overlap_is_limited(spec):
    painter = DigitsPainter(spec)
    for index in range(spec.num_images):
        boxes = [box for _, box in painter.paint(index)[1]]
        for i, box in enumerate(boxes):
            for other in boxes[:i]:
                iou, cover = digits_render._overlap(box, other)
                assert iou <= spec.max_iou and cover <= spec.max_cover


@pytest.mark.parametrize(
    "behind, contrast, lighter, luma",
    [(100.0, 50.0, True, 150.0), (100.0, 50.0, False, 50.0), (20.0, 50.0, False, 70.0), (120.0, 180.0, False, 255.0)],
)
def test_contrast(behind, contrast, lighter, luma):
    color = digits_render._contrasting_color(behind, contrast, lighter, np.array([60.0, -20.0, 5.0]))
    assert color.min() >= 0 and color.max() <= 255
    assert color @ digits_render._LUMA_BGR == pytest.approx(luma, abs=1e-6)


def test_distractors_carry_no_label(grey_background):
    spec = DigitsSpec("pieces", "train", 1, digits_per_image=(0, 0), distractors_per_image=(4, 4))
    image, labels = DigitsPainter(spec).paint(0)
    assert labels == []
    assert (np.abs(image.astype(int) - GREY).max(axis=2) > 40).sum() > 100


def test_distractors_are_no_digits():
    scans, labels = digits_glyphs.load_scans("val")
    pieces = digits_glyphs.make_distractors(scans, labels, 30, digits_render._random("pieces"))
    again = digits_glyphs.make_distractors(scans, labels, 30, digits_render._random("pieces"))
    assert pieces.shape == (30, 8, 8) and np.array_equal(pieces, again)
    likeness = digits_glyphs._DigitLikeness()
    assert not any(likeness.resembles(piece) for piece in pieces)
    assert np.mean([likeness.resembles(scan) for scan in scans]) > 0.95
    assert digits_glyphs.make_distractors(scans, labels, 0, digits_render._random("none")).shape == (0, 8, 8)


def test_mirrored_halves_leave_out_what_reads_as_a_digit():
    mirrored = {digit for digits_ in digits_glyphs._MIRRORED.values() for digit in digits_}
    assert mirrored and not mirrored & {0, 1, 3, 8}


@pytest.mark.parametrize(
    "change",
    [
        dict(name=""),
        dict(name="a/b"),
        dict(name=".."),
        dict(split="test"),
        dict(num_images=0),
        dict(digits_per_image=(3, 2)),
        dict(distractors_per_image=(-1, 2)),
        dict(size=(4, 20)),
        dict(size=(18, 100)),
        dict(contrast=(-1.0, 20.0)),
        dict(max_rotation=90.0),
    ],
    ids=str,
)
def test_spec_refuses(change):
    with pytest.raises(ValueError, match="DigitsSpec"):
        replace(EASY, **change)


def test_spec_that_does_not_fit():
    crowded = replace(EASY, digits_per_image=(60, 60), max_iou=0.0, max_cover=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        DigitsPainter(crowded).paint(0)
