"""A detector as an ONNX file of standard operators."""

import contextlib
import inspect
import logging
import warnings
from typing import Iterator

import torch
from torch import nn

from qmimic_d2.export.description import METADATA_KEY, ModelDescription
from qmimic_d2.export.network import OUTPUT_NAMES, example_image, traceable
from qmimic_d2.export.onnx.symbolics import OPSET, project_symbolics
from qmimic_d2.export.raw.network import RawNetwork
from qmimic_d2.export.raw.portable import make_portable
from qmimic_d2.files import whole_file

__all__ = ["check_onnx", "export_onnx", "import_onnx", "prune_opsets"]

logger = logging.getLogger(__name__)

_STANDARD_DOMAINS = ("", "ai.onnx")


def import_onnx():
    """
    The ``onnx`` package.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "writing ONNX takes the onnx package, which is not installed: pip install 'qmimic_d2[export]', or onnx "
            "and onnxruntime"
        ) from error
    return onnx


def export_onnx(model: nn.Module, description: ModelDescription, path: str) -> None:
    """
    Writes a detector as ONNX. The file appears under its name when it is complete and checked.

    Its input ``image`` is the network's input, shape (3, h, w), float32, of any size (of the fixed size, if
    ``description`` has one); its outputs are ``boxes`` (N, 4) in pixels of it, ``scores`` (N,) and
    ``classes`` (N,). Normalization, proposals, RoI pooling and non-maximum suppression are inside.

    With ``description.decoding`` it is the raw network: its input has the shape (1, 3, h, w), its outputs are those of
    ``decoding.output_shapes``, and only normalization is inside.

    Args:
        model: in evaluation mode, with its quantizer kept or dropped.
        description: stored in the file's metadata_props.
        path: of the ``.onnx`` file, in a folder that exists.

    Raises:
        ImportError: onnx is not installed.
        ValueError: the model is of a kind that cannot be exported, or has an operator without a standard
            ONNX form, or the raw network one that not every runtime has.
    """
    onnx = import_onnx()
    is_raw = description.decoding is not None
    image = description.as_input(example_image(description.input_spec))
    names = list(description.decoding.output_shapes if is_raw else OUTPUT_NAMES)
    network = RawNetwork(model) if is_raw else traceable(model, image)
    options = {"opset_version": OPSET, "input_names": ["image"], "output_names": names}
    if not is_raw:
        options["dynamic_axes"] = {name: {0: "detections"} for name in OUTPUT_NAMES}
        if not description.input_spec.is_fixed:
            options["dynamic_axes"]["image"] = {1: "height", 2: "width"}
    # The newer exporter (dynamo) specializes the sizes that depend on the picture's content.
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    with whole_file(path) as partial:
        with project_symbolics(), _quiet(), torch.no_grad():
            try:
                torch.onnx.export(network, (image,), partial, **options)
            except torch.onnx.errors.UnsupportedOperatorError as error:
                raise ValueError(
                    f"{type(model).__name__} has an operator without a standard ONNX form ({error}); export it as "
                    "torchscript"
                ) from error
        if is_raw:
            make_portable(partial, type(model).__name__)
        graph = onnx.load(partial)
        describe_onnx(graph, description)
        prune_opsets(graph)
        check_onnx(graph)
        onnx.save(graph, partial)
    logger.info("Wrote %s", path)


def describe_onnx(graph, description: ModelDescription) -> None:
    """Puts a description into a model's metadata_props, as JSON and key by key for other readers."""
    spec = description.input_spec
    del graph.metadata_props[:]
    entries = {
        METADATA_KEY: description.to_json(),
        "names": ", ".join(description.names),
        "channel_order": spec.format,
        "pixel_mean": str(list(spec.pixel_mean)),
        "pixel_std": str(list(spec.pixel_std)),
        "normalization": "inside the network",
        "resize": description.to_dict()["preprocessing"]["resize"],
    }
    for key, value in entries.items():
        graph.metadata_props.add(key=key, value=value)
    graph.producer_name = "qmimic_d2"


def prune_opsets(graph) -> None:
    """
    Takes out the operator sets that no node of a model uses, which an older runtime would refuse the file for.

    Exporters and onnxruntime's quantization name those that they might have used. ONNX's own stays in any case.
    """
    nodes = [*nodes_of(graph.graph), *(node for function in graph.functions for node in function.node)]
    used = {"", *("" if node.domain == "ai.onnx" else node.domain for node in nodes)}
    kept = [each for each in graph.opset_import if ("" if each.domain == "ai.onnx" else each.domain) in used]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)


def check_onnx(graph) -> None:
    """
    Runs ``onnx.checker`` and looks for operators that are not ONNX's own, in sub-graphs too.

    Raises:
        ValueError: there are such operators.
    """
    onnx = import_onnx()
    onnx.checker.check_model(graph, full_check=True)
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes_of(graph.graph) if not _is_standard(node)})
    if foreign:
        raise ValueError(f"the ONNX model has operators beyond the standard: {', '.join(foreign)}")


def nodes_of(graph) -> Iterator:
    """Every node of an ONNX graph, those of the branches of its ``If`` and ``Loop`` nodes included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for branch in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from nodes_of(branch)


def _is_standard(node) -> bool:
    return node.domain in _STANDARD_DOMAINS


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecation and of every shape that depends on the image."""
    names = ("torch.onnx", "torch.onnx._internal.torchscript_exporter")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
