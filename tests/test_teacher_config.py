"""The teacher's own config: where it is found, what it gives, and what is refused."""

import logging
import textwrap

import pytest
import torch
import yaml
from helpers import RESNET_FPN, image, randomize, tiny_cfg, write_teacher
from teachers import CONFIG_FILE, INPUT_SCALE, NO_QUANTIZER, OPTS, P3_TO_P5, inputs, preprocessed

from qmimic_d2.modeling.mimic.teacher import FrozenTeacher, teacher_feature_names, teacher_shapes
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config

# ---------------------------------------------------------------------------------- the teacher's config


def test_a_yaml_gives_its_own_preprocessing_and_weights(tmp_path):
    written = write_teacher(
        tmp_path,
        *("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]),
        *("MODEL.PIXEL_STD", [4.0, 5.0, 6.0]),
        *("INPUT.FORMAT", "RGB"),
        *("MODEL.WEIGHTS", "somewhere.pth"),
    )
    config = load_teacher_config(tiny_cfg(*written.options))
    assert config.path == written.config_file
    assert config.pixel_mean == (1.0, 2.0, 3.0)
    assert config.pixel_std == (4.0, 5.0, 6.0)
    assert config.input_format == "RGB"
    assert config.weights == "somewhere.pth"
    assert config.build_backbone().output_shape()["conv5"].channels == 32
    assert yaml.safe_load(config.dump)["MODEL"]["PIXEL_MEAN"] == [1.0, 2.0, 3.0]


def test_opts_override_the_yaml_and_are_in_its_dump(tmp_path):
    written = write_teacher(tmp_path)
    cfg = tiny_cfg(*written.options, OPTS, ["MODEL.VGG.WIDTH_DIVISOR", 32, "INPUT.FORMAT", "RGB"])
    config = load_teacher_config(cfg)
    assert config.build_backbone().output_shape()["conv5"].channels == 16
    assert config.input_format == "RGB"
    assert yaml.safe_load(config.dump)["MODEL"]["VGG"]["WIDTH_DIVISOR"] == 32


def test_a_yaml_of_stock_detectron2_will_do(tmp_path):
    path = tmp_path / "stock.yaml"
    path.write_text("MODEL:\n  BACKBONE:\n    NAME: build_vgg_backbone\n  PIXEL_MEAN: [1.0, 2.0, 3.0]\n")
    assert load_teacher_config(tiny_cfg(CONFIG_FILE, str(path))).pixel_mean == (1.0, 2.0, 3.0)


def test_the_config_is_found_from_the_working_directory(tmp_path, monkeypatch):
    written = write_teacher(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_teacher_config(tiny_cfg(CONFIG_FILE, "teacher.yaml")).path == written.config_file


def test_the_student_decides_on_the_device(tmp_path):
    written = write_teacher(tmp_path)
    config = load_teacher_config(tiny_cfg(*written.options, OPTS, ["MODEL.DEVICE", "cuda"]))
    assert yaml.safe_load(config.dump)["MODEL"]["DEVICE"] == "cpu"


def test_reading_the_config_leaves_the_students_alone(tmp_path):
    cfg = tiny_cfg(*write_teacher(tmp_path).options)
    before = cfg.dump()
    cfg.freeze()
    load_teacher_config(cfg)
    assert cfg.dump() == before


def test_a_missing_config_names_key_value_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_teacher_config(tiny_cfg(CONFIG_FILE, "absent.yaml"))
    for word in (CONFIG_FILE, "'absent.yaml'", str(tmp_path / "absent.yaml")):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, word",
    [
        ("MODEL: [unclosed", "ParserError"),
        ("\x00\x01\x02", "ReaderError"),
        ("MODEL:\n  PIXEL_MAEN: [1.0, 2.0, 3.0]\n", "'MODEL.PIXEL_MAEN': 'PIXEL_MEAN'"),
        ("MODEL:\n  PIXEL_MEAN: 3\n", "PIXEL_MEAN"),
        ("just a sentence", "Error"),
    ],
)
def test_an_unreadable_config_names_key_value_and_reason(tmp_path, text, word):
    path = tmp_path / "teacher.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_teacher_config(tiny_cfg(CONFIG_FILE, str(path)))
    for each in (CONFIG_FILE, str(path), word, "Give the YAML"):
        assert each in str(caught.value)


def test_a_missing_base_is_a_missing_file(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text("_BASE_: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match="gone.yaml") as caught:
        load_teacher_config(tiny_cfg(CONFIG_FILE, str(path)))
    assert CONFIG_FILE in str(caught.value)


@pytest.mark.parametrize("opts", [["MODEL.NO_SUCH_KEY", 1], ["MODEL.WEIGHTS"], ["MODEL.VGG.DEPTH", "deep"]])
def test_opts_that_do_not_fit_are_named(tmp_path, opts):
    with pytest.raises(ValueError) as caught:
        load_teacher_config(tiny_cfg(*write_teacher(tmp_path).options, OPTS, opts))
    assert OPTS in str(caught.value) and str(opts) in str(caught.value)


def test_other_codes_of_the_teacher_are_told_once(tmp_path, caplog):
    written = write_teacher(
        tmp_path, *("MODEL.META_ARCHITECTURE", "QuantRCNN"), *("MODEL.QMIMIC.QUANTIZER.STRIDE", 2.0)
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            load_teacher_config(tiny_cfg(*written.options))
    warnings = [record.message for record in caplog.records if "QUANTIZER" in record.message]
    assert len(warnings) == 1
    assert written.config_file in warnings[0] and "'STRIDE': (2.0, 0.25)" in warnings[0]
    assert "NUM_CODES" not in warnings[0]


def test_codes_of_a_teacher_without_a_quantizer_are_no_news(tmp_path, caplog):
    written = write_teacher(tmp_path, "MODEL.QMIMIC.QUANTIZER.STRIDE", 2.0)
    with caplog.at_level(logging.WARNING):
        load_teacher_config(tiny_cfg(*written.options))
    assert caplog.records == []


LAZY_CONFIG = """
    from detectron2.config import LazyCall as L
    from detectron2.modeling.backbone import BasicStem, ResNet
    from detectron2.modeling.meta_arch import GeneralizedRCNN

    model = L(GeneralizedRCNN)(
        backbone=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=18, stride_in_1x1=False, norm="BN"),
            out_features=["stem"],
        ),
        pixel_mean=[1.0, 2.0, 3.0],
        pixel_std=[4.0, 5, 6.0],
        input_format="RGB",
    )
    model.backbone.stages = []
    train = dict(init_checkpoint="{weights}")
"""


def write_lazy_teacher(folder, text=LAZY_CONFIG):
    """A LazyConfig teacher: the stem of a ResNet, 8 channels at stride 4."""
    path, weights = folder / "teacher.py", folder / "lazy.pth"
    path.write_text(textwrap.dedent(text).replace("{weights}", str(weights)))
    backbone = load_teacher_config(tiny_cfg(CONFIG_FILE, str(path))).build_backbone()
    torch.manual_seed(0)
    randomize(backbone)
    torch.save({"model": {f"backbone.{k}": v for k, v in backbone.state_dict().items()}}, weights)
    return str(path), backbone.eval()


def test_a_lazy_config(tmp_path):
    path, backbone = write_lazy_teacher(tmp_path)
    cfg = tiny_cfg(CONFIG_FILE, path, *NO_QUANTIZER, "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["stem"])
    config = load_teacher_config(cfg)
    assert (config.pixel_mean, config.pixel_std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert (config.input_format, config.dump) == ("RGB", "")
    shape = teacher_shapes(cfg)["stem"]
    assert (shape.channels, shape.stride) == (8, 4.0)
    pixels = image(32, 32)
    features = FrozenTeacher(cfg).features(inputs(pixels))["stem"]
    with torch.no_grad():
        expected = backbone(preprocessed(pixels.flip(0), [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])[None])["stem"]
    torch.testing.assert_close(features, expected)


def test_opts_of_a_lazy_config(tmp_path):
    path, _ = write_lazy_teacher(tmp_path)
    opts = ["model.backbone.stem.out_channels=4", "train.init_checkpoint=other.pth", "model.input_format=BGR"]
    config = load_teacher_config(tiny_cfg(CONFIG_FILE, path, OPTS, opts))
    assert config.build_backbone().output_shape()["stem"].channels == 4
    assert (config.weights, config.input_format) == ("other.pth", "BGR")


def test_a_lazy_config_without_format_and_weights(tmp_path):
    text = LAZY_CONFIG.replace('input_format="RGB",', "").replace("train = ", "other = ")
    path, _ = write_lazy_teacher(tmp_path, text)
    config = load_teacher_config(tiny_cfg(CONFIG_FILE, path))
    assert (config.input_format, config.weights) == ("BGR", "")


@pytest.mark.parametrize("text", ["model = ", "raise RuntimeError('stop')", "x = 1"])
def test_a_broken_lazy_config_is_named(tmp_path, text):
    path = tmp_path / "teacher.py"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_teacher_config(tiny_cfg(CONFIG_FILE, str(path)))
    assert CONFIG_FILE in str(caught.value) and str(path) in str(caught.value)


# -------------------------------------------------------------------------------------- names and shapes


def test_feature_names_default_to_the_students():
    cfg = tiny_cfg()
    assert teacher_feature_names(cfg) == ("conv5",)
    cfg.MODEL.QMIMIC.MIMIC.IN_FEATURES = ["conv4"]
    assert teacher_feature_names(cfg) == ("conv4",)
    cfg.MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES = ["res4"]
    assert teacher_feature_names(cfg) == ("res4",)


def test_shapes_come_from_the_config_alone(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text(tiny_cfg(*RESNET_FPN).dump())
    shapes = teacher_shapes(tiny_cfg(CONFIG_FILE, str(path), *P3_TO_P5))
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {
        "p3": (8, 8.0),
        "p4": (8, 16.0),
        "p5": (8, 32.0),
    }


def test_strides_are_in_pixels_of_the_students_image(tmp_path):
    written = write_teacher(tmp_path, "MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 1])
    assert teacher_shapes(tiny_cfg(*written.options))["conv5"].stride == 16
    assert teacher_shapes(tiny_cfg(*written.options, INPUT_SCALE, 2.0))["conv5"].stride == 8


def test_an_unknown_teacher_feature_names_key_and_choice(tmp_path):
    cfg = tiny_cfg(*write_teacher(tmp_path).options, "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["res4"])
    for build in (teacher_shapes, FrozenTeacher):
        with pytest.raises(ValueError) as caught:
            build(cfg)
        for word in ("MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", "res4", "conv5"):
            assert word in str(caught.value)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_input_scale_names_key_value_and_fix(tmp_path, scale):
    cfg = tiny_cfg(*write_teacher(tmp_path).options, INPUT_SCALE, scale)
    for build in (teacher_shapes, FrozenTeacher):
        with pytest.raises(ValueError) as caught:
            build(cfg)
        assert INPUT_SCALE in str(caught.value) and repr(scale) in str(caught.value)
        assert "positive" in str(caught.value)


def test_a_backbone_that_cannot_be_built_names_the_config(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text("MODEL:\n  BACKBONE:\n    NAME: build_of_another_project\n")
    with pytest.raises(ValueError) as caught:
        teacher_shapes(tiny_cfg(CONFIG_FILE, str(path)))
    for word in (CONFIG_FILE, str(path), "build_of_another_project", "import the package"):
        assert word in str(caught.value)
