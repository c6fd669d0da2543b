"""int8: what is quantized, which codes pass exactly, and the search for the layers to keep in float."""

import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import random_image, spread_model
from helpers import RESNET_C4, RESNET_FPN
from onnx import numpy_helper

from qmimic_d2.export import OnnxDetector, describe_model, export_onnx, quantize_onnx
from qmimic_d2.export.onnx.layers import code_tensors, quantizable_layers
from qmimic_d2.modeling.quantizer_hook import attached_quantizer

pytestmark = pytest.mark.export

CLASSES = [(0, "a"), (1, "b"), (2, "c")]
QUANTIZER = "MODEL.QMIMIC.QUANTIZER"


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A float file of the tiny student, and calibration images for it."""
    path = str(tmp_path_factory.mktemp("float") / "model.onnx")
    cfg, model = spread_model()
    description = describe_model(cfg, model, CLASSES)
    export_onnx(model, description, path)
    images = [description.input_spec.prepare(random_image(64, 64, seed))[0] for seed in range(4)]
    return path, images


def quantized_weights(path):
    return {each.name for each in onnx.load(path).graph.initializer if each.data_type == onnx.TensorProto.INT8}


def test_every_layer_in_int8(floats, tmp_path):
    source, images = floats
    target, told = str(tmp_path / "int8.onnx"), []
    assert quantize_onnx(source, target, images, code_stride=0.25, report=told.append) == []
    graph = onnx.load(target)
    # eight convolutions of the backbone, three of the RPN, three linear layers; biases are int32
    assert len(quantizable_layers(onnx.load(source).graph)) == 14
    scales = [node for node in graph.graph.node if node.op_type == "DequantizeLinear"]
    per_channel = [each for each in scales if any(a.name == "axis" for a in each.attribute)]
    assert len(quantized_weights(target)) >= 14 and len(per_channel) >= 14
    assert told[0] == "Codes of the quantizer pass through int8 exactly: 1 feature map(s)"
    metadata = {each.key: each.value for each in graph.metadata_props}
    assert metadata["int8_float_layers"] == "none" and "qmimic_d2.json" in metadata
    found, expected = OnnxDetector(target)(random_image(64, 64)), OnnxDetector(source)(random_image(64, 64))
    assert len(found) > 0 and abs(float(found.scores[0]) - float(expected.scores[0])) < 0.2
    assert os.path.getsize(target) < os.path.getsize(source) * 2
    assert os.listdir(tmp_path) == ["int8.onnx"]


@pytest.mark.parametrize("signed", [False, True])
def test_codes_pass_through_int8_exactly(tmp_path, signed):
    class Codes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 3, 1)

        def forward(self, image):
            # the codes that UniformQuantizer traces to
            magnitude = (image / 0.25).abs() if signed else image / 0.25
            codes = (magnitude - 0.25 - 0.25).ceil().clamp(min=0.0)
            codes = torch.where(image < 0, -codes, codes) if signed else codes
            return self.conv(codes * 0.25)

    source, target = str(tmp_path / "float.onnx"), str(tmp_path / "int8.onnx")
    image = torch.linspace(-30.0 if signed else 0.0, 30.0, 2 * 8 * 8).reshape(1, 2, 8, 8)
    torch.onnx.export(
        Codes().eval(), (image,), source, opset_version=16, dynamo=False, input_names=["image"], output_names=["boxes"]
    )
    told = []
    quantize_onnx(source, target, [image.numpy()], code_stride=0.25, code_signed=signed, report=told.append)
    assert told[0].startswith("Codes of the quantizer")
    model = onnx.load(target)
    zero_points = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    (codes,) = [
        node
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and zero_points[node.input[1]].item() == 0.25
    ]
    assert zero_points[codes.input[2]].item() == (128 if signed else 0)
    restored = next(node for node in model.graph.node if codes.output[0] in node.input)
    model.graph.output.extend(onnx.ValueInfoProto(name=each) for each in (codes.input[0], restored.output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    _, before, after = session.run(None, {"image": image.numpy()})
    assert len(np.unique(before)) > 100 and (before == after).all()


def test_codes_that_no_byte_holds_are_calibrated(floats, tmp_path):
    source, images = floats
    told, bright = [], [1e4 * each for each in images]
    quantize_onnx(source, str(tmp_path / "int8.onnx"), bright, code_stride=0.25, report=told.append)
    assert not [text for text in told if text.startswith("Codes")]


def test_code_tensors_of_a_detector(floats):
    graph = onnx.load(floats[0]).graph
    assert len(code_tensors(graph, 0.25)) == 1
    assert code_tensors(graph, 0.5) == []


@pytest.mark.parametrize("options, signed, maps", [((), False, 1), (RESNET_FPN, True, 3)])
def test_the_codes_of_a_detector_get_its_stride_as_scale(tmp_path, options, signed, maps):
    source, target = str(tmp_path / "float.onnx"), str(tmp_path / "int8.onnx")
    # 0.25 and 1.0 are scales that calibration would hardly find
    cfg, model = spread_model(*options, f"{QUANTIZER}.STRIDE", 1.0 if signed else 0.25)
    description = describe_model(cfg, model, CLASSES)
    export_onnx(model, description, source)
    stride, images = attached_quantizer(model.backbone).quantizer.stride, [random_image(64, 64, 1)]
    pixels = [description.input_spec.prepare(each)[0] for each in images]
    quantize_onnx(source, target, pixels, code_stride=stride, code_signed=signed)
    graph = onnx.load(target).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    coded = [node for node in nodes if constants[node.input[1]].size == 1 and constants[node.input[1]] == stride]
    assert len(coded) == maps
    assert {int(constants[node.input[2]]) for node in coded} == {128 if signed else 0}


def test_layers_and_what_follows_them(tmp_path):
    cfg, model = spread_model(*RESNET_C4)
    path = str(tmp_path / "model.onnx")
    export_onnx(model, describe_model(cfg, model, CLASSES), path)
    layers = {each.name: each.nodes for each in quantizable_layers(onnx.load(path).graph)}
    assert [node.rpartition("/")[2] for node in layers["backbone/stem/conv1"]] == ["Conv", "Relu", "MaxPool"]
    # a residual sum belongs to the layer before it
    assert any(node.endswith("Add") for nodes in layers.values() for node in nodes)
    assert "roi_heads/box_predictor/cls_score" in layers


# ------------------------------------------------------------------------------- the search


class Scores:
    """AP of a candidate by the number of its int8 layers that are not in ``harmless``."""

    def __init__(self, source, losses):
        self.layers = {each.name: each.nodes[0] for each in quantizable_layers(onnx.load(source).graph)}
        self.losses = losses
        self.calls = []

    def __call__(self, path):
        kinds = {node.name: node for node in onnx.load(path).graph.node}
        producers = {output: node for node in kinds.values() for output in node.output}
        lost = 0.0
        for name, loss in self.losses.items():
            weight = producers.get(kinds[self.layers[name]].input[1])
            if weight is not None and weight.op_type == "DequantizeLinear":
                lost += loss
        self.calls.append(path)
        return 60.0 - lost


def search(floats, folder, losses, **options):
    source, images = floats
    target = str(folder / "int8.onnx")
    told = []
    trials = quantize_onnx(
        source, target, images[:1], evaluate=Scores(source, losses), report=told.append, **options
    )
    metadata = {each.key: each.value for each in onnx.load(target).metadata_props}
    return trials, metadata["int8_float_layers"], told


CONV, LINEAR = "proposal_generator/rpn_head/conv", "roi_heads/box_predictor/cls_score"


def test_no_search_where_int8_costs_little(floats, tmp_path):
    trials, kept, told = search(floats, tmp_path, {CONV: 0.25, LINEAR: 0.125}, max_ap_loss=0.5)
    assert [(len(each.float_layers), each.AP) for each in trials] == [(14, 60.0), (0, 59.625)]
    assert kept == "none"
    assert told[-1] == "int8, in float nothing: AP 59.62 (-0.38)"


def test_the_layers_that_cost_most_stay_in_float(floats, tmp_path):
    trials, kept, told = search(floats, tmp_path, {CONV: 2.0, LINEAR: 3.0}, max_ap_loss=0.5)
    assert kept == f"{LINEAR}, {CONV}"
    assert trials[-1].float_layers == (LINEAR, CONV) and trials[-1].AP == 60.0
    assert len(trials) == 2 + 14 + 1
    assert told[-1] == f"Kept in float: {LINEAR}, {CONV}, AP +0.00"


def test_one_layer_may_be_enough(floats, tmp_path):
    trials, kept, _ = search(floats, tmp_path, {CONV: 0.25, LINEAR: 3.0}, max_ap_loss=0.5)
    assert kept == LINEAR and len(trials) == 2 + 14


def test_the_search_ends_when_its_time_is_over(floats, tmp_path):
    trials, kept, told = search(floats, tmp_path, {CONV: 2.0}, max_ap_loss=0.5, seconds=0.0)
    assert len(trials) == 2 and kept == "none"
    assert told[-2:] == ["The time of the search is over (--search-seconds)", "Kept in float: no layer, AP -2.00"]


def test_a_second_layer_is_not_tried_when_the_time_is_over(floats, tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("qmimic_d2.export.onnx.int8.time.monotonic", lambda: next(clock))
    # one reading for the end, one for each of the 14 layers, and the next is too late
    trials, kept, told = search(floats, tmp_path, {CONV: 2.0, LINEAR: 3.0}, max_ap_loss=0.5, seconds=14)
    assert len(trials) == 2 + 14 and kept == LINEAR
    assert told[-2:] == ["The time of the search is over (--search-seconds)", f"Kept in float: {LINEAR}, AP -2.00"]


def test_every_layer_may_stay_in_float(floats, tmp_path):
    names = [each.name for each in quantizable_layers(onnx.load(floats[0]).graph)]
    trials, kept, _ = search(floats, tmp_path, dict.fromkeys(names, 1.0), max_ap_loss=0.5)
    assert trials[-1].AP == 60.0 and set(kept.split(", ")) == set(names)
    assert quantized_weights(str(tmp_path / "int8.onnx")) == set()


def test_a_candidate_that_detects_nothing_has_ap_0(floats, tmp_path):
    trials, kept, _ = search(floats, tmp_path, {CONV: np.nan}, max_ap_loss=0.5)
    assert trials[1].AP == 0.0 and kept == CONV


# ------------------------------------------------------------------------------- mistakes


def test_nothing_to_calibrate_with(floats, tmp_path):
    with pytest.raises(ValueError, match="needs images"):
        quantize_onnx(floats[0], str(tmp_path / "int8.onnx"), [])


def test_nothing_to_quantize(tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, image):
            return image + 1

    path = str(tmp_path / "float.onnx")
    torch.onnx.export(Nothing(), (torch.zeros(1),), path, opset_version=16, dynamo=False, input_names=["image"])
    with pytest.raises(ValueError, match="no layer with weights"):
        quantize_onnx(path, str(tmp_path / "int8.onnx"), [np.zeros(1, np.float32)])


@pytest.mark.parametrize("package, what", [("onnx", "writing ONNX takes"), ("onnxruntime.quantization", "int8 takes")])
def test_a_missing_package_is_named_with_its_extra(floats, tmp_path, monkeypatch, package, what):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{what}.*qmimic_d2\[export\]"):
        quantize_onnx(floats[0], str(tmp_path / "int8.onnx"), floats[1])
    assert os.listdir(tmp_path) == []
