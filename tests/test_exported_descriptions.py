"""Exported files that are damaged, of others, or say what cannot be: one line that names the file."""

import json
import multiprocessing
import pickle

import numpy as np
import onnx
import pytest
import torch
from exported import assert_close, random_image, spread_model, write_forms
from helpers import ONE_STAGE
from test_command_line import status_of
from tiny_coco import write_images

from qmimic_d2.export import ModelDescription, OnnxDetector, TorchScriptDetector, describe_model, export_onnx
from qmimic_d2.export.description import METADATA_KEY
from qmimic_d2.export.finite import watch_outputs
from qmimic_d2.export.onnx.file import prune_opsets
from qmimic_d2.export.preprocessing import InputSpec, Placement
from qmimic_d2.inference.detectors import open_detector
from qmimic_d2.inference.prediction import Predictor

pytestmark = pytest.mark.export

SPEC = InputSpec("BGR", 64, 128, pixel_mean=(1.0, 2.0, 3.0))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return write_forms(tmp_path_factory.mktemp("forms"), "MODEL.QMIMIC.QUANTIZER.NAME", "Clamp")


def description():
    return ModelDescription(((3, "cat"), (9, "dog")), SPEC, 0.05, "", {"weights": "w.pth"}).to_dict()


def changed(path, value):
    """The description with another value at a path of keys; DELETE takes it out."""
    content = description()
    *parents, last = path
    node = content
    for key in parents:
        node = node[key]
    if value is DELETE:
        del node[last]
    else:
        node[last] = value
    return content


DELETE = object()
PREPROCESSING = ("preprocessing",)
WRONG = [
    (("version",), "1"),
    (("version",), True),
    (("version",), 2),
    (("version",), DELETE),
    (("classes",), []),
    (("classes",), None),
    (("classes",), {"id": 1}),
    (("classes",), [1, 2]),
    (("classes", 0), "cat"),
    (("classes", 0, "id"), "3"),
    (("classes", 0, "id"), 3.5),
    (("classes", 0, "id"), 9),
    (("classes", 0, "id"), DELETE),
    (("classes", 0, "name"), None),
    (("classes", 0, "name"), ["cat"]),
    (("score_threshold",), "0.05"),
    (("score_threshold",), float("nan")),
    (("score_threshold",), float("inf")),
    (("score_threshold",), -0.1),
    (("score_threshold",), 10**400),
    (("quantizer",), 3),
    (("source",), "here"),
    (("source", "weights"), 5),
    (("class_names_known",), "yes"),
    (PREPROCESSING, []),
    (PREPROCESSING, DELETE),
    ((*PREPROCESSING, "format"), "GRAY"),
    ((*PREPROCESSING, "format"), 5),
    ((*PREPROCESSING, "min_size"), -1),
    ((*PREPROCESSING, "min_size"), 1e3),
    ((*PREPROCESSING, "min_size"), 10**12),
    ((*PREPROCESSING, "max_size"), 0),
    ((*PREPROCESSING, "max_size"), DELETE),
    ((*PREPROCESSING, "fixed_height"), 64),
    ((*PREPROCESSING, "fixed_width"), -64),
    ((*PREPROCESSING, "least"), 10**9),
    ((*PREPROCESSING, "least"), None),
    ((*PREPROCESSING, "pixel_mean"), [1.0, 2.0]),
    ((*PREPROCESSING, "pixel_mean"), [1.0, 2.0, "3"]),
    ((*PREPROCESSING, "pixel_mean"), [1.0, 2.0, 10**400]),
    ((*PREPROCESSING, "pixel_std"), 1.0),
    ((*PREPROCESSING, "pixel_std"), [[1.0], 1.0, 1.0]),
]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize("path, value", WRONG)
def test_a_description_with_a_wrong_value(path, value):
    with pytest.raises(ValueError, match="no description of version 1") as error:
        ModelDescription.from_json(json.dumps(changed(path, value)))
    one_line(error)


@pytest.mark.parametrize(
    "text", ["[" * 100000, '{"a":' * 100000, "1e309", '"text"', "null", '{"version": 1e309}', "\ud800", "1" * 10000]
)
def test_text_that_is_no_description(text):
    with pytest.raises(ValueError, match="no description of version 1") as error:
        ModelDescription.from_json(text)
    one_line(error)


def test_the_wrong_value_is_named():
    with pytest.raises(ValueError, match="min_size.*-1.*0 to 65536"):
        ModelDescription.from_json(json.dumps(changed((*PREPROCESSING, "min_size"), -1)))
    with pytest.raises(ValueError, match="KeyError.*max_size"):
        ModelDescription.from_json(json.dumps(changed((*PREPROCESSING, "max_size"), DELETE)))
    with pytest.raises(ValueError, match="score_threshold is a str, not a float"):
        ModelDescription.from_json(json.dumps(changed(("score_threshold",), "high")))


# ---------------------------------------------------------------------------------- inside files


def with_metadata(source, target, value):
    model = onnx.load(source)
    entry = next(each for each in model.metadata_props if each.key == METADATA_KEY)
    entry.value = value
    onnx.save(model, str(target))
    return str(target)


@pytest.mark.parametrize("path, value", WRONG[::7])
def test_an_onnx_file_that_says_what_cannot_be(forms, tmp_path, capsys, path, value):
    file = with_metadata(forms.files["onnx"], tmp_path / "wrong.onnx", json.dumps(changed(path, value)))
    with pytest.raises(ValueError, match="wrong.onnx.*no description") as error:
        OnnxDetector(file)
    one_line(error)
    image, = write_images(tmp_path, 1)
    assert status_of("predict", "--model", file, "--input", image, "--output", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "wrong.onnx" in err and not (tmp_path / "out").exists()


def test_fewer_names_than_the_network_has_classes(forms, tmp_path, capsys):
    content = json.loads(OnnxDetector(forms.files["onnx"]).description.to_json())
    content["classes"] = content["classes"][:1]
    file = with_metadata(forms.files["onnx"], tmp_path / "wrong.onnx", json.dumps(content))
    image, = write_images(tmp_path, 1)
    assert status_of("predict", "--model", file, "--input", image, "--output", tmp_path / "out") == 2
    assert "names 1 classes; export it again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_of_another_export(forms, tmp_path, capsys):
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("config.yaml", "model.pth", "labels.json"):
        (folder / name).write_bytes((forms.folder / "out" / name).read_bytes())
    labels = json.loads((folder / "labels.json").read_text())
    labels.update(classes=[{"id": each, "name": f"name {each}"} for each in (5, 6, 7)], class_names_known=True)
    (folder / "labels.json").write_text(json.dumps(labels))
    opened = open_detector(str(folder / "config.yaml"))
    assert [(each.id, each.name) for each in opened.categories] == [(5, "name 5"), (6, "name 6"), (7, "name 7")]
    assert opened.note == ""
    labels["classes"].pop()
    (folder / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match="has 2 classes, and MODEL.ROI_HEADS.NUM_CLASSES is 3"):
        open_detector(str(folder / "config.yaml"))
    for damaged in ("", "{", "\x00"):
        (folder / "labels.json").write_text(damaged)
        with pytest.raises(ValueError, match="labels.json' holds no description"):
            open_detector(str(folder / "config.yaml"))
    (folder / "labels.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="labels.json"):
        open_detector(str(folder / "config.yaml"))


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_damaged_files(forms, tmp_path, form):
    """Cut short, with bytes changed: the file is refused in one line, or it runs."""
    data = open(forms.files[form], "rb").read()
    generator = np.random.default_rng(0)
    path = tmp_path / f"damaged.{'ts' if form == 'torchscript' else form}"
    refused = 0
    for trial in range(24):
        damaged = bytearray(data)
        if trial % 2:
            damaged = damaged[: int(generator.integers(0, len(data)))]
        else:
            for place in generator.integers(0, len(data), 64):
                damaged[place] = generator.integers(0, 256)
        path.write_bytes(bytes(damaged))
        try:
            open_detector(str(path))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and "damaged" in str(error) or "NaN or infinite" in str(error)
    assert refused >= 12, "what is cut short is refused"


def test_networks_with_other_inputs_and_outputs(forms, tmp_path):
    text = OnnxDetector(forms.files["onnx"]).description.to_json()
    node = onnx.helper.make_node("Relu", ["image"], ["boxes"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("image", "boxes")]
    graph = onnx.helper.make_graph([node], "graph", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 16)], ir_version=8)
    model.metadata_props.add(key=METADATA_KEY, value=text)
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="other.onnx.*has the inputs.*outputs") as error:
        OnnxDetector(str(tmp_path / "other.onnx"))
    one_line(error)
    for index, outputs in enumerate((lambda x: x, lambda x: (x, x), lambda x: (x, x[0], x[0]))):
        path = str(tmp_path / f"other_{index}.ts")
        traced = torch.jit.trace(outputs, torch.zeros(3, 64, 64))
        torch.jit.save(traced, path, _extra_files={METADATA_KEY: text})
        with pytest.raises(ValueError, match=r"other_\d.ts.*gives outputs of shapes") as error:
            open_detector(path)
        one_line(error)


def test_a_network_that_fails_names_its_file(forms, tmp_path):
    text = OnnxDetector(forms.files["onnx"]).description.to_json()

    def fail(x):
        return x.reshape(7, 7), x, x

    path = str(tmp_path / "failing.ts")
    torch.jit.save(torch.jit.trace(fail, torch.zeros(1, 7, 7)), path, _extra_files={METADATA_KEY: text})
    with pytest.raises(ValueError, match="failing.ts' cannot run: RuntimeError") as error:
        open_detector(path)
    one_line(error)


# ------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_detectors_go_to_other_processes(forms, form, monkeypatch, tmp_path):
    kind = {"onnx": OnnxDetector, "torchscript": TorchScriptDetector}[form]
    monkeypatch.chdir(forms.folder)
    detector = kind(f"out/model.{'ts' if form == 'torchscript' else form}")
    monkeypatch.chdir(tmp_path)  # the path it was opened with leads nowhere now
    image = random_image(64, 64)
    again = pickle.loads(pickle.dumps(detector))
    assert_close(again(image), detector(image))
    assert again.description == detector.description


def test_a_pool_of_processes(forms):
    detector = OnnxDetector(forms.files["onnx"], threads=1)
    images = [random_image(64, 64, seed) for seed in range(2)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for found, image in zip(pool.map(detector, images), images):
            assert_close(found, detector(image))


# -------------------------------------------------------------------------------- operator sets


def test_operator_sets_that_no_node_uses_are_left_out(forms):
    assert [each.domain for each in onnx.load(forms.files["onnx"]).opset_import] == [""]
    model = onnx.load(forms.files["onnx"])
    for domain in ("ai.onnx.ml", "com.microsoft", "ai.onnx.training"):
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    inner = onnx.helper.make_node("Inner", [], [], domain="org.inner")
    branch = onnx.helper.make_graph([inner], "branch", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], [], then_branch=branch, else_branch=branch))
    model.opset_import.append(onnx.helper.make_opsetid("org.inner", 1))
    prune_opsets(model)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 16), ("org.inner", 1)]


# ----------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite(number):
    place = Placement(64, 64, 64, 64)
    boxes, scores, classes = np.ones((1, 4)), np.ones(1), np.zeros(1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        place.restore(boxes * number, scores, classes)
    with pytest.raises(ValueError, match="NaN or infinite"):
        place.restore(boxes, scores * number, classes)


@pytest.mark.parametrize("meta_architecture", ["QuantRCNN", "QuantRetinaNet", "QuantFCOS"])
@pytest.mark.parametrize("part", ["backbone", "head"])
def test_a_detector_that_diverged_is_no_detector_that_finds_nothing(tmp_path, meta_architecture, part):
    """Detectron2 drops what is not finite; every form says so instead."""
    cfg, model = spread_model(*ONE_STAGE["RetinaNet"], *ONE_STAGE["FCOS"], meta_architecture=meta_architecture)
    Predictor.of_model(cfg, model).detect(random_image(64, 64))
    names = {"head": "roi_heads" if meta_architecture == "QuantRCNN" else "head", "backbone": "backbone"}
    weights = [each for name, each in model.named_parameters() if name.startswith(names[part])]
    weights[-1].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Predictor.of_model(cfg, model).detect(random_image(64, 64))
    classes = [(index, str(index)) for index in range(3)]
    export_onnx(model, describe_model(cfg, model, classes), str(tmp_path / "model.onnx"))
    with pytest.raises(ValueError, match="model.onnx.*NaN or infinite"):
        OnnxDetector(str(tmp_path / "model.onnx"))(random_image(64, 64))


def test_hooks_are_gone_afterwards():
    _, model = spread_model()
    with pytest.raises(RuntimeError), watch_outputs(model):
        raise RuntimeError
    assert not any(each._forward_hooks for name, each in model.named_modules() if name != "backbone")


def test_the_score_threshold_is_the_familys(tmp_path):
    """As the network has it, whatever the other families' keys say."""
    for meta_architecture, node in (("QuantRCNN", "ROI_HEADS"), ("QuantRetinaNet", "RETINANET"), ("QuantFCOS", "FCOS")):
        key = f"MODEL.{node}.SCORE_THRESH_TEST"
        options = (*ONE_STAGE["RetinaNet"], *ONE_STAGE["FCOS"], key, 0.37)
        cfg, model = spread_model(*options, meta_architecture=meta_architecture)
        described = describe_model(cfg, model, [(0, "a")])
        owner = model.roi_heads.box_predictor if node == "ROI_HEADS" else model
        assert described.score_threshold == owner.test_score_thresh == 0.37
        assert ModelDescription.from_json(described.to_json()).score_threshold_key == key
