"""What of an ONNX detector can run in int8: its layers with weights, and the codes of its quantizer."""

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

__all__ = ["Layer", "code_tensors", "quantizable_layers"]

_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# They follow a layer, and its codes pass through them.
_FOLLOWERS = ("Relu", "MaxPool", "Add")
# What a quantizer consists of behind its Ceil.
_QUANTIZER_OPS = ("Clip", "Max", "Min", "Where", "Neg", "Expand", "Cast", "Identity")


@dataclass(frozen=True)
class Layer:
    """
    Attributes:
        name: of the module with the weights.
        nodes: names of its nodes (several, where it runs several times) and of what follows them in int8.
    """

    name: str
    nodes: Tuple[str, ...]


def quantizable_layers(graph) -> List[Layer]:
    """
    The layers of a graph with constant weights, in its order.

    Args:
        graph: ``onnx.GraphProto`` whose nodes have names.
    """
    weights = _constants(graph)
    layer_of_output: Dict[str, str] = {}
    members: Dict[str, List[str]] = {}
    for node in graph.node:
        if node.op_type in _WITH_WEIGHTS and node.input[1] in weights:
            owner = _short(node.name)
            members.setdefault(owner, []).append(node.name)
            layer_of_output[node.output[0]] = owner
        elif node.op_type in _FOLLOWERS and all(each in layer_of_output for each in node.input):
            owner = layer_of_output[node.input[0]]
            members[owner].append(node.name)
            layer_of_output[node.output[0]] = owner
    return [Layer(name, tuple(nodes)) for name, nodes in members.items()]


def code_tensors(graph, stride: float) -> List[str]:
    """
    Names of the tensors that hold codes of a uniform quantizer: multiples of its stride.

    They are recognized by the graph of :class:`qmimic_d2.modeling.UniformQuantizer`: a Ceil, at last times
    the stride.
    """
    constants = _constants(graph)
    producers = {output: node for node in graph.node for output in node.output}
    if stride == 1.0:  # optimizers leave out a factor of 1
        inner = {each for node in graph.node if node.op_type in _QUANTIZER_OPS for each in node.input}
        ends = [node.output[0] for node in graph.node if node.op_type in (*_QUANTIZER_OPS, "Ceil", "Mul")]
        return [each for each in ends if each not in inner and _comes_from_ceil(each, producers, constants, 1.0)]
    return [
        node.output[0]
        for node in graph.node
        if node.op_type == "Mul" and _comes_from_ceil(node.output[0], producers, constants, stride)
    ]


def _comes_from_ceil(name: str, producers: Dict[str, Any], constants: Dict[str, np.ndarray], stride: float) -> bool:
    """Whether nothing but the rest of a quantizer stands between a Ceil and a tensor."""
    waiting, seen = [name], set()
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        if node.op_type == "Ceil":
            return True
        seen.add(node.output[0])
        factors = [constants[each] for each in node.input if each in constants]
        is_scale = node.op_type == "Mul" and any(each.size == 1 and each == np.float32(stride) for each in factors)
        if node.op_type in _QUANTIZER_OPS or is_scale:
            waiting.extend(node.input)
    return False


def _constants(graph) -> Dict[str, np.ndarray]:
    return dict(_constant_items(graph))


def _constant_items(graph) -> Iterator[Tuple[str, np.ndarray]]:
    from onnx import numpy_helper

    for each in graph.initializer:
        yield each.name, numpy_helper.to_array(each)
    for node in graph.node:
        value = _constant_value(node)
        if value is not None:
            yield node.output[0], value


def _constant_value(node) -> Optional[np.ndarray]:
    from onnx import numpy_helper

    values = [each for each in node.attribute if node.op_type == "Constant" and each.name == "value"]
    return numpy_helper.to_array(values[0].t) if values else None


def _short(name: str) -> str:
    """ "/model/backbone/conv1/conv1_1/Conv" as "backbone/conv1/conv1_1"."""
    parts = [part for part in name.split("/") if part]
    if parts[:1] == ["model"]:
        parts = parts[1:]
    return "/".join(parts[:-1] or parts)
