"""Every YAML that is shipped is read, built, trained for a step and used, on a small image and with few proposals."""

import re

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import batch, image
from shipped_configs import FEW_REGIONS, FOLDER, LEAVES, NAMES, PAPER, UntrainedTeachers, load
from tiny_training import ROOT

from qmimic_d2.config_files import get_config_file
from qmimic_d2.engine import Trainer, build_checkpointer, load_config
from qmimic_d2.modeling.family import head_node, imitates
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config

# Pixels of the images' sides.
SIDE = 96
# A base without a backbone of its own is joined to others by the configs that build on it; here, to this one.
TINY_BASE = "Base-FasterRCNN-ResNet.yaml"
TINY = ("MODEL.RESNETS.WIDTH_DIVISOR", 16, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)


def load_whole(name, folder, *opts):
    """The config, joined to a tiny detector where it names no backbone."""
    if load(name).MODEL.BACKBONE.NAME != get_cfg().MODEL.BACKBONE.NAME:
        return load(name, *FEW_REGIONS, *opts)
    path = folder / "joined.yaml"
    path.write_text(f"_BASE_: [{get_config_file(TINY_BASE)}, {get_config_file(name)}]\n")
    return load_config(str(path), ["MODEL.DEVICE", "cpu", *FEW_REGIONS, *TINY, *opts])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return UntrainedTeachers(tmp_path_factory.mktemp("teachers"))


def test_there_are_some():
    assert NAMES and LEAVES
    assert set(NAMES) - set(LEAVES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_trains_and_detects(name, tmp_path, teachers):
    cfg = load_whole(name, tmp_path)
    has_teacher = bool(cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE)
    if has_teacher:
        cfg = load_whole(name, tmp_path, "MODEL.QMIMIC.TEACHER.WEIGHTS", teachers.weights_of(cfg))
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    inputs = batch((SIDE, SIDE), num_boxes=(4,), num_classes=head_node(cfg).NUM_CLASSES)
    model.train()
    with EventStorage():
        losses = model(inputs)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert any(loss.startswith("loss_mimic") for loss in losses) == has_teacher
    sum(losses.values()).backward()
    optimizer.step()
    scheduler.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        instances = model([{"image": image(SIDE, SIDE), "height": 100, "width": 80}])[0]["instances"]
    assert instances.image_size == (100, 80)
    assert len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_names_what_a_training_needs(name):
    cfg = load(name)
    assert cfg.DATASETS.TRAIN and cfg.DATASETS.TEST
    assert cfg.OUTPUT_DIR.startswith("output/")
    assert cfg.SEED >= 0  # what is published can be repeated
    if imitates(cfg.MODEL.META_ARCHITECTURE):
        assert cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE
        assert cfg.MODEL.QMIMIC.TEACHER.WEIGHTS or load_teacher_config(cfg).weights


def test_no_two_leaves_share_an_output_folder():
    folders = [load(name).OUTPUT_DIR for name in LEAVES]
    assert len(set(folders)) == len(folders)


# ------------------------------------------------------------------------------------ the paper's settings

STUDENTS = {
    "PascalVOC/student_resnet18_1_16": "output/voc",
    "PascalVOC/student_vgg_1_16": "output/voc",
    "WIDERFACE/student_vgg_1_32": "output/widerface",
}
VARIANTS = ("scratch", "quant", "mimic", "qmimic", "pow2", "group", "depthwise")
QUANTIZED = [name for name in PAPER if "_quant." in name or "_pow2." in name]


@pytest.mark.parametrize("student", STUDENTS)
def test_seven_variants_of_a_student_differ_in_nothing_else(student):
    """Same data, heads, schedule and seed; only CONV's variants have another backbone and a narrower RPN."""
    scratch = load(f"{student}_scratch.yaml")
    for variant in VARIANTS:
        cfg = load(f"{student}_{variant}.yaml")
        assert cfg.OUTPUT_DIR == f"{STUDENTS[student]}/{student.partition('/')[2]}_{variant}"
        for node in ("INPUT", "DATASETS", "SOLVER", "TEST", "SEED"):
            assert cfg[node] == scratch[node], node
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = scratch.MODEL.META_ARCHITECTURE
        cfg.MODEL.QMIMIC = scratch.MODEL.QMIMIC
        if variant in ("group", "depthwise"):
            kind = "RESNETS" if "resnet" in student else "VGG"
            assert cfg.MODEL[kind].CONV == variant
            cfg.MODEL[kind] = scratch.MODEL[kind]
            cfg.MODEL.RPN.CONV_DIMS = scratch.MODEL.RPN.CONV_DIMS
        assert cfg.MODEL == scratch.MODEL, variant


@pytest.mark.parametrize("student", STUDENTS)
def test_what_the_variants_of_a_student_are(student):
    found = {}
    for variant in VARIANTS:
        cfg = load(f"{student}_{variant}.yaml")
        node = cfg.MODEL.QMIMIC
        kind = cfg.MODEL.META_ARCHITECTURE
        found[variant] = (kind, "" if kind == "GeneralizedRCNN" else node.QUANTIZER.NAME)
    plain = ("GeneralizedRCNN", "")
    assert found == {
        "scratch": plain,
        "quant": ("QuantRCNN", "Uniform"),
        "mimic": ("QuantMimicRCNN", ""),
        "qmimic": ("QuantMimicRCNN", "Uniform"),
        "pow2": ("QuantMimicRCNN", "PowerOfTwo"),
        "group": plain,
        "depthwise": plain,
    }
    strides = {load(f"{student}_{each}.yaml").MODEL.QMIMIC.QUANTIZER.STRIDE for each in VARIANTS[1:5]}
    assert len(strides) == 1


GUIDE = (ROOT / "docs" / "reproduce.md").read_text()


def pairs_of_the_guide(variable):
    """The KEY VALUE pairs of a shell variable in docs/reproduce.md."""
    (text,) = re.findall(rf"^ +{variable}='([^']*)'", GUIDE, flags=re.MULTILINE)
    return text.split()


def test_the_guide_names_configs_that_are_there():
    named = {each for each in re.findall(r"\b(?:teacher|student)_\w+", GUIDE) if not each.endswith("_")}
    assert len(named) > 20
    assert named <= {name.rpartition("/")[2][: -len(".yaml")] for name in PAPER}


def test_sizes_and_schedules_of_the_guide_and_nothing_else():
    pairs = pairs_of_the_guide("SMALL")
    for name in PAPER:
        load(name, *pairs)
    keys = {key.partition(".")[0] for key in pairs[::2]}
    assert keys == {"INPUT", "MODEL", "DATALOADER", "SOLVER"}
    assert {key for key in pairs[::2] if key.startswith("MODEL")} == {
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.RPN.POST_NMS_TOPK_TEST")
    }


@pytest.mark.parametrize(
    "name, family, variable",
    [
        ("student_vgg_1_16_scratch", "FasterRCNN-VGG", "FASTER_RCNN"),
        ("student_resnet18_1_16_scratch", "RFCN-ResNet", "RFCN"),
    ],
)
def test_the_other_detector_by_another_base_and_by_pairs(name, family, variable, tmp_path):
    folder = FOLDER / "PascalVOC"
    text = (folder / f"{name}.yaml").read_text()
    other, count = re.subn(r'"\.\./Base-(RFCN|FasterRCNN)-(VGG|ResNet)\.yaml"', f'"{FOLDER}/Base-{family}.yaml"', text)
    assert count == 1
    other = other.replace('"Base-', f'"{folder}/Base-')
    (tmp_path / "other.yaml").write_text(other)
    by_base = load_config(str(tmp_path / "other.yaml"), ["MODEL.DEVICE", "cpu"])
    by_pairs = load(f"PascalVOC/{name}.yaml", *pairs_of_the_guide(variable))
    if variable == "FASTER_RCNN":  # which reads none of them
        by_pairs.defrost()
        by_pairs.MODEL.RFCN = by_base.MODEL.RFCN
    assert by_pairs.MODEL.ROI_HEADS.NAME == ("StandardROIHeads" if variable == "FASTER_RCNN" else "RFCNROIHeads")
    assert by_pairs == by_base


@pytest.mark.parametrize("name", [name for name in PAPER if "mimic" in name or "student" in name and "pow2" in name])
def test_a_student_imitates_what_its_teacher_leaves(name):
    """Its weights, and the codes that they were fine-tuned with."""
    node = load(name).MODEL.QMIMIC
    teacher = load(f"{name.partition('/')[0]}/{node.TEACHER.CONFIG_FILE.rpartition('/')[2]}")
    assert node.TEACHER.WEIGHTS == f"{teacher.OUTPUT_DIR}/model_final.pth"
    assert (teacher.MODEL.META_ARCHITECTURE == "QuantRCNN") == bool(node.QUANTIZER.NAME)
    if node.QUANTIZER.NAME:
        assert teacher.MODEL.QMIMIC.QUANTIZER == node.QUANTIZER


@pytest.mark.parametrize("name", [name for name in QUANTIZED if "teacher" in name])
def test_a_quantized_teacher_begins_with_the_full_precision_one(name):
    cfg, full = load(name), load(f"{name.rpartition('_')[0]}.yaml")
    assert cfg.MODEL.WEIGHTS == f"{full.OUTPUT_DIR}/model_final.pth"
    assert cfg.SOLVER.BASE_LR < full.SOLVER.BASE_LR and cfg.SOLVER.MAX_ITER < full.SOLVER.MAX_ITER
    for node in ("INPUT", "DATASETS", "TEST", "SEED"):
        assert cfg[node] == full[node]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PascalVOC/teacher_resnet18_faster_rcnn.yaml", "PascalVOC/teacher_vgg16_rfcn.yaml"])
def test_imagenet_weights_fill_the_backbone(name, tmp_path):
    """Weights of torchvision's names, drawn at random: the real ones are downloaded where the config says."""
    cfg = load(name)
    address = cfg.MODEL.WEIGHTS
    assert address.startswith("https://download.pytorch.org/models/")
    network = address.rpartition("/")[2].partition("-")[0]
    if network == "vgg16":  # without its classifier, which is most of it
        features = torchvision.models.vgg16(weights=None, init_weights=False).features
        state = features.state_dict(prefix="features.")
    else:
        state = getattr(torchvision.models, network)(weights=None).state_dict()
    path = tmp_path / "imagenet.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as vgg16's file is
    model = build_model(cfg)
    build_checkpointer(model, "").load(str(path), checkpointables=[])
    ours = model.backbone.state_dict()
    first, theirs = ("conv1.conv1", "features.0") if network == "vgg16" else ("stem.conv1", "conv1")
    assert torch.equal(ours[f"{first}.weight"], state[f"{theirs}.weight"])
    given = [tensor.double().sum() for key, tensor in state.items() if not key.startswith("fc.") and tensor.dim()]
    assert len(given) == len(ours)
    assert sum(tensor.double().sum() for tensor in ours.values()) == pytest.approx(float(sum(given)), rel=1e-9)
