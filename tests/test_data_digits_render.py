"""Painted digits: boxes tight, images independent of each other, distractors no digits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou

from qmimic_d2.data.digits import glyphs as digits_glyphs
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


@pytest.mark.parametrize("spec", [EASY, HARD], ids=lambda spec: spec.name)
def test_overlap_is_limited(spec):
    painter = DigitsPainter(spec)
    for index in range(spec.num_images):
        boxes = Boxes(torch.tensor([box for _, box in painter.paint(index)[1]], dtype=torch.float64))
        own = torch.eye(len(boxes))
        assert (pairwise_iou(boxes, boxes) - own).max() <= spec.max_iou
        assert (pairwise_ioa(boxes, boxes) - own).max() <= spec.max_cover


@pytest.mark.parametrize(
    "contrast, lumas",
    [(50.0, {50, 150}), (120.0, {220}), (180.0, {255})],
    ids=["both sides have room", "one side has room", "as much as fits"],
)
def test_contrast(grey_background, contrast, lumas):
    painter = DigitsPainter(DigitsSpec("one", "train", 20, digits_per_image=(1, 1), contrast=(contrast, contrast)))
    found = set()
    for index in range(20):
        luma = painter.paint(index)[0] @ np.array([0.114, 0.587, 0.299])
        ink = luma.flat[np.abs(luma - GREY).argmax()]
        nearest = min(lumas, key=lambda each: abs(each - ink))
        assert abs(ink - nearest) <= 0.5, "a channel is rounded"
        found.add(nearest)
    assert found == lumas


def test_distractors_carry_no_label(grey_background):
    spec = DigitsSpec("pieces", "train", 1, digits_per_image=(0, 0), distractors_per_image=(4, 4))
    image, labels = DigitsPainter(spec).paint(0)
    assert labels == []
    assert (np.abs(image.astype(int) - GREY).max(axis=2) > 40).sum() > 100


def test_distractors_are_no_digits():
    scans, labels = digits_glyphs.load_scans("val")
    pieces, again = (
        digits_glyphs.make_distractors(scans, labels, 30, np.random.default_rng(0)) for _ in range(2)
    )
    assert pieces.shape == (30, 8, 8) and np.array_equal(pieces, again)

    def nearest(glyphs):
        """Cosine of each to the most similar real scan that is not itself."""
        normalised, references = (
            each.reshape(len(each), -1) / np.linalg.norm(each, axis=(1, 2))[:, None]
            for each in (glyphs, digits_glyphs.load_scans("all")[0])
        )
        cosines = normalised @ references.T
        return np.where(cosines > 1.0 - 1e-9, 0.0, cosines).max(axis=1)

    assert nearest(pieces).max() < np.quantile(nearest(scans), 0.1)
    assert digits_glyphs.make_distractors(scans, labels, 0, np.random.default_rng(0)).shape == (0, 8, 8)


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
