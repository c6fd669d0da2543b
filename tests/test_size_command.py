"""Peak activation memory by hand, and ``python -m qmimic_d2 size``."""

import json
import os

import pytest
import torch
from exported import write_detector
from helpers import RESNET_FPN, seeded_model, tiny_cfg
from test_command_line import status_of
from torch import nn

from qmimic_d2.analysis import measure_activation_memory
from qmimic_d2.analysis.activation_memory import _Meter


def test_peaks_by_hand():
    weight, image = torch.zeros(4, 4), torch.zeros(2, 4)
    meter = _Meter([weight, image])
    with meter:
        first = image @ weight  # 2 x 4 values of 4 bytes
        second = first + 1.0
        view = second[0]  # no memory of its own
        assert meter.peak == 64
        del first
        second.add_(1.0)
        third = torch.cat([second, second])  # 64 more
        assert meter.peak == 32 + 64
        del second, third, view
        torch.zeros(5)
    assert meter.peak == 96


def test_parts_by_hand():
    meter = _Meter([])
    with meter:
        kept = torch.zeros(10)
        meter.begin_part()
        torch.zeros(5)
        meter.end_part("backbone")
        meter.begin_part()
        del kept
        meter.end_part("roi_heads")
    assert meter.part_peaks == {"backbone": 60, "roi_heads": 40} and meter.peak == 60


def test_of_a_detector():
    cfg = tiny_cfg()
    peaks = measure_activation_memory(cfg, 64, 64)
    assert set(peaks) == {"total", "backbone", "proposal_generator", "roi_heads"}
    # conv1 puts out 2 x 32 x 32 values, and its BatchNorm as many beside them; the picture, normalized, is held
    image, conv1 = 3 * 64 * 64 * 4, 2 * 32 * 32 * 4
    assert peaks["backbone"] >= image + 2 * conv1
    assert peaks["total"] == max(peaks.values())
    assert measure_activation_memory(cfg, 64, 64) == peaks
    larger = measure_activation_memory(cfg, 128, 64)
    assert larger["backbone"] == 2 * peaks["backbone"]


def test_a_model_is_left_as_it_was():
    model = seeded_model(tiny_cfg(*RESNET_FPN)).train()
    hooks = {name: (len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in model.named_modules()}
    measure_activation_memory(model, 64, 64)
    assert model.training
    after = {name: (len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in model.named_modules()}
    assert after == hooks


def test_a_model_without_those_parts():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 2)

        def forward(self, inputs):
            return self.layer(inputs[0]["image"])

    assert measure_activation_memory(Plain(), 4, 64) == {"total": 3 * 4 * 2 * 4}


# ---------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    return [
        write_detector(folder, "MODEL.VGG.WIDTH_DIVISOR", divisor, name=f"vgg{divisor}") for divisor in (32, 16)
    ]


def test_side_by_side(detectors, tmp_path, capsys):
    exported, report = tmp_path / "model_int8.onnx", tmp_path / "new" / "size.json"
    exported.write_bytes(b"0" * 2500)
    files = [each.config_file for each in detectors]
    weights = [each.weights for each in detectors]
    options = ["--exported", exported, "--json", report]
    assert status_of("size", "--config-file", *files, "--weights", *weights, *options) == 0
    out = capsys.readouterr().out
    content = json.loads(report.read_text())
    small, large = content["models"]
    assert small["parameters"] < large["parameters"] and small["flops"] < large["flops"]
    assert small["peak_activation_bytes"]["total"] < large["peak_activation_bytes"]["total"]
    assert (small["height"], small["width"]) == (64, 64)
    assert small["checkpoint_bytes"] == os.path.getsize(weights[0]) > small["weight_bytes"] > 4 * small["parameters"]
    assert content["exported"] == [{"file": str(exported), "bytes": 2500}]
    assert f"{small['parameters']:,}" in out and "backbone" in out and "2 kB" in out
    assert "other" not in out  # nothing lies outside of the three parts


def test_another_input_and_overrides(detectors, capsys):
    arguments = ["--config-file", detectors[0].config_file, "--input", "32x96"]
    assert status_of("size", *arguments, "MODEL.RPN.POST_NMS_TOPK_TEST", 7) == 0
    assert "image 32 x 96, 7 proposals" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights", "a.pth", "b.pth"], "2 files for 1 configs"),
        (["--weights", "/nowhere/model.pth"], "/nowhere/model.pth"),
        (["--exported", "/nowhere/model.onnx"], "/nowhere/model.onnx"),
        (["--input", "big"], "480x640"),
        (["INPUT.MIN_SIZE_TEST", "0"], "give the image's size with --input"),
        (["MODEL.VGG.DEPTH", "12"], "MODEL.VGG.DEPTH"),
    ],
)
def test_mistakes(detectors, capsys, arguments, message):
    assert status_of("size", "--config-file", detectors[0].config_file, *arguments) == 2
    assert message in capsys.readouterr().err
