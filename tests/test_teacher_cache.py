"""The teacher cache: losses with and without it, what its key sees, damage, size, full disks, kills, its command."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CASCADE,
    MASK_HEAD,
    ONE_STAGE,
    ONE_STAGE_FPN,
    RESNET_FPN,
    RFCN,
    batch,
    seeded_model,
    tiny_cfg,
    training_step,
    write_teacher,
)
from test_command_line import status_of
from tiny_training import ROOT, Recorder, registered_data, training_cfg

from qmimic_d2.engine import Trainer
from qmimic_d2.modeling.mimic.cached_teacher import CachedTeacher, build_teacher, image_key, teacher_identity
from qmimic_d2.modeling.mimic.map_store import MapStore, stored_teachers
from qmimic_d2.modeling.mimic.teacher import FrozenTeacher
from qmimic_d2.modeling.quantizer import QUANTIZER_REGISTRY, UniformQuantizer

CACHE = "MODEL.QMIMIC.TEACHER.CACHE"
QUANTIZER = "MODEL.QMIMIC.QUANTIZER"
FAMILIES = {
    "RCNN": ("RCNN", ()),
    "FPN": ("RCNN", (*RESNET_FPN, f"{QUANTIZER}.SIGNED", True)),
    "R-FCN": ("RCNN", RFCN),
    "Cascade": ("RCNN", CASCADE),
    "Mask": ("RCNN", MASK_HEAD),
    "RetinaNet": ("RetinaNet", ONE_STAGE["RetinaNet"]),
    "RetinaNet, FPN": ("RetinaNet", ONE_STAGE_FPN["RetinaNet"]),
    "FCOS": ("FCOS", ONE_STAGE["FCOS"]),
}
VARIANTS = {
    "plain mimic": ("MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False),
    "clamp": (f"{QUANTIZER}.NAME", "Clamp"),
    "power of two": (f"{QUANTIZER}.NAME", "PowerOfTwo", f"{QUANTIZER}.STRIDE", 0.1),
    "eight codes": (f"{QUANTIZER}.NUM_CODES", 8, f"{QUANTIZER}.STRIDE", 0.1),
    "many codes": (f"{QUANTIZER}.STRIDE", 0.0001),
    "enlarged input": (
        *("MODEL.QMIMIC.TEACHER.INPUT_SCALE", 2.0),
        *("MODEL.QMIMIC.TEACHER.OPTS", ["MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 1]]),
    ),
    "teacher's proposals": ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["teacher_proposals"]),
    "whole map": ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["whole_map"]),
}


LAZY = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from qmimic_d2.modeling.backbone.vgg import VGG
model = L(GeneralizedRCNN)(
    backbone=L(VGG)(depth=11, width_divisor=16),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
)
train = dict(init_checkpoint={weights!r})
"""


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {False: write_teacher(folder), True: write_teacher(folder, *RESNET_FPN, name="fpn")}


def student_cfg(teacher, cache, *options, family="RCNN"):
    return tiny_cfg(*teacher.options, CACHE, str(cache), *options, meta_architecture=f"QuantMimic{family}")


def step_of(cfg, inputs):
    """Losses of one step, and the mimic's teacher."""
    model = seeded_model(cfg)
    return training_step(model, inputs).losses, model.mimic.teacher


def assert_equal(losses, others):
    assert set(losses) == set(others)
    for name, loss in losses.items():
        assert torch.equal(loss, others[name]), name


CASES = {
    **{name: (family, options) for name, (family, options) in FAMILIES.items()},
    **{name: ("RCNN", options) for name, options in VARIANTS.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_cold_warm_and_without_a_cache_have_the_same_losses(teachers, tmp_path, monkeypatch, case):
    family, options = CASES[case]
    teacher = teachers["MODEL.FPN.IN_FEATURES" in options]
    # images of two sizes go through the teacher one at a time without a cache, too
    inputs = batch((64, 64), (48, 80))
    expected, _ = step_of(student_cfg(teacher, "", *options, family=family), inputs)
    cfg = student_cfg(teacher, tmp_path / "cache", *options, family=family)
    cold, computing = step_of(cfg, inputs)
    assert isinstance(computing, CachedTeacher) and computing.is_loaded
    assert (computing.store.hits, computing.store.misses) == (0, 2)

    def forbidden(*args, **kwargs):
        raise AssertionError("the teacher is loaded")

    monkeypatch.setattr("qmimic_d2.modeling.mimic.cached_teacher.FrozenTeacher", forbidden)
    monkeypatch.setattr("qmimic_d2.modeling.mimic.teacher_config.TeacherConfig.take_backbone", forbidden)
    warm, reading = step_of(cfg, inputs)
    assert (reading.store.hits, reading.store.misses) == (2, 0) and not reading.is_loaded
    assert any(name.startswith("loss_mimic") and loss > 0.0 for name, loss in expected.items())
    assert_equal(expected, cold)
    assert_equal(cold, warm)


def test_maps_do_not_depend_on_the_batch(teachers, tmp_path):
    cfg = student_cfg(teachers[False], tmp_path)
    inputs = batch((64, 64), (64, 64), (64, 64))
    together = build_teacher(cfg).features(inputs)["conv5"]
    cfg = student_cfg(teachers[False], tmp_path / "other")
    alone = [build_teacher(cfg).features([each])["conv5"][0] for each in inputs]
    assert all(torch.equal(one, other) for one, other in zip(together, alone))


def test_codes_take_a_byte_each(teachers, tmp_path):
    """Before compression; a float takes four."""
    cfg = student_cfg(teachers[False], tmp_path, f"{QUANTIZER}.STRIDE", 0.05)
    teacher, (one,) = build_teacher(cfg), batch((64, 64))[:1]
    maps = teacher.features([one])["conv5"]
    array = teacher.store.get(image_key(one["image"]))["map conv5"]
    assert array.dtype == np.uint8 and array.shape == tuple(maps[0].shape)
    assert array.max() > 1 and teacher.store.bytes_written < maps.numel() * 4


# ------------------------------------------------------------------------------------------------- the key


def test_the_key_sees_what_decides_on_a_map(teachers, tmp_path):
    teacher = teachers[False]
    other = write_teacher(tmp_path, name="other", seed=12)
    moved = tmp_path / "moved.yaml"
    moved.write_text(Path(teacher.config_file).read_text() + "OUTPUT_DIR: elsewhere\n")
    base = teacher_identity(student_cfg(teacher, "c"))
    assert base == teacher_identity(student_cfg(teacher, "elsewhere", "SOLVER.BASE_LR", 0.5))
    assert base == teacher_identity(student_cfg(teacher, "c", "MODEL.QMIMIC.TEACHER.CONFIG_FILE", str(moved)))
    changes = [
        ("MODEL.QMIMIC.TEACHER.WEIGHTS", other.weights),
        ("MODEL.QMIMIC.TEACHER.OPTS", ["MODEL.PIXEL_STD", [2.0, 2.0, 2.0]]),
        ("MODEL.QMIMIC.TEACHER.INPUT_SCALE", 2.0),
        (f"{QUANTIZER}.STRIDE", 0.5),
        (f"{QUANTIZER}.NUM_CODES", 4),
        ("MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False),
        ("MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["conv4"]),
        ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["teacher_proposals"]),
        ("INPUT.FORMAT", "RGB"),
    ]
    identities = [teacher_identity(student_cfg(teacher, "c", *change)) for change in changes]
    assert len({base, *identities}) == 1 + len(changes)


class ShrinkingQuantizer(UniformQuantizer):
    """A project's own, whose codes depend on more than the features."""


def test_codes_of_another_projects_quantizer_are_not_kept(teachers, tmp_path, monkeypatch):
    monkeypatch.setitem(QUANTIZER_REGISTRY._obj_map, "ShrinkingQuantizer", ShrinkingQuantizer)
    cfg = student_cfg(teachers[False], tmp_path / "cache", f"{QUANTIZER}.NAME", "Shrinking")
    with pytest.raises(ValueError, match=r"MODEL.QMIMIC.TEACHER.CACHE is .*ShrinkingQuantizer.*QUANTIZE_TEACHER False"):
        build_teacher(cfg)
    assert not (tmp_path / "cache").exists()
    cfg.MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER = False
    assert isinstance(build_teacher(cfg), CachedTeacher)


def test_a_lazy_teacher_has_a_key_too(tmp_path):
    teacher = write_teacher(tmp_path)
    path, text = tmp_path / "teacher.py", LAZY.format(weights=teacher.weights)
    identities = []
    for changed in (text, text, text.replace("16", "8"), text.replace("[103.53, 116.28, 123.675]", "[0.0, 0.0, 0.0]")):
        path.write_text(changed)
        options = ("MODEL.QMIMIC.TEACHER.CONFIG_FILE", str(path))
        identities.append(teacher_identity(student_cfg(teacher, "c", *options)))
    assert identities[0] == identities[1] and len(set(identities)) == 3


def test_another_pixel_shape_or_precision_is_another_image():
    pixels = torch.zeros(3, 4, 6, dtype=torch.uint8)
    changed = pixels.clone()
    changed[2, 3, 5] = 1
    keys = [
        image_key(pixels),
        image_key(changed),
        image_key(pixels.reshape(3, 6, 4)),
        image_key(pixels.float()),
        image_key(pixels, torch.bfloat16),
    ]
    assert len(set(keys)) == len(keys)
    assert image_key(pixels) == image_key(pixels.flip(0).flip(0))


def test_autocast_has_maps_of_its_own(teachers, tmp_path):
    cfg = student_cfg(teachers[False], tmp_path, "MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False)
    inputs = batch((64, 64))[:1]
    exact = build_teacher(cfg).features(inputs)["conv5"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, again = (build_teacher(cfg).features(inputs)["conv5"] for _ in range(2))
        expected = FrozenTeacher(cfg).features(inputs)["conv5"]
    assert rounded.dtype == expected.dtype and torch.equal(rounded, expected) and torch.equal(rounded, again)
    assert not torch.equal(exact, rounded.float())


# ------------------------------------------------------------------------------------------------- the store

ARRAYS = {"map p3": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "proposals": np.zeros((0, 4), np.float32)}


def test_arrays_come_back_as_they_went(tmp_path):
    store = MapStore(str(tmp_path), "teacher", 10**9)
    assert store.get("00ff") is None
    store.put("00ff", ARRAYS)
    found = MapStore(str(tmp_path), "teacher", 10**9).get("00ff")
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert MapStore(str(tmp_path), "another", 10**9).get("00ff") is None


def files_of(folder):
    return sorted(Path(folder).rglob("*.map"))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "another's", "text"])
def test_a_damaged_entry_is_named_and_made_anew(teachers, tmp_path, caplog, damage):
    cfg, inputs = student_cfg(teachers[False], tmp_path), batch((64, 64), (48, 80))
    expected = build_teacher(cfg).features(inputs)["conv5"]
    first, second = files_of(tmp_path)
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 4
    damaged = {
        "cut": first.read_bytes()[:-3],
        "bit": bytes(content),
        "empty": b"",
        "another's": second.read_bytes(),
        "text": b"x" * 100,
    }
    first.write_bytes(damaged[damage])
    teacher = build_teacher(cfg)
    assert torch.equal(teacher.features(inputs)["conv5"], expected)
    assert str(first) in caplog.text and "damaged" in caplog.text
    assert (teacher.store.hits, teacher.store.misses) == (1, 1)
    assert build_teacher(cfg).features(inputs)["conv5"].equal(expected) and len(files_of(tmp_path)) == 2


def test_what_was_used_longest_ago_makes_room(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8)  # which nothing compresses
    store = MapStore(str(tmp_path), "teacher", 45_000)
    for number in range(4):
        store.put(f"{number:04d}", {"map": noise + np.uint8(number)})
        path = files_of(tmp_path)[number]
        os.utime(path, (1000.0 * (number + 1),) * 2)
    assert store.get("0000") is not None  # used now
    store.put("0004", {"map": noise})
    kept = [number for number in range(5) if store.get(f"{number:04d}") is not None]
    assert kept == [0, 2, 3, 4]  # nine tenths of the limit, the new one included
    assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 45_000


def test_a_full_disk_stops_the_caching_and_not_the_training(teachers, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    cfg, inputs = student_cfg(teachers[False], tmp_path / "cache"), batch((64, 64), (48, 80))
    expected, _ = step_of(student_cfg(teachers[False], ""), inputs)
    monkeypatch.setattr("qmimic_d2.modeling.mimic.map_store.os.replace", full)
    losses, teacher = step_of(cfg, inputs)
    assert_equal(expected, losses)
    assert caplog.text.count("No space left on device") == 1 and files_of(tmp_path) == []
    assert [path for path in tmp_path.rglob("*.part")] == []


def test_a_limit_that_is_none_is_refused(teachers, tmp_path):
    cfg = student_cfg(teachers[False], tmp_path, "MODEL.QMIMIC.TEACHER.CACHE_GB", 0.0)
    with pytest.raises(ValueError, match="MODEL.QMIMIC.TEACHER.CACHE_GB is 0.0"):
        build_teacher(cfg)


WRITER = """
import sys
import numpy as np
from qmimic_d2.modeling.mimic.map_store import MapStore
store = MapStore(sys.argv[1], "teacher", int(sys.argv[2]))
generator = np.random.default_rng(int(sys.argv[3]))
print("begun", flush=True)
while True:
    number = int(generator.integers(40))
    expected = np.random.default_rng(number).integers(0, 9, 30_000, dtype=np.uint8)
    found = store.get(f"{number:04d}")
    if found is None:
        store.put(f"{number:04d}", {"map": expected})
    elif not np.array_equal(found["map"], expected):
        print("wrong", flush=True)
"""


@pytest.mark.slow
def test_killed_writers_leave_nothing_wrong(tmp_path):
    """Twenty kills of one of two writers, in a folder that is too small for all entries."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def writer(seed):
        command = [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path), "300000", str(seed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "begun\n"
        return process

    generator = np.random.default_rng(1)
    running, texts = [writer(0)], []
    try:
        for number in range(20):
            running.append(writer(1 + number))
            time.sleep(float(generator.uniform(0.0, 0.2)))
            victim = running.pop(0)
            victim.send_signal(signal.SIGKILL)
            texts.append(victim.stdout.read())
            victim.wait()
    finally:
        for process in running:
            process.kill()
            texts.append(process.stdout.read())
            process.wait()
    assert not any(texts)
    store, num_right = MapStore(str(tmp_path), "teacher", 10**9), 0
    for number in range(40):
        found = store.get(f"{number:04d}")
        if found is not None:
            num_right += 1
            expected = np.random.default_rng(number).integers(0, 9, 30_000, dtype=np.uint8)
            assert np.array_equal(found["map"], expected)
    assert num_right >= 5 and store.misses == 40 - num_right
    assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 350_000  # two writers may both be at the limit


# ---------------------------------------------------------------------------------- training and the command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with registered_data(tmp_path_factory.mktemp("data"), "tiny_cache", count=4) as name:
        yield name


def trained(folder, data, teacher, cache, *options):
    recorder = Recorder()
    cfg = training_cfg(folder, data, CACHE, str(cache), "SEED", 3, *options, teacher=teacher)
    torch.manual_seed(3)
    trainer = Trainer(cfg)
    trainer.register_hooks([recorder])
    trainer.train()
    return recorder.losses, trainer


def test_trainings_with_a_cold_and_a_warm_cache_are_equal(teachers, data, tmp_path, caplog):
    cold, _ = trained(tmp_path / "cold", data, teachers[False], tmp_path / "cache")
    caplog.set_level("INFO")
    warm, trainer = trained(tmp_path / "warm", data, teachers[False], tmp_path / "cache")
    assert cold == warm and len(cold) == 6
    assert not trainer.model.mimic.teacher.is_loaded
    assert "Teacher cache: 12 of 12 images were known" in caplog.text
    assert '"qmimic/teacher_cache_hits": 1.0' in (tmp_path / "warm" / "metrics.json").read_text()


def test_fill_show_verify_and_empty(teachers, data, tmp_path, capsys):
    cache = tmp_path / "cache"
    cfg = training_cfg(tmp_path / "run", data, CACHE, str(cache), teacher=teachers[False])
    config_file = tmp_path / "student.yaml"
    config_file.write_text(cfg.dump())
    parts = ("0/2", "1/2")
    for part in parts:
        assert status_of("cache", "fill", "--config-file", config_file, "--shard", part, "--draws", 12) == 0
    assert capsys.readouterr().out.count("images: 2, drawn 12 times each. Teacher cache: ") == len(parts)
    (stored,) = stored_teachers(str(cache))
    # two sizes and a flip of each image; seldom is one of the four not among twelve draws
    assert 10 <= stored.num_entries <= 16
    _, trainer = trained(tmp_path / "run", data, teachers[False], cache)
    assert trainer.model.mimic.teacher.store.hits >= 8

    assert status_of("cache", "show", cache) == 0
    shown = capsys.readouterr().out
    assert stored.identity in shown and teachers[False].weights in shown and "UniformQuantizer" in shown
    assert status_of("cache", "verify", cache) == 0
    victim = files_of(cache)[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert status_of("cache", "verify", cache) == 1
    assert f"damaged, and removed: {victim}" in capsys.readouterr().out and not victim.exists()
    (cache / "mine.txt").write_text("stays")
    assert status_of("cache", "empty", cache) == 0
    assert [path.name for path in cache.rglob("*")] == ["mine.txt"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["show", "nowhere"], "nowhere"),
        (["verify", "nowhere"], "there is no folder 'nowhere'"),
        (["fill", "--config-file", "STUDENT"], "CACHE is ''"),
        (["fill", "--config-file", "STUDENT", "--shard", "2/2"], "give I/N with I below N"),
        (["fill", "--config-file", "STUDENT", CACHE, "x", "MODEL.QMIMIC.TEACHER.CONFIG_FILE", ""], "CONFIG_FILE is ''"),
    ],
)
def test_mistakes(teachers, data, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    config_file = tmp_path / "student.yaml"
    config_file.write_text(training_cfg(tmp_path / "run", data, teacher=teachers[False]).dump())
    assert status_of("cache", *(str(config_file) if each == "STUDENT" else each for each in arguments)) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.yaml"]
