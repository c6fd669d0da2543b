"""
An ONNX detector in int8: onnxruntime's static quantization, and a search for the layers that do not bear it.

Weights are int8 with a scale per output channel, activations uint8, in QuantizeLinear/DequantizeLinear pairs.
Codes of the student's own quantizer get its stride as scale: they pass through int8 without any error.
"""

import contextlib
import inspect
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from qmimic_d2.export.onnx.file import check_onnx, import_onnx, prune_opsets
from qmimic_d2.export.onnx.layers import Layer, code_tensors, quantizable_layers
from qmimic_d2.files import whole_file
from qmimic_d2.progress import track

__all__ = ["Int8Trial", "quantize_onnx"]

logger = logging.getLogger(__name__)

_CODES = 256


@dataclass(frozen=True)
class Int8Trial:
    """
    Attributes:
        float_layers: kept in float32.
        AP: on the search's images, in points.
    """

    float_layers: Tuple[str, ...]
    AP: float


def quantize_onnx(
    source: str,
    target: str,
    images: Sequence[np.ndarray],
    *,
    evaluate: Optional[Callable[[str], float]] = None,
    max_ap_loss: float = 0.5,
    seconds: float = 300.0,
    code_stride: float = 0.0,
    code_signed: bool = False,
    report: Callable[[str], None] = logger.info,
) -> List[Int8Trial]:
    """
    Quantizes every layer with weights, and takes layers back into float32 until AP suffers no more than allowed.

    The search: AP in float and with every layer in int8. If the loss is too large, AP with each layer alone
    taken back; then, from the one that helps most, layers are taken back one after the other for as long as
    the loss is too large, and the best trial is written. It ends when its time is over.

    Args:
        source: a float ``.onnx`` file of :func:`qmimic_d2.export.export_onnx`.
        target: ``.onnx`` file to write, which appears when it is complete and checked.
        images: of the training set, as the network takes them, (3, h, w) each, for the ranges of activations.
        evaluate: from a file to its AP in points; None = no search, every layer in int8.
        max_ap_loss: in points.
        seconds: bound of the search.
        code_stride: of the uniform quantizer in the graph; 0.0 = there is none.
        code_signed: whether its codes may be negative.
        report: told about every trial.

    Returns:
        Every trial in the order in which it was made; the first is the float model.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: no image, or no layer with weights.
    """
    onnx = import_onnx()
    if not images:
        raise ValueError("static quantization needs images to calibrate with, and there is none")
    with tempfile.TemporaryDirectory(prefix="qmimic_d2_") as folder:
        search = _Search(source, folder, list(images), code_stride, code_signed, evaluate, report)
        best = search.run(max_ap_loss, time.monotonic() + seconds)
        with whole_file(target) as partial:
            graph = onnx.load(search.quantized(best))
            del graph.graph.value_info[:]  # what a runtime infers by itself; 5 % of the file
            original = onnx.load(source)
            del graph.metadata_props[:]
            graph.metadata_props.extend(original.metadata_props)
            graph.metadata_props.add(key="int8_float_layers", value=", ".join(each.name for each in best) or "none")
            graph.producer_name = original.producer_name
            prune_opsets(graph)
            check_onnx(graph)
            onnx.save(graph, partial)
    logger.info("Wrote %s", target)
    return search.trials


class _Search:
    def __init__(
        self,
        source: str,
        folder: str,
        images: List[np.ndarray],
        code_stride: float,
        code_signed: bool,
        evaluate: Optional[Callable[[str], float]],
        report: Callable[[str], None],
    ):
        onnx = import_onnx()
        quantization = import_quantization()
        self._source, self._folder, self._images = source, folder, images
        self._evaluate, self._report = evaluate, report
        self._prepared = os.path.join(folder, "prepared.onnx")
        with _quiet():
            quantization.shape_inference.quant_pre_process(source, self._prepared, skip_symbolic_shape=True)
        graph = onnx.load(self._prepared).graph
        self.layers = quantizable_layers(graph)
        if not self.layers:
            raise ValueError(f"{source!r} has no layer with weights that could be quantized")
        self._codes = self._code_overrides(graph, code_stride, code_signed) if code_stride else {}
        self.trials: List[Int8Trial] = []

    def run(self, max_ap_loss: float, end: float) -> Tuple[Layer, ...]:
        """The layers to keep in float."""
        if self._codes:
            self._report(f"Codes of the quantizer pass through int8 exactly: {len(self._codes)} feature map(s)")
        if self._evaluate is None:
            self._report(f"{len(self.layers)} layers in int8, none kept in float; AP not measured, no search")
            return ()
        full = self._evaluate(self._source)
        self.trials.append(Int8Trial(tuple(each.name for each in self.layers), full))
        self._report(f"float32: AP {full:.2f} on the images of the search")
        best: Tuple[Layer, ...] = ()
        best_ap = self._try(best, full)
        if full - best_ap <= max_ap_loss:
            return best
        ranked = []
        for layer in self.layers:
            if time.monotonic() > end:
                self._report("The time of the search is over (--search-seconds)")
                break
            ranked.append((self._try((layer,), full), layer))
        ranked.sort(key=lambda pair: -pair[0])
        kept: Tuple[Layer, ...] = ()
        for ap, layer in ranked:
            kept = (*kept, layer)
            if len(kept) > 1:
                if time.monotonic() > end:
                    self._report("The time of the search is over (--search-seconds)")
                    break
                ap = self._try(kept, full)
            if ap > best_ap:
                best, best_ap = kept, ap
            if full - best_ap <= max_ap_loss:
                break
        self._report(f"Kept in float: {', '.join(each.name for each in best) or 'no layer'}, AP {best_ap - full:+.2f}")
        return best

    def _try(self, kept: Sequence[Layer], full: float) -> float:
        ap = self._evaluate(self.quantized(kept))
        ap = ap if np.isfinite(ap) else 0.0
        names = tuple(each.name for each in kept)
        self.trials.append(Int8Trial(names, ap))
        self._report(f"int8, in float {', '.join(names) or 'nothing'}: AP {ap:.2f} ({ap - full:+.2f})")
        return ap

    def quantized(self, kept: Sequence[Layer]) -> str:
        """A file in which all layers but these are int8."""
        quantization = import_quantization()
        names = [each.name for each in kept]
        nodes = [node for layer in self.layers if layer.name not in names for node in layer.nodes]
        target = os.path.join(self._folder, "quantized.onnx")
        options = {}
        if "calibration_cache_path" in inspect.signature(quantization.quantize_static).parameters:
            options["calibration_cache_path"] = os.path.join(self._folder, "ranges.json")
        if not nodes:  # to onnxruntime, no name means every node
            return self._prepared
        with _quiet():
            quantization.quantize_static(
                self._prepared,
                target,
                _Reader(self._images),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "MaxPool", "Add"],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_quantize=nodes,
                extra_options={"TensorQuantOverrides": dict(self._codes)},
                **options,
            )
        return target

    def _code_overrides(self, graph, stride: float, signed: bool) -> Dict[str, List[Dict[str, object]]]:
        """Scale and zero point for maps of codes that one byte holds."""
        zero = _CODES // 2 if signed else 0
        names = code_tensors(graph, stride)
        outermost = self._largest(names)
        return {
            name: [{"scale": np.array(stride, np.float32), "zero_point": np.array(zero, np.uint8)}]
            for name in names
            if outermost[name] <= (_CODES - 1 - zero) * stride
        }

    def _largest(self, names: Sequence[str]) -> Dict[str, float]:
        """The largest magnitude of some tensors over the images."""
        onnx = import_onnx()
        import onnxruntime

        model = onnx.load(self._prepared)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        largest = dict.fromkeys(names, 0.0)
        for image in self._images if names else ():
            for name, value in zip(names, session.run(list(names), {"image": image})):
                largest[name] = max(largest[name], float(np.abs(value).max(initial=0.0)))
        return largest


class _Reader:
    """Calibration images, one after the other, as onnxruntime asks for them."""

    def __init__(self, images: Sequence[np.ndarray]):
        self._images = iter(track(images, "calibrating int8"))

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        image = next(self._images, None)
        return None if image is None else {"image": image}


def import_quantization():
    """
    ``onnxruntime.quantization``.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        import onnxruntime.quantization as quantization
        import onnxruntime.quantization.shape_inference  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "int8 takes onnxruntime, which is not installed: pip install 'qmimic_d2[export]', or onnx and onnxruntime"
        ) from error
    return quantization


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime logs advice to the root logger, even where it was followed."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
