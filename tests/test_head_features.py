"""Which node describes the heads of a config's detector."""

import pytest
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from helpers import tiny_cfg

from qmimic_d2.modeling.family import family_of, has_quantizer_keys, head_features, head_node, imitates


class OwnRetinaNet(RetinaNet):
    """Of another project."""


@pytest.fixture
def registered():
    META_ARCH_REGISTRY.register(OwnRetinaNet)
    yield
    META_ARCH_REGISTRY._obj_map.pop("OwnRetinaNet")


@pytest.mark.parametrize(
    "name, node",
    [
        *((name, "ROI_HEADS") for name in ("GeneralizedRCNN", "QuantRCNN", "QuantMimicRCNN", "PanopticFPN")),
        *((name, "RETINANET") for name in ("RetinaNet", "QuantRetinaNet", "QuantMimicRetinaNet", "OwnRetinaNet")),
        *((name, "FCOS") for name in ("QuantFCOS", "QuantMimicFCOS")),
        ("OfAPackageThatIsNotImported", "ROI_HEADS"),
    ],
)
def test_node_of_the_heads(registered, name, node):
    cfg = tiny_cfg(f"MODEL.{node}.IN_FEATURES", ["a", "b"], meta_architecture=name)
    assert head_node(cfg) is cfg.MODEL[node]
    assert head_features(cfg) == ["a", "b"]


def test_the_list_is_its_own():
    cfg = tiny_cfg()
    head_features(cfg).append("p9")
    assert cfg.MODEL.ROI_HEADS.IN_FEATURES == ["conv5"]


@pytest.mark.parametrize(
    "name, family, quantizes, learns",
    [
        ("GeneralizedRCNN", "RCNN", False, False),
        ("QuantRCNN", "RCNN", True, False),
        ("QuantMimicRCNN", "RCNN", True, True),
        ("QuantMimicFCOS", "FCOS", True, True),
        ("OwnRetinaNet", "RetinaNet", False, False),
        ("ProposalNetwork", "ProposalNetwork", False, False),
        ("QuantMimic", None, True, True),
        ("SemanticSegmentor", None, False, False),
        ("NotRegistered", None, False, False),
    ],
)
def test_what_a_name_says(registered, name, family, quantizes, learns):
    assert getattr(family_of(name), "name", None) == family
    assert (has_quantizer_keys(name), imitates(name)) == (quantizes, learns)
