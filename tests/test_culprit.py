"""The key that is to blame for a failure is found by putting defaults in its place."""

import pytest
from helpers import tiny_cfg

from qmimic_d2.engine.checks.culprit import explained

MODEL = ["MODEL."]


def raised(error):
    """The error as it comes out of a part of a run, with its traceback."""
    try:
        raise error
    except type(error) as caught:
        return caught


def test_the_key_whose_default_helps_is_named():
    cfg = tiny_cfg("MODEL.RPN.NMS_THRESH", 0.9)
    tried = []

    def attempt(cfg):
        tried.append(cfg.MODEL.RPN.NMS_THRESH)
        if cfg.MODEL.RPN.NMS_THRESH > 0.8:
            raise RuntimeError("too high")

    found = explained(raised(RuntimeError("too\nhigh")), cfg, "the rehearsal", attempt, MODEL)
    assert str(found) == (
        "MODEL.RPN.NMS_THRESH is 0.9, with which the rehearsal fails: RuntimeError: too high. It succeeds with "
        "Detectron2's default, 0.7; correct the value"
    )
    assert tried[0] == 0.9 and tried[-1] == 0.7
    assert cfg.MODEL.RPN.NMS_THRESH == 0.9


def test_what_looks_like_a_mistake_is_tried_first():
    cfg = tiny_cfg("MODEL.RPN.NMS_THRESH", -0.9)
    tried = []

    def attempt(cfg):
        tried.append(cfg)
        if cfg.MODEL.RPN.NMS_THRESH < 0:
            raise RuntimeError

    explained(raised(RuntimeError()), cfg, "the rehearsal", attempt, MODEL)
    assert len(tried) == 2


def test_an_error_that_names_a_key_is_left_alone():
    error = ValueError("MODEL.RPN.NMS_THRESH is 7; give less")
    assert explained(error, tiny_cfg(), "the rehearsal", lambda cfg: None, MODEL) is error


def test_an_unknown_name_of_a_registry():
    error = KeyError("No object named 'foo' found in 'ROI_HEADS' registry!")
    found = explained(error, tiny_cfg("MODEL.ROI_HEADS.NAME", "foo"), "building", lambda cfg: None, MODEL)
    assert str(found).startswith("MODEL.ROI_HEADS.NAME is 'foo', with which building fails: KeyError")


def fails(cfg):
    raise KeyError("conv9")


def test_a_name_that_the_error_quotes():
    found = explained(raised(KeyError("conv9")), tiny_cfg("MODEL.RPN.IN_FEATURES", ["conv9"]), "building", fails, MODEL)
    assert str(found).startswith("MODEL.RPN.IN_FEATURES is ['conv9'], with which building fails: KeyError: 'conv9'")


def test_no_single_key_is_to_blame():
    found = explained(raised(RuntimeError("no")), tiny_cfg(), "building", fails, ["MODEL.VGG."])
    message = str(found)
    assert "building fails: RuntimeError: no. No single key is to blame" in message
    assert "MODEL.VGG.DEPTH 11" in message and "MODEL.RPN" not in message


def test_an_assertion_without_a_word_gives_its_line():
    with pytest.raises(AssertionError) as caught:
        assert tiny_cfg() is None
    caught.value.args = ()
    found = explained(caught.value, tiny_cfg(), "building", fails, MODEL)
    assert "AssertionError: assert tiny_cfg() is None (test_culprit.py)" in str(found)


def test_a_failure_of_the_loaded_weights_blames_no_key():
    """With initial weights the part succeeds, so no other value may be said to help."""
    found = explained(raised(RuntimeError("nan")), tiny_cfg(), "training", lambda cfg: None, MODEL)
    assert "No single key is to blame" in str(found)
