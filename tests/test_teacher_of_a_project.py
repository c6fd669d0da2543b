"""Teachers whose YAML holds keys of another Detectron2 project, and the function that adds them."""

import sys
import types

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
from helpers import batch, seeded_model, tiny_cfg, training_step, write_teacher

from qmimic_d2.engine import load_config, set_up_process
from qmimic_d2.engine.setup import argument_parser
from qmimic_d2.modeling.backbone.vgg import build_vgg_backbone
from qmimic_d2.modeling.mimic.teacher_config import load_teacher_config

TEACHER = "MODEL.QMIMIC.TEACHER"
CONFIG_FILE, ADD_CONFIG, OPTS = (f"{TEACHER}.{name}" for name in ("CONFIG_FILE", "ADD_CONFIG", "OPTS"))

# Keys of Detectron2's own projects, as their YAMLs set them.
PROJECTS = {
    "PointRend": "MODEL: {ROI_MASK_HEAD: {POINT_HEAD_ON: true, FC_DIM: 1024}, POINT_HEAD: {NUM_CLASSES: 8}}\n",
    "DeepLab": "SOLVER: {POLY_LR_POWER: 0.9}\nMODEL: {SEM_SEG_HEAD: {LOSS_TYPE: x, ASPP_DILATIONS: [6]}}\n",
    "TridentNet": "MODEL: {TRIDENT: {NUM_BRANCH: 3, BRANCH_DILATIONS: [1, 2, 3], TRIDENT_STAGE: res4}}\n",
    "DensePose": "MODEL: {DENSEPOSE_ON: true, ROI_DENSEPOSE_HEAD: {NAME: x}}\nBOOTSTRAP_DATASETS: []\n",
}


@pytest.fixture
def teacher(tmp_path):
    return write_teacher(tmp_path)


@pytest.fixture
def project(monkeypatch):
    """A project's module, whose backbone needs a key that only its function adds."""

    def add_keys(cfg):
        cfg.MODEL.PROJECT = CfgNode({"EXTRA_DEPTH": 0})

    def build_project_backbone(cfg, input_shape):
        assert cfg.MODEL.PROJECT.EXTRA_DEPTH == 0
        return build_vgg_backbone(cfg, input_shape)

    def fails(cfg):
        raise RuntimeError("no such luck")

    module = types.ModuleType("a_project")
    module.add_keys, module.fails, module.number = add_keys, fails, 3
    monkeypatch.setitem(sys.modules, "a_project", module)
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_project_backbone", build_project_backbone)
    return module


def with_text(teacher, text):
    path = teacher.config_file.replace("teacher.yaml", "project.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"_BASE_: teacher.yaml\n{text}")
    return (CONFIG_FILE, path, f"{TEACHER}.WEIGHTS", teacher.weights)


@pytest.mark.parametrize("name", PROJECTS)
def test_keys_of_a_project_are_read(teacher, name):
    options = with_text(teacher, PROJECTS[name])
    config = load_teacher_config(tiny_cfg(*options))
    assert config.build_backbone().output_shape()["conv5"].channels == 32
    model = seeded_model(tiny_cfg(*options, meta_architecture="QuantMimicRCNN"), 1)
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0


def test_they_can_be_overridden_and_are_kept(teacher):
    options = with_text(teacher, PROJECTS["TridentNet"])
    cfg = tiny_cfg(*options, OPTS, ["MODEL.TRIDENT.NUM_BRANCH", "1"])
    assert "NUM_BRANCH: 1" in load_teacher_config(cfg).dump
    with pytest.raises(ValueError, match="MODEL.TRIDENT.NUM_BRANCHES"):
        load_teacher_config(tiny_cfg(*options, OPTS, ["MODEL.TRIDENT.NUM_BRANCHES", "1"]))


@pytest.mark.parametrize(
    "text, words",
    [
        ("MODEL: {PIXEL_MAEN: [1.0, 1.0, 1.0]}\n", "'MODEL.PIXEL_MAEN': 'PIXEL_MEAN'"),
        ("MODEL: {BACKBOEN: {NAME: x}}\n", "'MODEL.BACKBOEN': 'BACKBONE'"),
        ("INPUT: {FROMAT: RGB}\nMODEL: {VGG: {DETPH: 16}}\n", "'MODEL.VGG.DETPH': 'DEPTH'"),
    ],
)
def test_a_misspelt_key_is_refused(teacher, text, words):
    with pytest.raises(ValueError) as caught:
        load_teacher_config(tiny_cfg(*with_text(teacher, text)))
    assert words in str(caught.value) and ADD_CONFIG in str(caught.value) and "project.yaml" in str(caught.value)


def test_the_function_adds_what_the_yaml_leaves_out(teacher, project):
    options = with_text(teacher, "MODEL: {BACKBONE: {NAME: build_project_backbone}}\n")
    with pytest.raises(ValueError, match=f"whose backbone cannot be built.*{ADD_CONFIG}"):
        seeded_model(tiny_cfg(*options, meta_architecture="QuantMimicRCNN"), 1).train()
    added = (*options, ADD_CONFIG, "a_project:add_keys")
    model = seeded_model(tiny_cfg(*added, meta_architecture="QuantMimicRCNN"), 1)
    assert training_step(model, batch()).losses["loss_mimic"].item() > 0.0
    assert get_cfg().MODEL.get("PROJECT") is None


@pytest.mark.parametrize(
    "name, words",
    [
        ("a_project", "give 'package.module:function'"),
        (":add_keys", "give 'package.module:function'"),
        ("a_project:", "give 'package.module:function'"),
        ("no_such_project:add_keys", "cannot be imported: ModuleNotFoundError"),
        ("a_project:no_such_function", "cannot be imported: AttributeError"),
        ("a_project:number", "which is a int"),
        ("a_project:fails", "failed on a config: RuntimeError: no such luck"),
    ],
)
def test_a_wrong_function_is_named(teacher, project, name, words):
    with pytest.raises(ValueError) as caught:
        load_teacher_config(tiny_cfg(*teacher.options, ADD_CONFIG, name))
    assert words in str(caught.value) and f"{ADD_CONFIG} is {name!r}" in str(caught.value)


def test_a_lazy_config_takes_no_function(tmp_path, project):
    (tmp_path / "lazy.py").write_text("model = dict()\n")
    with pytest.raises(ValueError, match=f"{ADD_CONFIG} is 'a_project:add_keys'.*LazyConfig"):
        load_teacher_config(tiny_cfg(CONFIG_FILE, str(tmp_path / "lazy.py"), ADD_CONFIG, "a_project:add_keys"))


def test_a_run_with_it_repeats_itself(teacher, project, tmp_path):
    options = with_text(teacher, "MODEL: {BACKBONE: {NAME: build_project_backbone}}\n")
    cfg = tiny_cfg(*options, ADD_CONFIG, "a_project:add_keys", "OUTPUT_DIR", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    set_up_process(cfg, argument_parser().parse_args([]))
    again = load_config(str(tmp_path / "output" / "config.yaml"))
    assert again.MODEL.QMIMIC.TEACHER.CONFIG_FILE == str(tmp_path / "output" / "teacher_config.yaml")
    assert load_teacher_config(again).build_backbone().output_shape()["conv5"].channels == 32
