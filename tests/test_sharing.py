"""Students of one run share their teacher, and only what fits is shared."""

import torch
from helpers import batch, tiny_cfg, write_teacher

from qmimic_d2.modeling.mimic.sharing import forget_teacher, one_teacher, shared
from qmimic_d2.modeling.mimic.teacher import build_teacher, teacher_shapes
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config


def test_outside_of_a_block_nothing_is_shared():
    assert shared("a", 1, object) is not shared("a", 1, object)


def test_the_last_of_each_kind_and_settings():
    with one_teacher():
        first = shared("a", 1, object)
        assert shared("a", 1, object) is first and shared("b", 1, object) is not first
        with one_teacher():
            assert shared("a", 1, object) is first
        assert shared("a", 2, object) is not first
        second = shared("a", 1, object)
        assert second is not first
        forget_teacher()
        assert shared("a", 1, object) is not second
    assert shared("a", 1, object) is not shared("a", 1, object)
    forget_teacher()


def test_students_with_the_same_settings(tmp_path):
    written = write_teacher(tmp_path)
    cfg, other = tiny_cfg(*written.options), tiny_cfg(*written.options, "MODEL.QMIMIC.QUANTIZER.STRIDE", 0.5)
    with one_teacher():
        assert load_teacher_config(cfg) is load_teacher_config(other)
        assert teacher_shapes(cfg)["conv5"].channels == 32
        teacher = build_teacher(cfg)
        assert build_teacher(cfg.clone()) is teacher
        codes = teacher.features(batch())["conv5"]
        assert build_teacher(other) is not teacher
        # a teacher of its own, whose backbone has its own quantizer alone
        assert not torch.equal(build_teacher(other).features(batch())["conv5"], codes)
        assert torch.equal(teacher.features(batch())["conv5"], codes)
        assert teacher_shapes(cfg)["conv5"].channels == 32
    assert build_teacher(cfg) is not build_teacher(cfg)


def test_another_teacher_is_read(tmp_path):
    (tmp_path / "other").mkdir()
    first, second = write_teacher(tmp_path), write_teacher(tmp_path / "other", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0])
    with one_teacher():
        assert load_teacher_config(tiny_cfg(*first.options)).path == first.config_file
        assert load_teacher_config(tiny_cfg(*second.options)).pixel_mean == (1.0, 2.0, 3.0)
