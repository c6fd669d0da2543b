"""Outputs of a raw network become the detections that Detectron2 makes of them: in numpy, C and JavaScript."""

import ctypes

import numpy as np
import pytest
import torch
from exported import assert_close, random_image
from raw_decoders import CLASSES, SIZE, Decoders, one_stage, raw_description

from qmimic_d2.export.raw.network import RawNetwork

pytestmark = pytest.mark.export

FPN_ANCHORS = (
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.0]], "MODEL.ANCHOR_GENERATOR.OFFSET", 0.3),
    *("MODEL.RETINANET.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0)),
)
CASES = {
    "RetinaNet, one map": ("RetinaNet", (), False),
    "RetinaNet, FPN": ("RetinaNet", FPN_ANCHORS, True),
    "FCOS, one map": ("FCOS", (), False),
    "FCOS, FPN": ("FCOS", (), True),
}
PHOTOS = [SIZE, (50, 33), (480, 640), (300, 100), (1, 200), (7, 9)]


def build(folder, name, *more):
    family, options, has_fpn = CASES[name]
    cfg, model = one_stage(family, *options, *more, has_fpn=has_fpn)
    return Decoders(model, raw_description(cfg, model), folder)


@pytest.fixture(scope="module", params=CASES)
def decoders(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("decoders"), request.param)


def assert_all_close(decoders, outputs, size=SIZE):
    """Every decoder finds what Detectron2 finds, in its order, and something; returns it."""
    expected = decoders.detectron2(outputs, size)
    for decode in decoders.all:
        assert_close(decode(outputs, size), expected, boxes=2e-3, scores=1e-6)
    return expected


@pytest.mark.parametrize("size", PHOTOS)
def test_any_photo(decoders, size):
    found = assert_all_close(decoders, decoders.random(0, logits=3.0, deltas=0.5, centerness=3.0), size)
    assert (found.boxes[:, 2:] <= size[::-1]).all() and (found.boxes >= 0).all()


def test_extreme_boxes(decoders):
    """Beyond the clamp of width and height, and negative distances."""
    assert_all_close(decoders, decoders.random(1, logits=3.0, deltas=60.0, centerness=3.0))


def test_outputs_of_the_network(decoders):
    pixels, _ = decoders.description.input_spec.prepare(random_image(50, 70))
    with torch.no_grad():
        outputs = RawNetwork(decoders.model)(torch.from_numpy(pixels)[None])
    assert_all_close(decoders, dict(zip(decoders.shapes, (each.numpy() for each in outputs))), (50, 70))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("top_k, most", [(7, 100), (1000, 5), (7, 5)])
def test_the_best_of_a_level_and_of_an_image(tmp_path, name, top_k, most):
    node = f"MODEL.{CASES[name][0].upper()}"
    decoders = build(tmp_path, name, f"{node}.TOPK_CANDIDATES_TEST", top_k, "TEST.DETECTIONS_PER_IMAGE", most)
    found = assert_all_close(decoders, decoders.random(2, logits=3.0, deltas=0.5, centerness=3.0))
    assert len(found) == most or len(found) <= top_k * len(decoders.description.decoding.levels)


def test_anchors_are_detectron2s(decoders):
    maps = [torch.zeros(1, 1, level.height, level.width) for level in decoders.description.decoding.levels]
    for level, expected in zip(decoders.description.decoding.levels, decoders.model.anchor_generator(maps)):
        assert (level.grid() == expected.tensor.numpy()).all()


def test_nothing_found(decoders):
    outputs = decoders.filled(logits=-9.0, deltas=0.0, centerness=-9.0)
    for decode in (*decoders.all, decoders.detectron2):
        found = decode(outputs, SIZE)
        assert len(found) == 0 and found.boxes.shape == (0, 4)


def test_a_score_at_the_threshold(decoders):
    """0.5 is the threshold, and a detection scores more."""
    outputs = decoders.filled(logits=0.0, deltas=0.2, centerness=0.0)
    assert [len(decode(outputs, SIZE)) for decode in (*decoders.all, decoders.detectron2)] == [0] * 4
    for index, (name, each) in enumerate(outputs.items()):
        each[0, 0, 0, 0] += 1e-3 * (index + 1) * name.startswith("logits")
    assert len(assert_all_close(decoders, outputs)) == len(decoders.description.decoding.levels)


def test_ties(decoders):
    """Where the order of equal scores cannot matter, Detectron2's boxes; and the decoders always agree on it."""
    outputs = decoders.filled(logits=-9.0, deltas=0.1, centerness=2.0)
    logits = outputs[next(iter(outputs))]
    logits[0, :2, ::3, ::3] = 1.5  # of two classes of the first anchor, apart
    found, *others = [decode(outputs, SIZE) for decode in (*decoders.all, decoders.detectron2)]
    assert len(found) > 6 and len(set(found.scores)) == 1
    assert (found.boxes[0] == found.boxes[1]).all() and found.classes[:2].tolist() == [0, 1]
    for other in others:
        rows, expected = (sorted(zip(each.classes.tolist(), each.boxes.tolist())) for each in (found, other))
        assert [each for each, _ in rows] == [each for each, _ in expected]
        np.testing.assert_allclose([box for _, box in rows], [box for _, box in expected], atol=1e-4)
    many = decoders.filled(logits=1.0, deltas=0.1, centerness=1.0)
    for name, each in many.items():  # three scores, of hundreds of candidates
        each[:] += np.random.default_rng(0).integers(0, 3, each.shape) * name.startswith("logits")
    for outputs in (outputs, many):
        found, *others = [decode(outputs, SIZE) for decode in decoders.all]
        for other in others:
            assert_close(other, found, boxes=1e-4, scores=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite(decoders, value):
    outputs = decoders.random(0, logits=3.0, deltas=0.5, centerness=3.0)
    outputs[list(outputs)[-1]].flat[-1] = value
    for decode in decoders.all:
        with pytest.raises(ValueError, match="outputs are NaN or infinite"):
            decode(outputs, SIZE)


def test_names_in_c(decoders):
    def texts(name, count):
        return [each.decode() for each in (ctypes.c_char_p * count).in_dll(decoders.library, name)]

    assert texts("CLASS_NAMES", 3) == [name for _, name in CLASSES]
    assert texts("OUTPUT_NAMES", len(decoders.shapes)) == list(decoders.shapes)


@pytest.mark.parametrize("size", [*PHOTOS, (1, 1), (4000, 3), (97, 145)])
def test_sizes_in_c(decoders, size):
    height, width = ctypes.c_int(), ctypes.c_int()
    decoders.library.resized_size(*size, ctypes.byref(height), ctypes.byref(width))
    assert (height.value, width.value) == decoders.description.input_spec.resized(*size)
