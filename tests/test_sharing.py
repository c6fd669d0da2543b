"""Students of one run share their teacher, and only what fits is shared."""

import torch
from helpers import batch, tiny_cfg, write_teacher

from qmimic_d2.modeling.mimic import teacher
from qmimic_d2.modeling.mimic.sharing import forget_teacher, one_teacher, shared
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher, teacher_shapes
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


def test_students_of_one_teacher(tmp_path, monkeypatch):
    written, read = write_teacher(tmp_path), []
    stock = teacher.read_checkpoint
    monkeypatch.setattr(teacher, "read_checkpoint", lambda *args, **more: read.append(args) or stock(*args, **more))
    cfg, other = tiny_cfg(*written.options), tiny_cfg(*written.options, "MODEL.QMIMIC.QUANTIZER.STRIDE", 0.5)
    alone = [FrozenTeacher(each).features(batch())["conv5"] for each in (cfg, other)]
    assert not torch.equal(*alone) and len(read) == 2
    with one_teacher():
        assert load_teacher_config(cfg) is load_teacher_config(other)
        assert teacher_shapes(cfg)["conv5"].channels == 32
        teachers = [FrozenTeacher(each) for each in (cfg, other)]
        # each quantizes as its own student says
        assert all(torch.equal(each.features(batch())["conv5"], own) for each, own in zip(teachers, alone))
        assert teacher_shapes(cfg)["conv5"].channels == 32
    assert len(read) == 3


def test_another_teacher_is_read(tmp_path):
    (tmp_path / "other").mkdir()
    first, second = write_teacher(tmp_path), write_teacher(tmp_path / "other", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0])
    with one_teacher():
        assert load_teacher_config(tiny_cfg(*first.options)).path == first.config_file
        assert load_teacher_config(tiny_cfg(*second.options)).pixel_mean == (1.0, 2.0, 3.0)
