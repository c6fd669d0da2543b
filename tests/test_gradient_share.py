"""How much of the gradient is the mimic's, on graphs small enough to differentiate by hand."""

import math

import pytest
import torch
from detectron2.utils import comm

from qmimic_d2.diagnostics.gradient_share import GradientShare, averaged, gradient_share, summed


def graph():
    """A parameter p, a map m = 2p, and losses whose gradients at m are (3, 4) and (0, 5)."""
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    feature = 2.0 * parameter
    detection = (feature * torch.tensor([3.0, 4.0])).sum()
    mimic = feature[1] * 5.0
    return parameter, feature, detection, mimic


def test_norms_ratio_share_and_cosine():
    parameter, feature, detection, mimic = graph()
    at_map, at_parameter = gradient_share(detection, mimic, [[feature], [parameter]])
    assert (at_map.detection, at_map.mimic, at_map.product) == (5.0, 5.0, 20.0)
    assert (at_map.ratio, at_map.share, at_map.cosine) == (1.0, 0.5, 0.8)
    # the chain rule doubles both
    assert (at_parameter.detection, at_parameter.mimic, at_parameter.product) == (10.0, 10.0, 80.0)


def test_several_tensors_are_one_vector():
    parameter = torch.ones(2, requires_grad=True)
    other = torch.ones(2, 2, requires_grad=True)
    share = gradient_share(parameter.sum() * 2.0 + other.sum(), other.sum() * 3.0, [[parameter, other]])[0]
    # |(2, 2, 1, 1, 1, 1)|, |(0, 0, 3, 3, 3, 3)|, 4 * 3
    assert share.detection == pytest.approx(math.sqrt(12.0))
    assert (share.mimic, share.product) == (6.0, 12.0)


def test_the_graph_and_the_gradients_stay():
    parameter, feature, detection, mimic = graph()
    gradient_share(detection, mimic, [[feature], [parameter]])
    assert parameter.grad is None
    (detection + mimic).backward()
    assert parameter.grad.tolist() == [6.0, 18.0]


def test_a_loss_without_a_graph_has_no_gradient():
    parameter, feature, detection, _ = graph()
    share = gradient_share(detection, torch.tensor(3.0), [[feature]])[0]
    assert (share.detection, share.mimic, share.product) == (5.0, 0.0, 0.0)
    assert share.ratio == 0.0 and share.share == 0.0 and math.isnan(share.cosine)


def test_a_loss_that_does_not_reach_a_place():
    _, feature, detection, _ = graph()
    elsewhere = torch.ones(3, requires_grad=True)
    shares = gradient_share(detection, elsewhere.sum(), [[feature], [elsewhere]])
    assert (shares[0].detection, shares[0].mimic) == (5.0, 0.0)
    assert (shares[1].detection, shares[1].mimic) == (0.0, pytest.approx(math.sqrt(3.0)))
    assert math.isnan(shares[1].ratio) and shares[1].share == 1.0


def test_no_gradient_at_all():
    nothing = GradientShare(0.0, 0.0, 0.0)
    assert math.isnan(nothing.ratio) and math.isnan(nothing.share) and math.isnan(nothing.cosine)
    assert gradient_share(torch.tensor(1.0), torch.tensor(1.0), [[]]) == [nothing]


def test_scaled_by_lambda():
    share = GradientShare(2.0, 3.0, -6.0).scaled(4.0)
    assert share == GradientShare(2.0, 12.0, -24.0)
    assert share.cosine == -1.0
    assert share.share == pytest.approx(12.0 / 14.0)


def test_scalars():
    assert GradientShare(4.0, 1.0, 2.0).scalars("map") == {
        "qmimic/grad_norm_mimic_map": 1.0,
        "qmimic/grad_norm_detection_map": 4.0,
        "qmimic/grad_ratio_map": 0.25,
        "qmimic/grad_cosine_map": 0.5,
        "qmimic/grad_share_map": 0.2,
    }


def test_summed():
    assert summed({}).item() == 0.0
    assert summed({"a": torch.tensor(1.5), "b": torch.tensor(2.0)}).item() == 3.5


def test_alone_the_average_is_the_share():
    shares = [GradientShare(3.0, 4.0, 5.0)]
    assert averaged(shares) == shares


def test_the_average_of_several_processes(monkeypatch):
    def all_gather(mine):
        return [mine, torch.tensor([[1.0, 49.0, 4.0]], dtype=torch.float64)]

    monkeypatch.setattr(comm, "all_gather", all_gather)
    # (9 + 1) / 2, (1 + 49) / 2, (2 + 4) / 2
    (share,) = averaged([GradientShare(3.0, 1.0, 2.0)])
    assert share.detection == pytest.approx(math.sqrt(5.0))
    assert (share.mimic, share.product) == (5.0, 3.0)
