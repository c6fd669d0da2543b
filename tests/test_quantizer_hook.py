"""The backbone hook: any backbone, several levels, attached twice, removed, copied, traced, compiled."""

import copy
import io
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from torch import nn

from qmimic_d2.config import add_qmimic_config
from qmimic_d2.modeling.quantizer import PowerOfTwoQuantizer, UniformQuantizer
from qmimic_d2.modeling.quantizer_hook import QuantizerHook, attach_quantizer, attached_quantizer, check_features


class TinyBackbone(Backbone):
    """Two maps of a few cells."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.coarse = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x):
        fine = self.fine(x)
        return {"fine": fine, "coarse": self.coarse(fine.relu())}

    def output_shape(self):
        return {"fine": ShapeSpec(channels=4, stride=4), "coarse": ShapeSpec(channels=4, stride=8)}


IMAGES = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 5


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def quantized(maps, quantizer, names):
    return {name: quantizer(x) if name in names else x for name, x in maps.items()}


BACKBONES = {
    "vgg": ("MODEL.BACKBONE.NAME", "build_vgg_backbone", "MODEL.VGG.WIDTH_DIVISOR", 32),
    "stock resnet": (
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"]),
    ),
    "stock fpn": (
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
        *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 8),
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone(name):
    cfg = get_cfg()
    add_qmimic_config(cfg)
    cfg.merge_from_list(list(BACKBONES[name]))
    backbone = build_backbone(cfg).eval()
    keys, num_parameters = list(backbone.state_dict()), len(list(backbone.parameters()))
    quantizer = UniformQuantizer(0.1, signed=True)
    with torch.no_grad():
        plain = backbone(IMAGES)
        names = list(plain)[1:] or list(plain)  # where there are several, one stays as it is
        hook = attach_quantizer(backbone, quantizer, names)
        assert_same(backbone(IMAGES), quantized(plain, quantizer, names))
        assert any(not torch.equal(plain[name], quantizer(plain[name])) for name in names)
        assert list(backbone.state_dict()) == keys and len(list(backbone.parameters())) == num_parameters
        assert not any(module is quantizer for module in backbone.modules())
        hook.remove()
        assert_same(backbone(IMAGES), plain)


def test_heads_read_codes_and_gradients_pass():
    backbone = TinyBackbone()
    attach_quantizer(backbone, UniformQuantizer(0.5), ["fine"])
    maps = backbone(IMAGES)
    assert torch.equal(maps["fine"] * 2, (maps["fine"] * 2).round())
    maps["fine"].sum().backward()
    assert backbone.fine.weight.grad.abs().sum() > 0


def test_attaching_again_replaces():
    backbone = TinyBackbone()
    plain = backbone(IMAGES)
    first = attach_quantizer(backbone, UniformQuantizer(0.5), ["fine"])
    second = attach_quantizer(backbone, PowerOfTwoQuantizer(0.25), ["coarse"])
    assert attached_quantizer(backbone) is second and len(backbone._forward_hooks) == 1
    assert_same(backbone(IMAGES), quantized(plain, second.quantizer, ["coarse"]))
    first.remove()  # replaced, so there is nothing to take away
    assert attached_quantizer(backbone) is second
    second.remove()
    second.remove()
    assert attached_quantizer(backbone) is None and not backbone._forward_hooks
    assert_same(backbone(IMAGES), plain)


def test_attaching_the_same_quantizer_twice_quantizes_once():
    backbone = TinyBackbone()
    calls = []

    class Counting(UniformQuantizer):
        def forward(self, x):
            calls.append(x)
            return super().forward(x)

    quantizer = Counting()
    attach_quantizer(backbone, quantizer, ["fine"])
    attach_quantizer(backbone, quantizer, ["fine"])
    backbone(IMAGES)
    assert len(calls) == 1


def test_other_hooks_stay_and_go_on_reading_codes():
    backbone = TinyBackbone()
    before, after = [], []
    backbone.register_forward_hook(lambda module, inputs, output: before.append(output["fine"]))
    attach_quantizer(backbone, UniformQuantizer(0.5), ["fine"])
    backbone.register_forward_hook(lambda module, inputs, output: after.append(output["fine"]))
    hook = attach_quantizer(backbone, UniformQuantizer(2.0), ["fine"])
    backbone(IMAGES)
    assert torch.equal(after[0], hook.quantizer(before[0]))
    assert not torch.equal(after[0], before[0])
    hook.remove()
    assert len(backbone._forward_hooks) == 2


def test_a_backbone_without_a_hook():
    assert attached_quantizer(TinyBackbone()) is None


def test_no_image():
    backbone = TinyBackbone()
    attach_quantizer(backbone, UniformQuantizer(), ["fine", "coarse"])
    assert backbone(IMAGES[:0])["fine"].shape == (0, 4, 8, 16)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_has_a_hook_of_its_own(make_copy):
    backbone = TinyBackbone()
    plain = backbone(IMAGES)
    hook = attach_quantizer(backbone, UniformQuantizer(0.5), ["fine"])
    codes = backbone(IMAGES)
    other = make_copy(backbone)
    other_hook = attached_quantizer(other)
    assert isinstance(other_hook, QuantizerHook) and other_hook is not hook
    assert other_hook.quantizer is not hook.quantizer
    assert_same(other(IMAGES), codes)
    other_hook.remove()
    assert attached_quantizer(other) is None and attached_quantizer(backbone) is hook
    assert_same(other(IMAGES), plain)
    assert_same(backbone(IMAGES), codes)
    third = make_copy(backbone)
    hook.remove()
    assert_same(third(IMAGES), codes)
    attach_quantizer(third, UniformQuantizer(2.0), ["fine"])
    assert len(third._forward_hooks) == 1
    third.register_forward_hook(lambda module, inputs, output: None)
    assert len(third._forward_hooks) == 2, "a new hook must not take the copied one's place"


def test_state_dicts_are_exchangeable():
    backbone, plain = TinyBackbone(), TinyBackbone()
    attach_quantizer(backbone, UniformQuantizer(0.5), ["fine"])
    plain.load_state_dict(backbone.state_dict())
    backbone.load_state_dict(plain.state_dict())
    assert torch.equal(backbone(IMAGES)["fine"], UniformQuantizer(0.5)(plain(IMAGES)["fine"]))


@pytest.mark.parametrize("quantizer", [UniformQuantizer(0.5), PowerOfTwoQuantizer(0.5, 5, signed=True)], ids=str)
def test_a_trace_holds_the_hook(quantizer):
    backbone = TinyBackbone().eval()
    attach_quantizer(backbone, quantizer, ["fine", "coarse"])
    traced = torch.jit.trace(backbone, IMAGES, strict=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = IMAGES[:1, :, :16]
    with torch.no_grad():
        assert_same(torch.jit.load(file)(other), backbone(other))


def test_a_compiled_backbone_holds_the_hook():
    backbone = TinyBackbone()
    attach_quantizer(backbone, UniformQuantizer(0.5), ["fine"])
    torch._dynamo.reset()
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    assert_same(compiled(IMAGES), backbone(IMAGES))
    grads = []
    for model in (compiled, backbone):
        (grad,) = torch.autograd.grad(model(IMAGES)["fine"].sum(), backbone.fine.weight)
        grads.append(grad)
    torch.testing.assert_close(*grads)


def test_an_unknown_feature_is_refused():
    backbone = TinyBackbone()
    hook = attach_quantizer(backbone, UniformQuantizer(), ["fine"])
    with pytest.raises(ValueError) as error:
        attach_quantizer(backbone, UniformQuantizer(), ["fine", "p2"])
    for part in ("MODEL.QMIMIC.QUANTIZER.IN_FEATURES", "['p2']", "['coarse', 'fine']"):
        assert part in str(error.value)
    assert attached_quantizer(backbone) is hook, "a refused quantizer must leave the old one in place"


def test_check_features():
    check_features([], {}, "KEY")
    check_features(["a"], {"a": None, "b": None}, "KEY")
    with pytest.raises(ValueError, match=r"KEY names \['c', 'd'\].*it gives \['a', 'b'\]"):
        check_features(["c", "a", "d"], {"b": None, "a": None}, "KEY")


@pytest.mark.parametrize("signed", [False, True])
def test_an_unsigned_dictionary_on_an_fpn_is_warned_about(signed, caplog):
    from helpers import RESNET_FPN, tiny_cfg

    backbone = build_backbone(tiny_cfg(*RESNET_FPN))
    with caplog.at_level("WARNING"):
        attach_quantizer(backbone, UniformQuantizer(0.5, signed=signed), ["p3"])
    assert ("MODEL.QMIMIC.QUANTIZER.SIGNED True" in caplog.text) == (not signed)
