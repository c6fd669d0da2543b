"""The frozen teacher: its own config, weights and preprocessing, and features that depend on the image alone."""

import copy
import logging
import pickle
import textwrap

import pytest
import torch
import torch.nn.functional as F
import yaml
from detectron2.structures import ImageList
from detectron2.utils.file_io import PathHandler, PathManager
from helpers import RESNET_C4, RESNET_FPN, image, randomize, seeded_model, tiny_cfg, write_teacher
from torch import nn

from qmimic_d2.modeling.mimic.teacher import FrozenTeacher, teacher_feature_names, teacher_shapes
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config
from qmimic_d2.modeling.quantizer import PowerOfTwoQuantizer, UniformQuantizer

CONFIG_FILE = "MODEL.QMIMIC.TEACHER.CONFIG_FILE"
WEIGHTS = "MODEL.QMIMIC.TEACHER.WEIGHTS"
OPTS = "MODEL.QMIMIC.TEACHER.OPTS"
INPUT_SCALE = "MODEL.QMIMIC.TEACHER.INPUT_SCALE"
NO_QUANTIZER = ("MODEL.QMIMIC.QUANTIZER.NAME", "")
P3_TO_P5 = ("MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["p3", "p4", "p5"])


def inputs(*images):
    return [{"image": each} for each in images]


def preprocessed(pixels, mean, std):
    column = (-1, 1, 1)
    return (pixels.float() - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)


def plain_teacher(written, *options):
    """The written teacher without a quantizer."""
    return FrozenTeacher(tiny_cfg(*written.options, *NO_QUANTIZER, *options))


class Brightness(nn.Module):
    """A backbone whose map is the preprocessed image itself, to read preprocessing and padding from."""

    size_divisibility = 0
    padding_constraints = {}

    def __init__(self, size_divisibility=0, padding_constraints=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)
        self.size_divisibility = size_divisibility
        self.padding_constraints = padding_constraints or {}

    def forward(self, x):
        return {"pixels": x * self.weight}

    def output_shape(self):
        return {"pixels": None}


def brightness_teacher(backbone=None, **arguments):
    arguments = {
        "pixel_mean": [0.0, 0.0, 0.0],
        "pixel_std": [1.0, 1.0, 1.0],
        "input_format": "BGR",
        "student_input_format": "BGR",
        **arguments,
    }
    return FrozenTeacher(backbone=backbone or Brightness(), features=["pixels"], **arguments)


# ------------------------------------------------------------------------------- the teacher's config


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


# ----------------------------------------------------------------------------------- names and shapes


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


# ------------------------------------------------------------------------------------------- weights


def test_features_are_those_of_the_saved_detector(tmp_path):
    written = write_teacher(tmp_path)
    batch = inputs(image(64, 64, seed=1), image(64, 64, seed=2))
    model = written.model.eval()
    with torch.no_grad():
        expected = model.backbone(model.preprocess_image(batch).tensor)["conv5"]
    features = plain_teacher(written).features(batch)
    assert list(features) == ["conv5"]
    assert torch.equal(features["conv5"], expected)


def test_the_weights_of_the_yaml_are_the_default(tmp_path):
    written = write_teacher(tmp_path)
    cfg = tiny_cfg(CONFIG_FILE, written.config_file, OPTS, ["MODEL.WEIGHTS", written.weights])
    assert FrozenTeacher(cfg).digest == FrozenTeacher(tiny_cfg(*written.options)).digest


def test_the_digest_tells_weights_apart(tmp_path):
    digests = {
        FrozenTeacher(tiny_cfg(*write_teacher(tmp_path, name=f"t{seed}", seed=seed).options)).digest
        for seed in (1, 2)
    }
    assert len(digests) == 2 and all(len(digest) == 12 for digest in digests)


def test_no_weights_anywhere_names_both_keys(tmp_path):
    written = write_teacher(tmp_path)
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, written.config_file))
    for word in (WEIGHTS, "MODEL.WEIGHTS", written.config_file, "is empty"):
        assert word in str(caught.value)


def test_missing_weights_name_the_key_and_the_path(tmp_path):
    written = write_teacher(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, written.config_file, WEIGHTS, "absent.pth"))
    assert WEIGHTS in str(caught.value) and "absent.pth" in str(caught.value)


def test_truncated_weights_name_the_key_and_the_path(tmp_path):
    written = write_teacher(tmp_path)
    content = open(written.weights, "rb").read()
    (tmp_path / "teacher.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="unreadable or cut short") as caught:
        FrozenTeacher(tiny_cfg(*written.options))
    assert WEIGHTS in str(caught.value) and written.weights in str(caught.value)


def test_weights_of_another_architecture_are_listed(tmp_path):
    vgg = write_teacher(tmp_path, name="vgg")
    name = next(each for each in sorted(vgg.model.state_dict()) if each.startswith("backbone."))
    resnet = write_teacher(tmp_path, *RESNET_C4, name="resnet")
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, vgg.config_file, WEIGHTS, resnet.weights))
    for word in (WEIGHTS, resnet.weights, name, "backbone.res2.0.conv1.weight"):
        assert word in str(caught.value)


def test_weights_of_another_width_are_listed_with_both_shapes(tmp_path):
    narrow = write_teacher(tmp_path, "MODEL.VGG.WIDTH_DIVISOR", 32, name="narrow")
    wide = write_teacher(tmp_path, name="wide")
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(CONFIG_FILE, narrow.config_file, WEIGHTS, wide.weights))
    for word in (WEIGHTS, "(2, 3, 3, 3)", "(4, 3, 3, 3)"):
        assert word in str(caught.value)


def test_a_parameter_that_the_weights_lack_is_listed(tmp_path):
    written = write_teacher(tmp_path)
    state = written.model.state_dict()
    name = next(each for each in state if each.startswith("backbone.") and each.endswith("weight"))
    del state[name]
    torch.save({"model": state}, written.weights)
    with pytest.raises(ValueError) as caught:
        FrozenTeacher(tiny_cfg(*written.options))
    assert name in str(caught.value)


def test_imagenet_weights_are_no_teacher(tmp_path):
    written = write_teacher(tmp_path)
    torch.save(written.model.backbone.state_dict(), written.weights)
    with pytest.raises(ValueError, match="'backbone.'"):
        FrozenTeacher(tiny_cfg(*written.options))


def test_weights_of_a_ddp_model_and_without_a_counter(tmp_path):
    written = write_teacher(tmp_path)
    digest = FrozenTeacher(tiny_cfg(*written.options)).digest
    state = {
        f"module.{name}": tensor
        for name, tensor in written.model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(state, written.weights)
    assert FrozenTeacher(tiny_cfg(*written.options)).digest == digest


def write_zoo_file(written, path):
    """The model as Detectron2's zoo has it: a pickle of numpy arrays without counters."""
    state = {
        name: tensor.numpy()
        for name, tensor in written.model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    with open(path, "wb") as file:
        pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo"}, file, protocol=2)


def test_weights_of_the_model_zoo(tmp_path):
    written = write_teacher(tmp_path)
    path = tmp_path / "model_final_280758.pkl"
    write_zoo_file(written, path)
    zoo = plain_teacher(written, WEIGHTS, str(path))
    batch = inputs(image())
    assert torch.equal(zoo.features(batch)["conv5"], plain_teacher(written).features(batch)["conv5"])


@pytest.fixture
def zoo_of(tmp_path):
    """An address ``testzoo://`` that Detectron2's PathManager resolves below the test's folder."""

    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return ["testzoo://"]

        def _get_local_path(self, path, **kwargs):
            local = tmp_path / path[len("testzoo://") :]
            if not local.exists():
                raise OSError("no such object")
            return str(local)

    PathManager.register_handler(Handler(), allow_override=True)
    yield tmp_path
    PathManager._path_handlers.pop("testzoo://")


def test_weights_by_address(zoo_of):
    written = write_teacher(zoo_of)
    write_zoo_file(written, zoo_of / "model.pkl")
    by_address = plain_teacher(written, WEIGHTS, "testzoo://model.pkl")
    assert by_address.digest
    with pytest.raises(FileNotFoundError) as caught:
        plain_teacher(written, WEIGHTS, "testzoo://gone.pkl")
    for word in (WEIGHTS, "testzoo://gone.pkl", "no such object"):
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------- preprocessing


def test_own_mean_and_std():
    pixels = image(4, 6)
    teacher = brightness_teacher(pixel_mean=[1.0, 2.0, 3.0], pixel_std=[4.0, 5.0, 6.0])
    expected = preprocessed(pixels, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert torch.equal(teacher.features(inputs(pixels))["pixels"][0], expected)


@pytest.mark.parametrize("student, teacher", [("BGR", "RGB"), ("RGB", "BGR")])
def test_channels_are_flipped_before_the_teachers_own_mean(student, teacher):
    pixels = image(4, 6)
    flipped = brightness_teacher(
        pixel_mean=[1.0, 2.0, 3.0], input_format=teacher, student_input_format=student
    )
    expected = pixels.flip(0).float() - torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert torch.equal(flipped.features(inputs(pixels))["pixels"][0], expected)


@pytest.mark.parametrize("order", ["BGR", "RGB", "L"])
def test_equal_channel_orders_are_left_alone(order):
    pixels = image(4, 6)
    teacher = brightness_teacher(input_format=order, student_input_format=order)
    assert torch.equal(teacher.features(inputs(pixels))["pixels"][0], pixels.float())


def test_a_student_of_another_order_gets_the_same_features(tmp_path):
    written = write_teacher(tmp_path)
    pixels = image()
    bgr = plain_teacher(written).features(inputs(pixels))
    rgb = plain_teacher(written, "INPUT.FORMAT", "RGB").features(inputs(pixels.flip(0)))
    assert torch.equal(bgr["conv5"], rgb["conv5"])


@pytest.mark.parametrize("student, teacher", [("L", "BGR"), ("RGB", "YUV-BT.601"), ("RGBA", "RGB")])
def test_orders_that_no_flip_connects_are_refused(student, teacher):
    with pytest.raises(ValueError) as caught:
        brightness_teacher(input_format=teacher, student_input_format=student)
    for word in ("INPUT.FORMAT", repr(student), repr(teacher)):
        assert word in str(caught.value)


def test_the_students_image_is_not_changed():
    pixels = image(4, 6).float()
    before = pixels.clone()
    brightness_teacher(pixel_mean=[1.0, 2.0, 3.0], input_scale=2.0).features(inputs(pixels))
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("scale, size", [(2.0, (8, 12)), (0.5, (2, 3)), (1.5, (6, 9)), (0.01, (1, 1))])
def test_input_scale_is_bilinear(scale, size):
    pixels = image(4, 6)
    features = brightness_teacher(input_scale=scale).features(inputs(pixels))["pixels"]
    expected = F.interpolate(pixels.float()[None], size=size, mode="bilinear", align_corners=False)
    assert torch.equal(features, expected)


def test_a_scaled_teacher_of_twice_the_stride_meets_the_student(tmp_path):
    written = write_teacher(tmp_path, "MODEL.VGG.STAGE_STRIDES", [2, 2, 2, 2, 1])
    features = plain_teacher(written, INPUT_SCALE, 2.0).features(inputs(image(64, 48)))["conv5"]
    assert features.shape == (1, 32, 8, 6)


@pytest.mark.parametrize("backbone", [Brightness(4), Brightness(0, {"size_divisibility": 4})])
def test_images_are_padded_to_the_teachers_own_divisibility(backbone):
    pixels = image(5, 8)
    features = brightness_teacher(backbone, pixel_mean=[9.0, 9.0, 9.0]).features(inputs(pixels))["pixels"]
    assert features.shape == (1, 3, 8, 8)
    assert torch.equal(features[0, :, :5], pixels.float() - 9.0)
    assert torch.equal(features[0, :, 5:], torch.zeros(3, 3, 8))  # after the mean, as Detectron2 does


def test_images_are_padded_to_the_teachers_own_square():
    backbone = Brightness(4, {"square_size": 10})
    assert brightness_teacher(backbone).features(inputs(image(5, 8)))["pixels"].shape == (1, 3, 12, 12)


def test_padding_is_the_one_of_detectron2(tmp_path):
    written = write_teacher(tmp_path, *RESNET_FPN)
    pixels = image(60, 41)
    model = written.model.eval()
    with torch.no_grad():
        expected = model.backbone(model.preprocess_image(inputs(pixels)).tensor)
    features = plain_teacher(written, *P3_TO_P5).features(inputs(pixels))
    assert list(features) == ["p3", "p4", "p5"]
    assert all(torch.equal(features[name], expected[name]) for name in features)


def test_preprocessing_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        features = brightness_teacher(Brightness().float()).features(inputs(image(4, 4)))["pixels"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert features.dtype == torch.float32


# ------------------------------------------------------------------------ one image does not see others


@pytest.mark.parametrize("family", ["vgg", "resnet_fpn"])
def test_features_do_not_depend_on_batch_mates(tmp_path, family):
    options, features = ((), ()) if family == "vgg" else (RESNET_FPN, P3_TO_P5)
    teacher = plain_teacher(write_teacher(tmp_path, *options), *features)
    mine = image(64, 48, seed=1)
    alone = teacher.features(inputs(mine))
    for mates in ([image(96, 80, seed=2)], [image(40, 20, seed=3), image(96, 32, seed=4)]):
        together = teacher.features(inputs(mates[0], mine, *mates[1:]))
        for name, expected in alone.items():
            height, width = expected.shape[-2:]
            assert torch.equal(together[name][1, :, :height, :width], expected[0])


def test_features_do_not_depend_on_the_content_of_batch_mates(tmp_path):
    teacher = plain_teacher(write_teacher(tmp_path))
    mine = image(64, 64, seed=1)
    dark, bright = torch.zeros_like(mine), torch.full_like(mine, 255)
    first = teacher.features(inputs(mine, dark))["conv5"][0]
    second = teacher.features(inputs(mine, bright))["conv5"][0]
    third = teacher.features(inputs(bright, mine))["conv5"][1]
    assert torch.equal(first, second) and torch.equal(first, third)


def test_features_of_equal_images_in_one_batch_are_equal_to_rounding(tmp_path):
    teacher = plain_teacher(write_teacher(tmp_path))
    mine, mates = image(64, 64, seed=1), [image(64, 64, seed=seed) for seed in (2, 3)]
    alone = teacher.features(inputs(mine))["conv5"][0]
    torch.testing.assert_close(teacher.features(inputs(*mates, mine))["conv5"][2], alone)


def test_codes_do_not_depend_on_batch_mates_of_other_sizes(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    mine = image(64, 48, seed=1)
    alone = teacher.features(inputs(mine))["conv5"]
    together = teacher.features(inputs(image(80, 96, seed=2), mine))["conv5"]
    assert torch.equal(together[1, :, :8, :6], alone[0])


def test_maps_of_several_sizes_keep_the_order_and_are_continued_by_their_border():
    images = [image(2, 3, seed=1), image(4, 2, seed=2), image(2, 3, seed=3)]
    features = brightness_teacher().features(inputs(*images))["pixels"]
    assert features.shape == (3, 3, 4, 3)
    first, second, third = (each.float() for each in images)
    for index, expected in ((0, first), (2, third)):
        assert torch.equal(features[index, :, :2], expected)
        assert torch.equal(features[index, :, 2:], expected[:, 1:].expand(-1, 2, -1))
    assert torch.equal(features[1, :, :, :2], second)
    assert torch.equal(features[1, :, :, 2], second[:, :, 1])


# ------------------------------------------------------------------------------------------ quantizer


@pytest.mark.parametrize("name, kind", [("Uniform", UniformQuantizer), ("PowerOfTwo", PowerOfTwoQuantizer)])
def test_features_are_codes_of_the_students_dictionary(tmp_path, name, kind):
    # the teacher's own YAML says otherwise, and does not count
    written = write_teacher(
        tmp_path, *("MODEL.META_ARCHITECTURE", "QuantRCNN"), *("MODEL.QMIMIC.QUANTIZER.STRIDE", 3.0)
    )
    batch = inputs(image(seed=1), image(64, 80, seed=2))
    codes = FrozenTeacher(tiny_cfg(*written.options, "MODEL.QMIMIC.QUANTIZER.NAME", name)).features(batch)["conv5"]
    plain = plain_teacher(written).features(batch)["conv5"]
    assert torch.equal(codes, kind(0.25).quantize(plain))
    assert not torch.equal(codes, plain)


def test_teacher_on_false_gives_full_precision(tmp_path):
    written, batch = write_teacher(tmp_path), inputs(image())
    off = FrozenTeacher(tiny_cfg(*written.options, "MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False))
    assert torch.equal(off.features(batch)["conv5"], plain_teacher(written).features(batch)["conv5"])


def test_only_the_compared_maps_are_quantized_and_given(tmp_path):
    written = write_teacher(tmp_path, "MODEL.VGG.OUT_FEATURES", ["conv4", "conv5"])
    teacher = FrozenTeacher(tiny_cfg(*written.options, "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["conv4"]))
    assert list(teacher.features(inputs(image()))) == ["conv4"]


# ---------------------------------------------------------------------------- frozen, and no submodule


def test_it_is_no_module_and_its_holder_does_not_see_it(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    holder = nn.Linear(2, 2)
    names = sorted(holder.state_dict())
    holder.teacher = teacher
    assert not isinstance(teacher, nn.Module)
    assert sorted(holder.state_dict()) == names
    assert len(list(holder.parameters())) == 2 and len(list(holder.modules())) == 1


def test_it_is_in_eval_mode_without_gradients_from_the_start():
    backbone = Brightness().train()
    brightness_teacher(backbone)
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_features_carry_no_graph_and_no_statistic_changes(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    before = {name: tensor.clone() for name, tensor in teacher._backbone.state_dict().items()}
    for seed in range(3):
        features = teacher.features(inputs(image(seed=seed), image(seed=seed + 10)))["conv5"]
        assert features.is_inference() and not features.requires_grad
    after = teacher._backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_deepcopy_shares_it(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    holder = nn.Linear(2, 2)
    holder.teacher = teacher
    assert copy.deepcopy(teacher) is teacher
    assert copy.deepcopy(holder).teacher is teacher


def test_to_returns_itself_and_keeps_the_dtype(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    assert teacher.to("cpu") is teacher and teacher.to(torch.device("cpu")) is teacher
    assert teacher.device == torch.device("cpu")
    assert teacher.features(inputs(image()))["conv5"].dtype == torch.float32


def test_to_moves_everything():
    backbone = Brightness()
    teacher = brightness_teacher(backbone).to("meta")
    assert teacher.device.type == "meta"
    assert teacher._pixel_mean.device.type == teacher._pixel_std.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in backbone.state_dict().values())
    assert teacher.features(inputs(image(4, 6)))["pixels"].device.type == "meta"


def test_building_it_draws_no_random_number(tmp_path):
    cfg = tiny_cfg(*write_teacher(tmp_path).options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    teacher_shapes(cfg)
    FrozenTeacher(cfg)
    assert torch.equal(torch.get_rng_state(), before)


def test_number_of_parameters(tmp_path):
    written = write_teacher(tmp_path)
    expected = sum(parameter.numel() for parameter in written.model.backbone.parameters())
    assert FrozenTeacher(tiny_cfg(*written.options)).num_parameters == expected


def test_autocast(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    batch = inputs(image(64, 64, seed=1), image(80, 64, seed=2))
    full = teacher.features(batch)["conv5"]
    with torch.autocast("cpu", torch.bfloat16):
        half = teacher.features(batch)["conv5"]
    assert half.shape == full.shape and torch.isfinite(half.float()).all()
    assert (half.float() - full).abs().mean() < 0.25 * full.abs().mean() + 0.25


def test_its_rpn_and_heads_are_never_built(tmp_path, monkeypatch):
    written = write_teacher(tmp_path)
    for name in ("build_proposal_generator", "build_roi_heads"):
        monkeypatch.setattr(f"detectron2.modeling.meta_arch.rcnn.{name}", lambda *args: pytest.fail(name))
    state = torch.load(written.weights)["model"]
    torch.save({k: v for k, v in state.items() if k.startswith("backbone.")}, written.weights)
    FrozenTeacher(tiny_cfg(*written.options))


def test_a_student_may_differ_in_everything(tmp_path):
    written = write_teacher(tmp_path, *RESNET_FPN, "INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", [57.0, 58.0, 59.0])
    student = seeded_model(tiny_cfg())
    teacher = plain_teacher(written, "MODEL.QMIMIC.MIMIC.TEACHER_IN_FEATURES", ["p3"])
    pixels = image(64, 64)
    with torch.no_grad():
        own = student.backbone(student.preprocess_image(inputs(pixels)).tensor)["conv5"]
    features = teacher.features(inputs(pixels))["p3"]
    assert features.shape[-2:] == own.shape[-2:]
    model = written.model.eval()
    rgb = preprocessed(pixels.flip(0), written.cfg.MODEL.PIXEL_MEAN, [57.0, 58.0, 59.0])
    with torch.no_grad():
        expected = model.backbone(ImageList.from_tensors([rgb], 32).tensor)["p3"]
    assert torch.equal(features, expected)


# ------------------------------------------------------------------------------------ the teacher's proposals

PROPOSALS = ("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["neighbourhood", "teacher_proposals"])


def test_proposals_are_those_of_the_saved_detector(tmp_path):
    written = write_teacher(tmp_path)
    teacher = FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, "MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER", False))
    images = [image(64, 48, seed=1), image(48, 80, seed=2), image(64, 48, seed=3)]
    maps, proposals = teacher.features_and_proposals(inputs(*images))
    torch.testing.assert_close(maps, teacher.features(inputs(*images)))
    written.model.eval()
    for each, boxes in zip(images, proposals):
        with torch.no_grad():
            batched = written.model.preprocess_image(inputs(each))
            alone, _ = written.model.proposal_generator(batched, written.model.backbone(batched.tensor), None)
        assert len(boxes) > 0
        torch.testing.assert_close(boxes.tensor, alone[0].proposal_boxes.tensor)


def test_proposals_are_in_pixels_of_the_students_image(tmp_path):
    written = write_teacher(tmp_path)
    scale = ("MODEL.QMIMIC.TEACHER.INPUT_SCALE", 2.0)
    teacher = FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, *scale))
    small = inputs(image(40, 24, seed=1))
    boxes = teacher.features_and_proposals(small)[1][0].tensor
    assert boxes[:, 0::2].max() <= 24.0 and boxes[:, 1::2].max() <= 40.0
    assert boxes.max() > 12.0, "they fill the image, and not a quarter of it"


def test_a_proposal_generator_is_built_when_asked_for_alone(tmp_path):
    teacher = FrozenTeacher(tiny_cfg(*write_teacher(tmp_path).options))
    with pytest.raises(ValueError, match="no proposal_generator"):
        teacher.features_and_proposals(inputs(image()))


def test_a_one_stage_teacher_has_no_proposals(tmp_path):
    written = write_teacher(tmp_path)
    opts = ("MODEL.QMIMIC.TEACHER.OPTS", ["MODEL.META_ARCHITECTURE", "RetinaNet"])
    with pytest.raises(ValueError) as error:
        FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, *opts))
    for part in ("ROI_SOURCE", "no proposal generator", '"neighbourhood"', written.config_file):
        assert part in str(error.value)


def test_a_proposal_generator_that_cannot_be_built_names_the_config(tmp_path):
    written = write_teacher(tmp_path)
    opts = ("MODEL.QMIMIC.TEACHER.OPTS", ["MODEL.RPN.HEAD_NAME", "NoHead"])
    with pytest.raises(ValueError) as error:
        FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS, *opts))
    for part in ("ROI_SOURCE", "NoHead", written.config_file):
        assert part in str(error.value)


def test_weights_without_the_proposal_generator_are_no_teacher(tmp_path):
    written = write_teacher(tmp_path)
    state = {name: each for name, each in written.model.state_dict().items() if "proposal_generator" not in name}
    torch.save({"model": state}, written.weights)
    FrozenTeacher(tiny_cfg(*written.options))
    with pytest.raises(ValueError, match="proposal_generator"):
        FrozenTeacher(tiny_cfg(*written.options, *PROPOSALS))
