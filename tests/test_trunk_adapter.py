"""The adapter as a part of the student."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from helpers import RESNET_FPN, batch, calls_of_mimic_loss, seeded_model, tiny_cfg, training_step, write_teacher

from qmimic_d2.engine import load_config
from qmimic_d2.modeling.trunk_adapter import TrunkAdapter, trunk_channels

MIMIC = "MODEL.QMIMIC.MIMIC"
TRUNK = (f"{MIMIC}.ADAPTER_PLACEMENT", "trunk", f"{MIMIC}.ADAPTER", "conv1x1_relu")
INIT_HEADS = (f"{MIMIC}.INIT_HEADS_FROM_TEACHER", True)


class Pyramid(Backbone):
    """Two maps whose entries are those of the image."""

    size_divisibility = 4
    padding_constraints = {"size_divisibility": 4}

    def output_shape(self):
        return {"fine": ShapeSpec(channels=3, stride=1), "coarse": ShapeSpec(channels=3, stride=2)}

    def forward(self, x):
        return {"fine": x, "coarse": x[..., ::2, ::2]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def student(*options, meta_architecture="QuantMimicRCNN", seed=1):
    return seeded_model(tiny_cfg(*TRUNK, *options, meta_architecture=meta_architecture), seed)


def test_named_maps_are_adapted_and_others_are_not():
    adapted = TrunkAdapter(Pyramid(), {"coarse": 5}, "conv1x1_relu")
    assert adapted.output_shape() == {
        "fine": ShapeSpec(channels=3, stride=1),
        "coarse": ShapeSpec(channels=5, stride=2),
    }
    convolution = adapted.adapters["coarse"][0]
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.bias.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0]))
        convolution.weight[4] = 1.0
    x = torch.ones(2, 3, 4, 4)
    maps = adapted(x)
    assert maps["fine"] is x
    assert maps["coarse"].shape == (2, 5, 2, 2)
    # the first channel would be -1 without the ReLU
    assert maps["coarse"][0, :, 1, 1].tolist() == [0.0, 0.0, 1.0, 2.0, 6.0]


def test_a_linear_adapter_gives_negative_values():
    adapted = TrunkAdapter(Pyramid(), {"fine": 1}, "conv1x1")
    torch.nn.init.constant_(adapted.adapters["fine"].weight, -1.0)
    assert adapted(torch.ones(1, 3, 4, 4))["fine"].flatten()[0].item() == -3.0


def test_it_passes_on_what_detectron2_asks_a_backbone():
    adapted = TrunkAdapter(Pyramid(), {}, "conv1x1")
    assert adapted.size_divisibility == 4
    assert adapted.padding_constraints == {"size_divisibility": 4}


def test_a_trunk_needs_an_adapter():
    with pytest.raises(ValueError, match="MIMIC.ADAPTER is ''"):
        TrunkAdapter(Pyramid(), {"fine": 1}, "")
    with pytest.raises(ValueError, match="'mlp'"):
        TrunkAdapter(Pyramid(), {"fine": 1}, "mlp")


# ------------------------------------------------------------------------------------------- in a student


def test_the_mimic_compares_what_the_heads_read(teacher):
    model = student(*teacher.options)
    width = model.backbone.output_shape()["conv5"].channels
    assert width == 32
    assert not list(model.mimic.parameters())
    calls, read = calls_of_mimic_loss(model), []
    model.proposal_generator.register_forward_pre_hook(lambda module, args: read.append(args[1]["conv5"]))
    step = training_step(model, batch())
    quantizer = model.mimic.student_quantizer
    assert calls[0]["maps"]["conv5"].shape[1] == width
    assert torch.equal(quantizer.quantize(calls[0]["maps"]["conv5"].detach()), read[0].detach())
    assert step.losses["loss_mimic"].item() > 0.0
    assert "backbone.adapters.conv5.0.weight" in step.gradients


def test_without_a_quantizer_the_heads_read_the_compared_map(teacher):
    model = student(*teacher.options, "MODEL.QMIMIC.QUANTIZER.NAME", "")
    calls, read = calls_of_mimic_loss(model), []
    model.proposal_generator.register_forward_pre_hook(lambda module, args: read.append(args[1]["conv5"]))
    training_step(model, batch())
    assert calls[0]["maps"]["conv5"] is read[0]


def test_heads_begin_with_the_teachers(teacher):
    model = student(*teacher.options, *INIT_HEADS).train()
    taken = torch.load(teacher.weights)["model"]
    own = model.state_dict()
    heads = [name for name in own if name.startswith(("proposal_generator.", "roi_heads."))]
    assert len(heads) > 8
    assert all(torch.equal(own[name], taken[name]) for name in heads)
    training_step(model, batch())


def test_it_ships_without_the_teacher(teacher):
    trained = student(*teacher.options)
    shipped = student(f"{MIMIC}.TRUNK_CHANNELS", [32], meta_architecture="QuantRCNN", seed=2)
    shipped.load_state_dict(trained.state_dict())
    trained.eval()
    shipped.eval()
    with torch.no_grad():
        first, second = (model(batch())[0]["instances"] for model in (trained, shipped))
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_several_levels(tmp_path):
    options = (*RESNET_FPN, "MODEL.QMIMIC.QUANTIZER.SIGNED", True)
    written = write_teacher(tmp_path, *RESNET_FPN, "MODEL.FPN.OUT_CHANNELS", 12)
    names = (f"{MIMIC}.IN_FEATURES", ["p3", "p4"], f"{MIMIC}.ADAPTER", "conv1x1")
    # the heads of an FPN read maps of one width, so all of them are adapted
    words = r"MIMIC.ADAPTER_PLACEMENT is 'trunk'.*set .*IN_FEATURES \['p3', 'p4', 'p5', 'p6'\]"
    with pytest.raises(ValueError, match=words):
        student(*options, *written.options, *names)
    model = student(*options, *written.options, *names[2:], f"{MIMIC}.IN_FEATURES", ["p3", "p4", "p5", "p6"])
    assert {shape.channels for shape in model.backbone.output_shape().values()} == {12}


# ------------------------------------------------------------------------------------------------ config


def test_channels_are_the_teachers_or_the_given(teacher):
    cfg = tiny_cfg(*teacher.options)
    assert trunk_channels(cfg) == {"conv5": 32}
    assert trunk_channels(tiny_cfg(f"{MIMIC}.TRUNK_CHANNELS", [7])) == {"conv5": 7}


@pytest.mark.parametrize("widths", [[], [3, 4]])
def test_open_widths_name_the_key(widths):
    with pytest.raises(ValueError) as error:
        trunk_channels(tiny_cfg(f"{MIMIC}.TRUNK_CHANNELS", widths))
    for part in (f"{MIMIC}.TRUNK_CHANNELS", str(widths), "conv5", "TEACHER.CONFIG_FILE"):
        assert part in str(error.value)


@pytest.mark.parametrize("eval_only", [False, True])
def test_load_config_writes_the_widths_down(teacher, tmp_path, eval_only):
    path = tmp_path / "student.yaml"
    path.write_text(tiny_cfg(*TRUNK, *teacher.options, meta_architecture="QuantMimicRCNN").dump())
    cfg = load_config(str(path), eval_only=eval_only)
    assert cfg.MODEL.QMIMIC.MIMIC.TRUNK_CHANNELS == [32]
    assert bool(cfg.MODEL.QMIMIC.TEACHER.CONFIG_FILE) is not eval_only
