"""The network of a one-stage detector alone as ONNX: its graph, what it detects, its files, and what is refused."""

import json
import os
import sys

import cv2
import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling.anchor_generator import RotatedAnchorGenerator
from exported import assert_close, random_image, run_without, spread, spread_model
from helpers import ONE_STAGE_FPN, write_teacher
from raw_decoders import CLASSES, SIZE, one_stage, raw_description
from test_command_line import status_of
from test_export_command import make_true
from tiny_coco import registered_coco, write_images

from qmimic_d2.export import ModelDescription, OnnxDetector, describe_model, describe_raw, export_onnx
from qmimic_d2.export.description import METADATA_KEY
from qmimic_d2.export.onnx.file import check_onnx, nodes_of
from qmimic_d2.export.preprocessing import Detections
from qmimic_d2.export.raw.portable import OPERATORS
from qmimic_d2.inference.prediction import Predictor

pytestmark = pytest.mark.export

QUANTIZER = "MODEL.QMIMIC.QUANTIZER.NAME"
NOT_PORTABLE = {"If", "Loop", "Scan", "NonMaxSuppression", "RoiAlign", "TopK", "NonZero", "Shape", "Gather"}
WITH_INT8 = {*OPERATORS, "QuantizeLinear", "DequantizeLinear"}


def written(folder, cfg, model):
    description = raw_description(cfg, model)
    path = str(folder / "model_raw.onnx")
    export_onnx(model, description, path)
    return path, description


def assert_static(graph, operators):
    """Only such operators, and every tensor of known shape; activations are float32, codes and masks."""
    assert {node.op_type for node in nodes_of(graph)} <= {*operators, "Constant"}
    known = {each.name: each.type.tensor_type for each in (*graph.value_info, *graph.input, *graph.output)}
    for node in graph.node:
        for name in node.output:
            assert all(each.dim_value > 0 for each in known[name].shape.dim), name
            assert known[name].elem_type != onnx.TensorProto.INT64, name


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS"])
@pytest.mark.parametrize(
    "options, has_fpn",
    [
        ((), True),
        ((QUANTIZER, "PowerOfTwo"), True),
        ((QUANTIZER, "", "MODEL.FPN.NORM", "BN"), True),
        ((QUANTIZER, "Clamp"), False),
        ((QUANTIZER, "", "MODEL.VGG.NORM", "GN", "MODEL.VGG.WIDTH_DIVISOR", 8), False),
    ],
)
def test_the_graph_and_what_it_detects(tmp_path, family, options, has_fpn):
    assert not NOT_PORTABLE & set(OPERATORS)
    cfg, model = one_stage(family, *options, has_fpn=has_fpn)
    path, description = written(tmp_path, cfg, model)
    file = onnx.load(path)
    check_onnx(file)
    assert_static(file.graph, OPERATORS)
    (network_input,) = file.graph.input
    assert [each.dim_value for each in network_input.type.tensor_type.shape.dim] == [1, 3, *SIZE]
    assert [each.name for each in file.graph.output] == list(description.decoding.output_shapes)
    assert {each.key: each.value for each in file.metadata_props}[METADATA_KEY] == description.to_json()
    assert ModelDescription.from_json(description.to_json()) == description
    detector, predictor = OnnxDetector(path, threads=1), Predictor.of_model(cfg, model, description.input_spec)
    for size in (SIZE, (50, 33), (100, 300), (480, 640)):
        assert_close(detector(random_image(*size)), predictor.detect(random_image(*size)))


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS"])
def test_another_runtime(tmp_path, family):
    cfg, model = one_stage(family, QUANTIZER, "Clamp")
    path, description = written(tmp_path, cfg, model)
    pixels, placement = description.input_spec.prepare(random_image(50, 60))
    network = cv2.dnn.readNetFromONNX(path)
    network.setInput(pixels[None], "image")
    outputs = network.forward(list(description.decoding.output_shapes))
    found = placement.restore(*description.decoding.decode(outputs))
    assert_close(found, OnnxDetector(path)(random_image(50, 60)))


def test_detectron2s_own_retinanet(tmp_path):
    options = ("MODEL.BACKBONE.NAME", "build_divided_retinanet_resnet_fpn_backbone")
    levels = ("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"])
    sizes = ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]])
    cfg, model = one_stage("RetinaNet", *options, *levels, *sizes, prefix="")
    path, description = written(tmp_path, cfg, model)
    assert type(model).__module__.startswith("detectron2") and len(description.decoding.levels) == 5
    predictor = Predictor.of_model(cfg, model, description.input_spec)
    assert_close(OnnxDetector(path)(random_image(50, 60)), predictor.detect(random_image(50, 60)))


@pytest.mark.parametrize("family", ["RetinaNet", "FCOS"])
@pytest.mark.parametrize("size, min_size", [((64, 80), 0), ((40, 96), 0), ((50, 75), 64)])
def test_detectron2_pads_to_the_same_size(tmp_path, family, size, min_size):
    """Detectron2 resizes an image as the fixed size does, pads it to the same size, and detects the same."""
    cfg, model = one_stage(family, "INPUT.MIN_SIZE_TEST", min_size)
    path, _ = written(tmp_path, cfg, model)
    image = random_image(*size)
    assert_close(OnnxDetector(path, threads=1)(image), Predictor.of_model(cfg, model).detect(image))


def test_without_torch(tmp_path):
    cfg, model = one_stage("FCOS")
    path, description = written(tmp_path, cfg, model)
    (tmp_path / "model_raw.json").write_text(description.to_json())
    np.save(tmp_path / "image.npy", random_image(50, 70))
    code = (
        "import numpy as np, onnxruntime\n"
        "from qmimic_d2.export import ModelDescription, OnnxDetector\n"
        "path, image = sys.argv[1], np.load(sys.argv[2])\n"
        "found = OnnxDetector(path)(image)\n"
        "description = ModelDescription.from_json(open(path[:-4] + 'json').read())\n"
        "pixels, placement = description.input_spec.prepare(image)\n"
        "outputs = onnxruntime.InferenceSession(path).run(None, {'image': pixels[None]})\n"
        "by_hand = placement.restore(*description.decoding.decode(outputs))\n"
        "print(len(found), np.abs(found.boxes - by_hand.boxes).max() < 1e-3, 'torch' in sys.modules)\n"
    )
    count, is_same, has_torch = run_without(["torch", "detectron2", "onnx"], code, path, tmp_path / "image.npy").split()
    assert int(count) > 0 and (is_same, has_torch) == ("True", "False")


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Arguments that name a one-stage student, and a data set whose ground truth is what it finds."""
    folder = tmp_path_factory.mktemp("student")
    with registered_coco(folder, count=3, name="tiny_raw") as dataset:
        options = (*ONE_STAGE_FPN["RetinaNet"], "MODEL.RETINANET.PRIOR_PROB", 0.5, "INPUT.MIN_SIZE_TEST", 64)
        data = ("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,))
        detector = write_teacher(folder, "MODEL.META_ARCHITECTURE", "QuantRetinaNet", *options, *data)
        torch.save({"model": spread(detector.model).state_dict()}, detector.weights)
        make_true(detector, dataset)
        yield "--config-file", detector.config_file, "--weights", detector.weights


def test_the_command(student, tmp_path, capsys):
    int8 = ("--calibration-images", 2, "--search-images", 0, "--tolerance", 100)
    arguments = (*student, "--fixed-size", "64x96", "--verify", "tiny_raw", "--runs", 2, *int8)
    out = tmp_path / "out"
    assert status_of("export", *arguments, "--format", "onnx-raw", "onnx-raw-int8", "onnx", "--output", out) == 0
    printed = capsys.readouterr().out
    assert "onnx-raw: AP" in printed and "onnx-raw-int8: AP" in printed and "float32 (1, 3, height, width)" in printed
    assert "model_raw.json, decode.c, decode.mjs" in printed
    raw = {"model_raw.onnx", "model_raw_int8.onnx", "model_raw.json", "decode.c", "decode.mjs"}
    assert set(os.listdir(out)) == {*raw, "model.onnx", "labels.json", "verification.json"}
    exact = json.loads((out / "verification.json").read_text())[1]
    assert exact["name"].startswith("onnx-raw,") and exact["difference"]["boxes"] < 0.01
    assert exact["difference"]["matched"] > 0 and exact["difference"]["unmatched"] == 0
    described = ModelDescription.from_json((out / "model_raw.json").read_text())
    assert described.decoding and not ModelDescription.from_json((out / "labels.json").read_text()).decoding
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(out / "model_raw_int8.onnx"))).graph
    assert_static(graph, WITH_INT8)
    assert len([each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8]) > 20
    onnx_files = [str(out / name) for name in ("model_raw.onnx", "model.onnx")]
    assert_close(*(OnnxDetector(each)(random_image(60, 70)) for each in onnx_files))
    (photo,) = write_images(tmp_path / "in", 1)
    assert status_of("predict", "--model", onnx_files[0], "--input", photo, "--output", tmp_path / "drawn") == 0
    assert "predictions.json" in os.listdir(tmp_path / "drawn")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give --fixed-size HxW, such as 64x64"),
        (("--fixed-size", "60x96"), "--fixed-size is 60x96, and the backbone pads it to 64x96; give this"),
    ],
)
def test_sizes_that_are_refused(student, tmp_path, capsys, arguments, message):
    forms = ("--format", "onnx", "onnx-raw", "--output", tmp_path / "out")
    assert status_of("export", *student, *forms, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert os.listdir(tmp_path / "out") == []


def test_a_side_below_the_stride():
    cfg, model = one_stage("FCOS", has_fpn=False)
    with pytest.raises(ValueError, match="--fixed-size is 4x96; the backbone has a stride of 8 pixels"):
        describe_raw(model, describe_model(cfg, model, CLASSES, fixed_size=(4, 96)))


def test_a_two_stage_detector_is_refused():
    cfg, model = spread_model()
    with pytest.raises(ValueError, match="META_ARCHITECTURE is 'QuantRCNN'; onnx-raw .*: use onnx"):
        raw_description(cfg, model)


def test_an_inference_of_ones_own_is_refused():
    cfg, model = one_stage("RetinaNet")

    class SoftNMS(type(model)):
        def inference_single_image(self, *arguments):
            raise NotImplementedError

    model.__class__ = SoftNMS
    with pytest.raises(ValueError, match="META_ARCHITECTURE is 'SoftNMS'.*that inherit their inference"):
        raw_description(cfg, model)


def test_other_anchors_boxes_and_heads_are_refused():
    cfg, model = one_stage("RetinaNet")
    generator, transform, classes = model.anchor_generator, model.box2box_transform, model.num_classes
    model.anchor_generator = RotatedAnchorGenerator(
        sizes=[[8]], aspect_ratios=[[1.0]], strides=[8], angles=[[0.0]], offset=0.0
    )
    with pytest.raises(ValueError, match="the anchors are those of a RotatedAnchorGenerator"):
        raw_description(cfg, model)
    model.anchor_generator, model.box2box_transform = generator, object()
    with pytest.raises(ValueError, match="boxes are coded by object"):
        raw_description(cfg, model)
    model.box2box_transform, model.num_classes = transform, classes + 1
    with pytest.raises(ValueError, match="the head gives maps of shapes"):
        raw_description(cfg, model)


def test_an_operator_that_not_every_runtime_has(tmp_path):
    cfg, model = one_stage("FCOS")
    model.backbone.register_forward_hook(lambda module, inputs, output: {k: v.erf() for k, v in output.items()})
    with pytest.raises(ValueError, match="QuantFCOS has the operators Erf, which not every runtime takes; use onnx"):
        written(tmp_path, cfg, model)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("raw"), *one_stage("FCOS"))


def with_description(file, folder, content):
    model = onnx.load(file[0])
    for each in model.metadata_props:
        if each.key == METADATA_KEY:
            each.value = json.dumps(content)
    path = str(folder / "changed.onnx")
    onnx.save(model, path)
    return path


LEVEL = ("levels", 0)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("levels",), [], "it decodes 0 levels"),
        (("levels",), None, "levels is a NoneType"),
        (("levels", 0), 3, "a level is a int"),
        (("box_coding",), "polar", "'polar'"),
        (("top_k",), 0, "'top_k': 0"),
        (("num_classes",), 10**9, "gives 'logits_p3' of shape"),
        (("nms_threshold",), float("nan"), "not from 0 to 1"),
        (("delta_weights",), [1.0], "delta_weights is not 4 finite numbers"),
        (("largest_log_scale",), float("inf"), "not 1 finite numbers"),
        ((*LEVEL, "name"), "p9", "an exported detector has"),
        ((*LEVEL, "stride"), -8, "'stride': -8"),
        ((*LEVEL, "height"), 9, "gives 'logits_p3' of shape"),
        ((*LEVEL, "anchors"), [], "0 anchors"),
        ((*LEVEL, "anchors", 0), ["a", 0, 0, 0], "an anchor is a str"),
    ],
)
def test_files_that_say_what_cannot_be(file, tmp_path, place, value, message):
    content = json.loads(file[1].to_json())
    node = content["decoding"]
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    path = with_description(file, tmp_path, content)
    with pytest.raises(ValueError) as raised:
        OnnxDetector(path)
    assert message in str(raised.value) and path in str(raised.value) and "\n" not in str(raised.value)


def test_a_raw_file_without_its_decoding(file, tmp_path):
    content = file[1].to_dict()
    del content["decoding"]
    with pytest.raises(ValueError, match="has the inputs .* an exported detector has"):
        OnnxDetector(with_description(file, tmp_path, content))


def test_a_diverged_network(tmp_path):
    cfg, model = one_stage("RetinaNet")
    model.head.bbox_pred.bias.data.fill_(float("nan"))
    path, _ = written(tmp_path, cfg, model)
    with pytest.raises(ValueError, match="model_raw.onnx.*outputs are NaN or infinite"):
        OnnxDetector(path)(random_image(*SIZE))


def test_without_onnxruntime(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    assert status_of("export", *student, "--format", "onnx-raw", "--output", tmp_path / "out") == 2
    assert "qmimic_d2[export]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_above_the_threshold(tmp_path):
    path, _ = written(tmp_path, *one_stage("RetinaNet", "MODEL.RETINANET.SCORE_THRESH_TEST", 1.0))
    found = OnnxDetector(path)(random_image(30, 40))
    assert isinstance(found, Detections) and found.boxes.shape == (0, 4)
