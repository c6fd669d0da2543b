"""An ONNX graph for any runtime: few operators, static shapes, no control flow."""

from typing import List

__all__ = ["OPERATORS", "make_portable"]

# Operators of a raw network: of convolutional networks, of GroupNorm, and of a kept quantizer.
OPERATORS = (
    *("Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "GlobalAveragePool", "HardSigmoid"),
    *("HardSwish", "LeakyRelu", "MaxPool", "Mul", "PRelu", "Pad", "Relu", "Resize", "Sigmoid", "Sub", "Transpose"),
    *("InstanceNormalization", "Reshape"),
    *("Abs", "Ceil", "Floor", "Greater", "Less", "LessOrEqual", "Log", "Neg", "Pow", "Sign", "Where"),
)


def make_portable(path: str, name: str) -> None:
    """
    Folds what is constant at one size of input out of a file's graph, and writes the shape of every tensor into it.

    Args:
        path: of an ONNX file; it is written again.
        name: of the model's class, for the error message.

    Raises:
        ValueError: an operator is not in :data:`OPERATORS`, or a shape is not static.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = path
    options.log_severity_level = 4
    onnxruntime.InferenceSession(onnx.load(path).SerializeToString(), options, providers=["CPUExecutionProvider"])
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    foreign = sorted({node.op_type for node in model.graph.node} - {*OPERATORS, "Constant"})
    if foreign or _dynamic(model.graph):
        problem = f"the operators {', '.join(foreign)}" if foreign else f"no static shape of {_dynamic(model.graph)[0]}"
        raise ValueError(f"{name} has {problem}, which not every runtime takes; use onnx in place of onnx-raw")
    onnx.save(model, path)


def _dynamic(graph) -> List[str]:
    """Names of the tensors whose shape is not known."""
    known = {
        each.name
        for each in (*graph.input, *graph.output, *graph.value_info)
        if all(length.dim_value > 0 for length in each.type.tensor_type.shape.dim)
    }
    return [name for node in graph.node for name in node.output if name not in known]
