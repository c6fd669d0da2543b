"""Models from a LazyConfig: the same ones as from a YAML, with a teacher of either kind, and the documented script."""

import copy
import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from helpers import NUM_CLASSES, batch, seeded_model, tiny_cfg, training_step, write_teacher
from omegaconf import DictConfig, OmegaConf
from tiny_training import BUILTIN_DATASET, ROOT, Run, write_builtin_data

from qmimic_d2.config_files import get_config_file, packaged_config_folder
from qmimic_d2.engine import load_config
from qmimic_d2.lazy_config import add_mimic, add_quantizer, build_lazy_detector
from qmimic_d2.modeling import FrozenTeacher, QuantMimicRCNN, RoIMimicLoss, UniformQuantizer
from qmimic_d2.modeling.backbone.vgg import VGG
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config
from qmimic_d2.modeling.mimic.weight import MimicWeight
from qmimic_d2.modeling.quantizer_hook import attached_quantizer
from qmimic_d2.modeling.trunk_adapter import TrunkAdapter

NAMES = sorted(path.relative_to(packaged_config_folder()).as_posix() for path in (ROOT / "configs").rglob("*.py"))
DOCS = (ROOT / "docs" / "lazy_config.md").read_text()


def tiny_backbone():
    return L(VGG)(depth=11, width_divisor=32, norm="BN", stage_strides=[2, 2, 2, 1, 1])


def lazy_retinanet(channels=16):
    return L(RetinaNet)(
        backbone=tiny_backbone(),
        head=L(RetinaNetHead)(
            input_shape=[ShapeSpec(channels=channels)], num_classes="${..num_classes}", conv_dims=[16], num_anchors=1
        ),
        head_in_features=["conv5"],
        anchor_generator=L(DefaultAnchorGenerator)(sizes=[[24]], aspect_ratios=[1.0], strides=[8]),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True),
        num_classes=NUM_CLASSES,
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
        input_format="BGR",
    )


def lazy_fcos():
    return L(FCOS)(
        backbone=tiny_backbone(),
        head=L(FCOSHead)(input_shape=[ShapeSpec(channels=16)], num_classes="${..num_classes}", conv_dims=[16]),
        num_classes=NUM_CLASSES,
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
    )


def lazy_rcnn(meta_architecture=GeneralizedRCNN):
    """Its parts are modules that are built already: a LazyConfig may hold such, too."""
    stock = seeded_model(tiny_cfg())
    parts = {name: getattr(stock, name) for name in ("backbone", "proposal_generator", "roi_heads")}
    return L(meta_architecture)(**parts, pixel_mean=[127.5] * 3, pixel_std=[64.0] * 3, input_format="BGR")


# The cases of benchmarks/behaviour.py.
FAMILIES = {"RCNN": lazy_rcnn, "RetinaNet": lazy_retinanet, "FCOS": lazy_fcos}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def settings(teacher, **mimic):
    return {
        "TEACHER": {"CONFIG_FILE": teacher.config_file, "WEIGHTS": teacher.weights},
        "QUANTIZER": {"STRIDE": 0.25},
        "MIMIC": {"POOLER_RESOLUTION": 3, "ROI_SOURCE": ["ground_truth"], **mimic},
    }


def whole(**parts):
    """As LazyConfig.load gives it."""
    return DictConfig(parts, flags={"allow_objects": True})


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


# --------------------------------------------------------------------------------------------- shipped configs


def load(name, weights=""):
    cfg = LazyConfig.load(get_config_file(name))
    if "qmimic" in cfg.model and weights:
        cfg.model.qmimic.TEACHER.WEIGHTS = weights
    return cfg


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory):
    """Weights for the teacher of the shipped student that nobody trained."""
    path = tmp_path_factory.mktemp("digits") / "teacher.pth"
    cfg = load_config(get_config_file("Digits/student_vgg_1_16_qmimic.yaml"), ["MODEL.DEVICE", "cpu"])
    torch.save(load_teacher_config(cfg).build_backbone().state_dict(prefix="backbone."), path)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_trains(name, digits_teacher):
    cfg = load(name, digits_teacher)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    step = training_step(model, batch((128, 128), num_classes=10))
    assert all(torch.isfinite(loss) for loss in step.losses.values())
    assert ("loss_mimic" in step.losses) == ("qmimic" in name)
    optimizer.step()
    assert instantiate(cfg.lr_multiplier)(0.5) == pytest.approx(0.5)


# Every attribute that Detectron2's tools/lazyconfig_train_net.py and its default_setup read.
READ_BY_THE_TOOL = [
    *("model", "optimizer.params", "lr_multiplier", "dataloader.train", "dataloader.test", "dataloader.evaluator"),
    *("train.device", "train.ddp", "train.amp.enabled", "train.output_dir", "train.checkpointer.period"),
    *("train.eval_period", "train.log_period", "train.max_iter", "train.init_checkpoint", "train.seed"),
    *("train.cudnn_benchmark", "train.float32_precision"),
]


@pytest.mark.parametrize("name", NAMES)
def test_detectron2s_own_tool_finds_what_it_reads(name, tmp_path):
    cfg = LazyConfig.load(get_config_file(name))
    for key in READ_BY_THE_TOOL:
        assert OmegaConf.select(cfg, key) is not None, key
    model = torch.nn.Linear(1, 1)
    assert create_ddp_model(model, **cfg.train.ddp) is model  # one process
    options = {key: value for key, value in cfg.train.ddp.items() if key != "fp16_compression"}
    inspect.signature(torch.nn.parallel.DistributedDataParallel).bind(model, **options)
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
    hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))


def test_there_are_some():
    assert any("qmimic" in name for name in NAMES)


@pytest.mark.parametrize(
    "lazy, yaml",
    [
        ("lazy/student_vgg_1_16_qmimic.py", "Digits/student_vgg_1_16_qmimic.yaml"),
        ("lazy/digits_vgg_1_16.py", "Digits/student_vgg_1_16_scratch.yaml"),
    ],
)
def test_it_is_the_yamls_model(lazy, yaml, digits_teacher):
    torch.manual_seed(1)
    first = instantiate(load(lazy, digits_teacher).model)
    cfg = load_config(
        get_config_file(yaml), ["MODEL.DEVICE", "cpu", "MODEL.QMIMIC.TEACHER.WEIGHTS", digits_teacher]
    )
    second = seeded_model(cfg)
    assert_equal(dict(first.state_dict()), dict(second.state_dict()))
    steps = [training_step(model, batch((128, 128), (96, 128), num_classes=10)) for model in (first, second)]
    assert_equal(steps[0].losses, steps[1].losses)
    assert_equal(steps[0].gradients, steps[1].gradients)


# ------------------------------------------------------------------------------------------------ the functions


def test_add_mimic(teacher):
    stock = lazy_fcos()
    before = copy.deepcopy(stock)
    lazy = add_mimic(stock, settings(teacher))
    assert stock == before and lazy != stock  # another one
    model = instantiate(lazy)
    assert type(model) is FCOS
    assert attached_quantizer(model.backbone).features == model.mimic.student_features == ["conv5"]
    step = training_step(model, batch())
    assert step.losses["loss_mimic"].item() > 0.0
    assert model.mimic.teacher.digest


def test_add_quantizer():
    # the schedule is the student's in training
    lazy = add_quantizer(lazy_retinanet(), {"QUANTIZER": {"STRIDE": 0.5}, "MIMIC": {"SCHEDULE": "cosine"}})
    model = instantiate(lazy)
    assert type(model) is RetinaNet
    hook = attached_quantizer(model.backbone)
    assert (hook.features, hook.quantizer.stride) == (["conv5"], 0.5)
    assert not any("mimic" in name for name in training_step(model, batch()).losses)


def test_settings_can_be_changed_later_and_on_the_command_line(teacher):
    cfg = LazyConfig.apply_overrides(
        whole(model=add_mimic(lazy_retinanet(), settings(teacher))),
        ["model.qmimic.MIMIC.LOSS_WEIGHT=3.0", "model.qmimic.QUANTIZER.STRIDE=0.5", "model.num_classes=7"],
    )
    cfg.model.qmimic.MIMIC.ROI_SOURCE = ["whole_map"]
    model = instantiate(cfg.model)
    assert (model.mimic.weight.weight, model.mimic.settings.roi_source) == (3.0, ["whole_map"])
    assert model.mimic.student_quantizer.stride == 0.5
    assert model.head.cls_score.out_channels == 7


def test_maps_may_be_named(teacher):
    qmimic = settings(teacher, IN_FEATURES=["conv4"], TEACHER_IN_FEATURES=["conv5"])
    lazy = add_mimic(lazy_retinanet(), qmimic)
    lazy.backbone.out_features = ["conv4", "conv5"]
    model = instantiate(lazy)
    assert attached_quantizer(model.backbone).features == ["conv5"]
    assert model.mimic.student_features == ["conv4"]


class OwnRCNN(GeneralizedRCNN):
    """Of another project."""


def test_a_class_of_ones_own(teacher):
    model = instantiate(add_mimic(lazy_rcnn(OwnRCNN), settings(teacher)))
    assert type(model) is OwnRCNN
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0


def test_fcos_reads_every_map_by_stride():
    lazy = lazy_fcos()
    lazy.backbone.out_features = ["conv5", "conv2"]  # 16 and 4 channels: its head could not run
    model = instantiate(add_quantizer(lazy, {}))
    assert attached_quantizer(model.backbone).features == model.head_in_features == ["conv2", "conv5"]


@pytest.mark.parametrize("build", [lazy_retinanet, lazy_fcos])
def test_the_teacher_knows_the_order_of_the_channels(build, teacher):
    lazy = add_mimic(build(), settings(teacher))
    lazy.input_format = "RGB"
    model = instantiate(lazy).train()
    turned = [{"image": each["image"].flip(0)} for each in batch()]
    bgr = instantiate(add_mimic(build(), settings(teacher))).train()
    assert_equal(model.mimic.teacher.features(turned), bgr.mimic.teacher.features(batch()))


def test_a_schedule_over_the_whole_training(teacher):
    cosine = settings(teacher, SCHEDULE="cosine")
    with pytest.raises(ValueError, match="max_iter is 0; give add_mimic"):
        instantiate(add_mimic(lazy_fcos(), cosine))
    lazy = whole(model=add_mimic(lazy_fcos(), cosine, max_iter="${train.max_iter}"), train=dict(max_iter=50))
    assert instantiate(lazy.model).mimic.weight.at(25) == pytest.approx(0.5)


def test_a_teacher_from_a_lazy_config(tmp_path):
    """And itself built by add_quantizer."""
    source = Path(__file__).read_text()
    functions = re.search(r"def tiny_backbone.*?(?=def lazy_fcos)", source, flags=re.DOTALL).group()
    imports = "\n".join(line for line in source.splitlines() if line.startswith("from detectron2"))
    extra = "from qmimic_d2.modeling.backbone.vgg import VGG\nfrom qmimic_d2.lazy_config import add_quantizer\n"
    model = f"NUM_CLASSES = {NUM_CLASSES}\n{functions}\nmodel = add_quantizer(lazy_retinanet(), {{}})\n"
    (tmp_path / "teacher.py").write_text(f"{imports}\n{extra}{model}")
    torch.manual_seed(3)
    trained = instantiate(LazyConfig.load(str(tmp_path / "teacher.py")).model)
    torch.save({"model": trained.state_dict()}, tmp_path / "teacher.pth")
    names = {"CONFIG_FILE": str(tmp_path / "teacher.py"), "WEIGHTS": str(tmp_path / "teacher.pth")}
    model = instantiate(add_mimic(lazy_fcos(), {"TEACHER": names, "MIMIC": {"ROI_SOURCE": ["whole_map"]}}))
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0
    maps = model.mimic.teacher.features(batch())
    own = trained.eval().backbone(trained.preprocess_image(batch()).tensor)
    assert_equal(maps, {name: own[name] for name in maps})


def test_it_is_saved_and_read(teacher, tmp_path):
    LazyConfig.save(whole(model=add_mimic(lazy_fcos(), settings(teacher))), str(tmp_path / "config.yaml"))
    model = instantiate(LazyConfig.load(str(tmp_path / "config.yaml")).model)
    assert type(model) is FCOS
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0


def test_a_target_may_be_a_name():
    lazy = lazy_fcos()
    lazy["_target_"] = "detectron2.modeling.meta_arch.fcos.FCOS"
    assert type(instantiate(add_quantizer(lazy, {}))) is FCOS


def test_the_adapter_in_the_trunk(teacher):
    trunk = settings(teacher, ADAPTER_PLACEMENT="trunk")
    with pytest.raises(ValueError, match="no TrunkAdapter"):
        instantiate(add_mimic(lazy_retinanet(), trunk))
    lazy = lazy_retinanet(channels=32)
    lazy.backbone = L(TrunkAdapter)(bottom_up=lazy.backbone, channels=dict(conv5=32), kind="conv1x1_relu")
    model = instantiate(add_mimic(lazy, trunk))
    assert not list(model.mimic.parameters())
    assert "backbone.adapters.conv5.0.weight" in training_step(model, batch()).gradients


def test_an_evaluation_needs_no_file_of_the_teacher(teacher):
    qmimic = settings(teacher)
    qmimic["TEACHER"] = {"CONFIG_FILE": "nowhere.yaml"}
    model = instantiate(add_mimic(lazy_fcos(), qmimic)).eval()
    with torch.no_grad():
        assert "instances" in model(batch())[0]
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        model.train()
        model(batch())


# ---------------------------------------------------------------------------------------------------- mistakes


def test_a_model_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="VGG and has no argument 'backbone'"):
        add_mimic(L(VGG)(depth=11), {})


@pytest.mark.parametrize(
    "qmimic, error, words",
    [
        ({"QUANTIZER": {"STRIDES": 0.5}}, KeyError, "MODEL.QMIMIC.QUANTIZER.STRIDES"),
        ({"QUANTIZER": {"STRIDE": 1}}, ValueError, "MODEL.QMIMIC.QUANTIZER.STRIDE"),
        ({"QUANTIZER": {"NAME": "Unifrom"}}, KeyError, "Unifrom"),
        ({"QUANTIZER": {"TEACHER_ON": True}}, KeyError, "renamed to MODEL.QMIMIC.MIMIC.QUANTIZE_TEACHER"),
        ({"QUANTIZER": {"STUDENT_AT": []}}, KeyError, "renamed to MODEL.QMIMIC.QUANTIZER.ON_BACKBONE and .*QUANTIZE_"),
        ({"MIMIC": {"ROI_SOURCE": "sampled+proposals"}}, ValueError, "a list: \\['sampled', 'proposals'\\]"),
    ],
)
def test_wrong_settings_are_refused_by_name(qmimic, error, words):
    with pytest.raises(error, match=words):
        instantiate(add_quantizer(lazy_fcos(), qmimic))


def test_the_default_regions_of_an_rcnn_are_refused(teacher):
    qmimic = settings(teacher)
    del qmimic["MIMIC"]["ROI_SOURCE"]
    with pytest.raises(ValueError, match="ROI_SOURCE is \\['sampled'\\]; give a list"):
        instantiate(add_mimic(lazy_fcos(), qmimic))


def test_heads_that_hide_what_they_read(teacher):
    class Heads(torch.nn.Module):
        pass

    lazy = lazy_rcnn()
    lazy.roi_heads = Heads()
    with pytest.raises(ValueError, match="do not tell which maps they read"):
        instantiate(add_quantizer(lazy, {}))
    maps = {"QUANTIZER": {"IN_FEATURES": ["conv5"]}, "MIMIC": {"IN_FEATURES": ["conv5"]}}
    assert type(instantiate(add_quantizer(lazy, maps))) is GeneralizedRCNN


# --------------------------------------------------------------------------------------- all arguments, and docs


def test_all_arguments_oneself(teacher):
    """The last example of docs/lazy_config.md, as it stands there."""
    example = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)[2]
    detector = dict(lazy_rcnn())
    del detector["_target_"]

    def build_teacher():
        return FrozenTeacher(tiny_cfg("MODEL.QMIMIC.QUANTIZER.STRIDE", 0.25, *teacher.options))

    namespace = {"detector": detector, "build_teacher": build_teacher}
    exec(compile(example, "example", "exec"), namespace)
    model = instantiate(namespace["student"])
    assert type(model) is QuantMimicRCNN and isinstance(model.mimic, RoIMimicLoss)
    assert isinstance(model.mimic.weight, MimicWeight)
    assert isinstance(attached_quantizer(model.backbone).quantizer, UniformQuantizer)
    options = (
        *("MODEL.QMIMIC.MIMIC.ROI_SOURCE", ["ground_truth"], "MODEL.QMIMIC.MIMIC.LOSS_WEIGHT", 20.0),
        *("MODEL.QMIMIC.MIMIC.NORMALIZE_BY", "target", "MODEL.QMIMIC.MIMIC.POOLER_RESOLUTION", 7),
    )
    other = seeded_model(tiny_cfg(*teacher.options, *options, meta_architecture="QuantMimicRCNN"))
    other.load_state_dict(model.state_dict())
    assert_equal(training_step(model, batch()).losses, training_step(other, batch()).losses)


def test_the_example_of_the_model_zoo():
    example = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)[0]
    namespace = {}
    exec(compile(example, "example", "exec"), namespace)
    model = namespace["model"]
    assert model["_target_"] is build_lazy_detector and model.detector_class.endswith(".RetinaNet")
    assert model.qmimic.MIMIC.NUM_NEIGHBOURS == 8 and model.head.num_classes == 20


@pytest.mark.slow
def test_script_of_the_docs_trains_a_student(tmp_path):
    """The training script in docs/lazy_config.md, as it stands there, on a shipped config."""
    script = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)[1]
    assert len(script.splitlines()) <= 40
    write_builtin_data(tmp_path / "datasets")
    written = write_teacher(tmp_path)
    (tmp_path / "train.py").write_text(script)
    shutil.copytree(ROOT / "configs" / "lazy", tmp_path / "configs")
    arguments = (
        *("--config-file", "configs/student_vgg_1_16_qmimic.py", "train.max_iter=3", "train.output_dir=output"),
        *("train.log_period=1", "train.device=cpu", "optimizer.lr=0.0001", "model.roi_heads.num_classes=80"),
        *(f"dataloader.{part}.dataset.names={BUILTIN_DATASET}" for part in ("train", "test")),
        *("dataloader.train.total_batch_size=2", f"model.qmimic.TEACHER.CONFIG_FILE={written.config_file}"),
        f"model.qmimic.TEACHER.WEIGHTS={written.weights}",
    )
    with Run(*arguments, cwd=tmp_path, datasets=tmp_path / "datasets", script=tmp_path / "train.py") as process:
        assert process.finish() == 0, process.texts()
    output = tmp_path / "output"
    metrics = (output / "metrics.json").read_text()
    assert '"loss_mimic"' in metrics and '"qmimic/match_ratio"' in metrics
    names = torch.load(output / "model_final.pth", weights_only=False)["model"]
    heads = ("backbone.", "proposal_generator.", "roi_heads.")
    assert {name for name in names if not name.startswith(heads)} == {
        "mimic.adapters.conv5.weight",
        "mimic.adapters.conv5.bias",
    }
    assert LazyConfig.load(str(output / "config.yaml")).model.qmimic.MIMIC.LOSS_WEIGHT == 20.0
