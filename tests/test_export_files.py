"""TorchScript and ONNX files: what they detect, on what images, and what they need."""

import json
import logging
import os
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.modeling import build_model
from exported import assert_close, random_image, run_without, spread_model, write_forms
from helpers import RESNET_C4, RESNET_FPN, tiny_cfg
from PIL import Image
from torchvision.ops import ps_roi_align, ps_roi_pool

from qmimic_d2.export import (
    OnnxDetector,
    TorchScriptDetector,
    describe_model,
    export_onnx,
    export_torchscript,
)
from qmimic_d2.export.onnx.file import check_onnx, nodes_of
from qmimic_d2.export.onnx.symbolics import OPSET, project_symbolics
from qmimic_d2.image_file import read_bgr_image
from qmimic_d2.inference.detectors import open_detector
from qmimic_d2.inference.prediction import Predictor

pytestmark = pytest.mark.export

CLASSES = [(3, "a"), (5, "b"), (9, "c")]
QUANTIZER = "MODEL.QMIMIC.QUANTIZER"
MIMIC = "MODEL.QMIMIC.MIMIC"
RETINANET = (
    *RESNET_FPN,
    *("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5"]),
    *("MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.RETINANET.NUM_CONVS", 1),
    *("MODEL.RETINANET.PRIOR_PROB", 0.3),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]]),
)
FCOS = (
    *("MODEL.FCOS.IN_FEATURES", ["p3", "p4", "p5"]),
    *("MODEL.FCOS.NUM_CLASSES", 3),
    *("MODEL.FCOS.NUM_CONVS", 1),
    *("MODEL.FCOS.PRIOR_PROB", 0.3),
)
TEN_SIZES = [(64, 64), (50, 33), (33, 50), (100, 300), (300, 100), (7, 9), (1, 200), (300, 1), (640, 480), (1, 1)]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    # no rounding: rounded features of an image of one colour tie, and what is first among equals is open
    return write_forms(tmp_path_factory.mktemp("forms"), f"{QUANTIZER}.NAME", "Clamp")


def exported(folder, cfg, model, **options):
    description = describe_model(cfg, model, CLASSES, **options)
    onnx_file, script_file = str(folder / "model.onnx"), str(folder / "model.ts")
    export_onnx(model, description, onnx_file)
    export_torchscript(model, description, script_file)
    return OnnxDetector(onnx_file, threads=1), TorchScriptDetector(script_file), description


# ------------------------------------------------------------------------------- detectors


@pytest.mark.parametrize(
    "options",
    [
        (),
        RESNET_C4,
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
        (f"{QUANTIZER}.NAME", ""),
        (f"{QUANTIZER}.NAME", "PowerOfTwo"),
        (f"{QUANTIZER}.NAME", "PowerOfTwo", f"{QUANTIZER}.SIGNED", True),
        (f"{QUANTIZER}.SIGNED", True, f"{QUANTIZER}.NUM_CODES", 8),
        (f"{MIMIC}.ADAPTER_PLACEMENT", "trunk", f"{MIMIC}.ADAPTER", "conv1x1_relu", f"{MIMIC}.TRUNK_CHANNELS", [24]),
    ],
)
def test_files_detect_what_the_model_detects(tmp_path, options):
    cfg, model = spread_model(*options)
    predictor = Predictor.of_model(cfg, model)
    for detector in exported(tmp_path, cfg, model)[:2]:
        for size in ((64, 96), (50, 33), (100, 300)):
            image = random_image(*size)
            assert_close(detector(image), predictor.detect(image))


def test_a_fixed_size(tmp_path):
    cfg, model = spread_model(*RESNET_FPN)
    *detectors, description = exported(tmp_path, cfg, model, fixed_size=(64, 96))
    predictor = Predictor.of_model(cfg, model, description.input_spec)
    for detector in detectors:
        for size in ((64, 96), (50, 33), (100, 300)):
            image = random_image(*size)
            assert_close(detector(image), predictor.detect(image))
    (network_input,) = onnx.load(str(tmp_path / "model.onnx")).graph.input
    assert [each.dim_value for each in network_input.type.tensor_type.shape.dim] == [3, 64, 96]


def test_a_picture_without_detections(tmp_path):
    cfg, model = spread_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    for detector in exported(tmp_path, cfg, model)[:2]:
        found = detector(random_image(64, 64))
        assert len(found) == 0 and found.boxes.shape == (0, 4)


def test_other_meta_architectures_are_refused(tmp_path):
    cfg, model = spread_model()
    proposals = torch.nn.Module()
    proposals.backbone = model.backbone
    with pytest.raises(ValueError, match="META_ARCHITECTURE is 'Module'"):
        export_torchscript(proposals, describe_model(cfg, model, CLASSES), str(tmp_path / "model.ts"))


# ---------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", TEN_SIZES)
def test_ten_sizes_through_every_form(forms, size):
    image = random_image(*size)
    first, *others = [open_detector(path, threads=1).detect(image) for path in forms.files.values()]
    assert (first.boxes[:, 2] <= size[1]).all() and (first.boxes[:, 3] <= size[0]).all() and (first.boxes >= 0).all()
    for other in others:
        assert_close(first, other)


@pytest.mark.parametrize("kind", ["grey", "alpha", "grey and alpha", "16 bits", "palette"])
def test_kinds_of_images_through_every_form(forms, tmp_path, kind):
    path = str(tmp_path / "image.png")
    noise = random_image(60, 50)
    picture = {
        "grey": lambda: Image.fromarray(noise[:, :, 0]),
        "alpha": lambda: Image.fromarray(np.dstack([noise, noise[:, :, 0]]), "RGBA"),
        "grey and alpha": lambda: Image.fromarray(np.ascontiguousarray(noise[:, :, :2]), "LA"),
        "16 bits": lambda: Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257),
        "palette": lambda: Image.fromarray(noise).convert("P"),
    }[kind]()
    picture.save(path)
    image = read_bgr_image(path)
    first, *others = [open_detector(file, threads=1).detect(image) for file in forms.files.values()]
    for other in others:
        assert_close(first, other)
    if kind == "16 bits":
        assert_close(OnnxDetector(forms.files["onnx"])(np.asarray(Image.open(path)).astype(np.uint16)), first)


# ------------------------------------------------------------------------------- the files


def test_the_onnx_file_is_standard_and_describes_itself(forms):
    model = onnx.load(forms.files["onnx"])
    check_onnx(model)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", OPSET)]
    operators = {node.op_type for node in nodes_of(model.graph)}
    assert {"RoiAlign", "NonMaxSuppression", "Conv"} <= operators
    metadata = {each.key: each.value for each in model.metadata_props}
    assert metadata["channel_order"] == "BGR" and metadata["pixel_std"] == "[64.0, 64.0, 64.0]"
    assert "shorter side to 64 pixels" in metadata["resize"]
    labels = (forms.folder / "out" / "labels.json").read_text()
    assert labels == metadata["qmimic_d2.json"] + "\n"


def test_operators_beyond_the_standard_are_found():
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "graph", value[:1], value[1:])
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    with pytest.raises(ValueError, match="com.microsoft.Gelu"):
        check_onnx(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))


@pytest.mark.parametrize(
    "pool", [lambda *inputs: ps_roi_align(*inputs, 3, 0.25, 2), lambda *inputs: ps_roi_pool(*inputs, 3, 0.25)]
)
def test_position_sensitive_pooling_in_onnx(tmp_path, pool):
    class Pooling(torch.nn.Module):
        def forward(self, maps, rois):
            return pool(maps, rois)

    maps, path = torch.randn(1, 5 * 9, 20, 30), str(tmp_path / "pooling.onnx")
    boxes = [[4, 8, 60, 70], [0, 0, 119, 79], [50, 20, 53, 22], [10, 10, 10, 10], [90, 60, 130, 100], [-9, -6, 9, 10]]
    rois = torch.tensor([[0.0, *box] for box in boxes])
    with project_symbolics(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Pooling().eval(),
            (maps, rois),
            path,
            opset_version=OPSET,
            dynamo=False,
            input_names=["maps", "rois"],
            dynamic_axes={"maps": {2: "H", 3: "W"}, "rois": {0: "M"}},
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for some in (rois, rois[:1], rois[:0]):
        for each in (maps, maps[:, :, :17, :11]):
            (pooled,) = session.run(None, {"maps": each.numpy(), "rois": some.numpy()})
            np.testing.assert_allclose(pooled, Pooling()(each, some).numpy(), atol=1e-6)


def test_an_operator_without_an_onnx_form(tmp_path):
    cfg, model = spread_model()
    model.backbone.conv1.register_forward_hook(lambda module, inputs, output: torch.lgamma(output + 1.0))
    with pytest.raises(ValueError, match="(?s)lgamma.*export it as torchscript"):
        export_onnx(model, describe_model(cfg, model, CLASSES), str(tmp_path / "model.onnx"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("module", ["onnx.save", "torch.jit.save"])
def test_an_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch, module):
    cfg, model = spread_model()
    description = describe_model(cfg, model, CLASSES)
    export, name = (export_onnx, "model.onnx") if module == "onnx.save" else (export_torchscript, "model.ts")
    (tmp_path / name).write_text("old")

    def interrupted(content, path, *args, **kwargs):
        with open(path, "w") as file:
            file.write("ha")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(model, description, str(tmp_path / name))
    assert (tmp_path / name).read_text() == "old"
    assert os.listdir(tmp_path) == [name]


def test_export_restores_the_loggers(tmp_path):
    before = logging.getLogger("torch.onnx").level
    cfg, model = spread_model()
    exported(tmp_path, cfg, model)
    assert logging.getLogger("torch.onnx").level == before
    assert not model.training


def test_a_file_tells_no_folder_of_its_maker(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_cfg("MODEL.WEIGHTS", "/secret/model_final.pth", meta_architecture="GeneralizedRCNN")
    model = build_model(cfg)
    for given, shown in (
        (str(tmp_path / "runs" / "config.yaml"), os.path.join("runs", "config.yaml")),
        ("configs/student.yaml", "configs/student.yaml"),
        ("https://host/config.yaml", "https://host/config.yaml"),
    ):
        source = describe_model(cfg, model, CLASSES, config_file=given).source
        assert (source["config_file"], source["weights"]) == (shown, "model_final.pth")


# ------------------------------------------------------------------------------ elsewhere

DETECT = """
import numpy as np
from qmimic_d2.export import {name}
image = np.load(sys.argv[2])
found = {name}(sys.argv[1])(image)
np.savez(sys.argv[3], boxes=found.boxes, scores=found.scores, classes=found.classes)
print(sorted(each for each in {absent} if each in sys.modules))
"""


@pytest.mark.parametrize(
    "form, name, absent",
    [
        ("onnx", "OnnxDetector", ["torch", "torchvision", "detectron2", "fvcore", "matplotlib", "onnx"]),
        ("torchscript", "TorchScriptDetector", ["detectron2", "fvcore", "iopath", "pycocotools", "matplotlib"]),
    ],
)
def test_a_device_needs_little(forms, tmp_path, form, name, absent):
    image, results = random_image(64, 64), tmp_path / "found.npz"
    np.save(tmp_path / "image.npy", image)
    code = DETECT.format(name=name, absent=absent)
    arguments = [forms.files[form], tmp_path / "image.npy", results]
    assert run_without(absent, code, *arguments).strip() == "[]"
    expected = open_detector(forms.files["detectron2"]).detect(image)
    with np.load(results) as found:
        np.testing.assert_allclose(found["boxes"], expected.boxes, atol=1e-2)
        assert found["classes"].tolist() == expected.classes.tolist()


def test_predict_needs_no_torch(forms, tmp_path):
    absent = ["torch", "torchvision", "detectron2", "fvcore", "yacs", "yaml", "matplotlib", "onnx", "cv2"]
    image = random_image(64, 64)
    Image.fromarray(image[:, :, ::-1]).save(tmp_path / "photo.png")
    code = (
        "from qmimic_d2.__main__ import main\n"
        "model, image, folder = sys.argv[1:]\n"
        "print(main(['predict', '--model', model, '--input', image, '--output', folder, '--score-threshold', '0.2']))\n"
        "for arguments in (['size', 'x.yaml'], ['predict', '--config-file', 'x.yaml', '--input', image]):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as stopped:\n"
        "        print(stopped.code)\n"
    )
    folder = tmp_path / "drawn"
    output = run_without(absent, code, forms.files["onnx"], tmp_path / "photo.png", folder)
    assert [line for line in output.splitlines() if line.isdigit()] == ["0", "2", "2"]
    found = json.loads((folder / "predictions.json").read_text())["annotations"]
    expected = open_detector(forms.files["detectron2"]).detect(image).above(0.2)
    assert len(found) == len(expected) > 0
    assert (folder / "photo.jpg").is_file()


def test_a_traced_model_runs_without_any_of_this_package(forms, tmp_path):
    np.save(tmp_path / "pixels.npy", random_image(64, 64).transpose(2, 0, 1).astype(np.float32))
    code = (
        "import torch, torchvision, numpy as np\n"
        "boxes, scores, classes = torch.jit.load(sys.argv[1])(torch.from_numpy(np.load(sys.argv[2])))\n"
        "print(len(boxes), len(scores), len(classes))\n"
    )
    lengths = run_without(["detectron2", "qmimic_d2"], code, forms.files["torchscript"], tmp_path / "pixels.npy")
    count = len(open_detector(forms.files["detectron2"]).detect(random_image(64, 64)))
    assert lengths.split() == [str(count)] * 3


def test_without_detectron2_training_says_what_is_missing():
    code = (
        "import qmimic_d2\n"
        "print(qmimic_d2.__version__)\n"
        "try:\n"
        "    qmimic_d2.add_qmimic_config\n"
        "except ImportError as error:\n"
        "    print('Detectron2, which is not installed' in str(error))\n"
        "print(hasattr(qmimic_d2, 'unheard_of'))\n"
    )
    assert run_without(["detectron2"], code).split() == ["0.1.0", "True", "False"]


# ------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("detector, name", [(OnnxDetector, "model.onnx"), (TorchScriptDetector, "model.ts")])
def test_files_that_are_no_detectors(tmp_path, detector, name):
    with pytest.raises(FileNotFoundError, match="there is no"):
        detector(str(tmp_path / name))
    (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(ValueError, match="no (ONNX|TorchScript) file that"):
        detector(str(tmp_path / name))


def test_models_of_others(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "graph", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", OPSET)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(tmp_path / "model.onnx"))
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), str(tmp_path / "model.ts"))
    for detector, name in ((OnnxDetector, "model.onnx"), (TorchScriptDetector, "model.ts")):
        with pytest.raises(ValueError, match="not written by `python -m qmimic_d2 export`"):
            detector(str(tmp_path / name))


def test_without_onnxruntime(forms, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"qmimic_d2\[export\]"):
        OnnxDetector(forms.files["onnx"])
