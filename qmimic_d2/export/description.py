"""What an exported file tells about itself: ``labels.json``, and the same inside the file. No torch here."""

import json
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from qmimic_d2.export.preprocessing import InputSpec
from qmimic_d2.export.raw.decoding import BOX_CODINGS, Decoding, Level

__all__ = ["LABELS_NAME", "METADATA_KEY", "RAW_NAME", "ModelDescription"]

# The file of a description, beside the exported one; and that of a raw network.
LABELS_NAME = "labels.json"
RAW_NAME = "model_raw.json"

# Under this name the description stands in an ONNX file's metadata_props and among a TorchScript archive's files.
METADATA_KEY = "qmimic_d2.json"

_VERSION = 1
# Of a network's input, in pixels.
_LONGEST_SIDE = 65536
_OUTPUTS = {
    "boxes": "float32 (N, 4): x0, y0, x1, y1 in pixels of the network's input, by falling score",
    "scores": "float32 (N,): 0 to 1",
    "classes": "int64 (N,): indices into classes",
}


@dataclass(frozen=True)
class ModelDescription:
    """
    Attributes:
        classes: (id, name) of every class, in the order of the detector's indices. The id is the data set's.
        input_spec: how an image becomes the network's input.
        score_threshold: detections below it never leave the network.
        quantizer: of the backbone's features, in words; "" where there is none.
        source: what was exported: config file, weights, meta-architecture.
        has_names: whether the class names are the data set's; False where numbers stand for unknown ones.
        decoding: of a raw network's outputs; None for a network that gives detections.
    """

    classes: Tuple[Tuple[int, str], ...]
    input_spec: InputSpec
    score_threshold: float
    quantizer: str
    source: Mapping[str, str]
    has_names: bool = True
    decoding: Optional[Decoding] = None

    @property
    def file_name(self) -> str:
        """Of the description beside the exported file."""
        return RAW_NAME if self.decoding else LABELS_NAME

    def as_input(self, pixels: np.ndarray) -> np.ndarray:
        """An image (3, h, w) as the network takes it; a raw network has an axis of one image before these."""
        return pixels[None] if self.decoding else pixels

    @property
    def names(self) -> List[str]:
        """Class names, in the order of the detector's indices."""
        return [name for _, name in self.classes]

    @property
    def score_threshold_key(self) -> str:
        """The config's key of :attr:`score_threshold`."""
        return self.source.get("score_threshold_key", "MODEL.ROI_HEADS.SCORE_THRESH_TEST")

    def to_dict(self) -> Dict[str, Any]:
        """The content of ``labels.json``."""
        spec = self.input_spec
        size = f"{spec.fixed_height} x {spec.fixed_width}" if spec.is_fixed else "any"
        shape = "(1, 3, height, width)" if self.decoding else "(3, height, width)"
        fill = "fill the rest with pixel_mean"
        if spec.is_fixed:
            resize = f"to the largest that fits {size} with its aspect ratio kept; {fill}"
        elif spec.min_size:
            resize = (
                f"shorter side to {spec.min_size} pixels, longer side at most {spec.max_size}; bilinear with "
                f"antialiasing; where a side is below {spec.least}, {fill}"
            )
        else:
            resize = f"none; where a side is below {spec.least}, {fill}"
        return {
            "version": _VERSION,
            "classes": [{"id": number, "name": name} for number, name in self.classes],
            "class_names_known": self.has_names,
            "score_threshold": self.score_threshold,
            "quantizer": self.quantizer,
            "preprocessing": {
                "image": f"float32 {shape}, channels {spec.format}, grey levels 0 to 255",
                "size": size,
                "resize": resize,
                "normalization": "(image - pixel_mean) / pixel_std, done inside the network",
                **spec.to_dict(),
            },
            "outputs": self._outputs(),
            **({"decoding": self.decoding.to_dict()} if self.decoding else {}),
            "source": dict(self.source),
        }

    def _outputs(self) -> Dict[str, str]:
        if not self.decoding:
            return dict(_OUTPUTS)
        return {name: f"float32 {shape}" for name, shape in self.decoding.output_shapes.items()}

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModelDescription":
        """
        Raises:
            ValueError: the text is no such description, or of a version that is not known here, or says what
                cannot be; one line.
        """
        try:
            content = _typed(json.loads(text), dict, "it")
            version = _get(content, "version", int)
            if version != _VERSION:
                raise ValueError(f"its version is {version!r}")
            return cls(
                classes=_classes(_get(content, "classes", list)),
                input_spec=_input_spec(_get(content, "preprocessing", dict)),
                score_threshold=_score(_get(content, "score_threshold", float)),
                quantizer=_get(content, "quantizer", str),
                source={key: _typed(value, str, key) for key, value in _get(content, "source", dict).items()},
                has_names=_typed(content.get("class_names_known", True), bool, "class_names_known"),
                decoding=_decoding(_get(content, "decoding", dict)) if "decoding" in content else None,
            )
        except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"no description of version {_VERSION} of an exported detector ({type(error).__name__}: {reason})"
            ) from error


def _typed(value: Any, kind: type, name: str) -> Any:
    """The value, which is of this type; a whole number is a float as well, and a bool is none."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _get(content: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in content:
        raise KeyError(key)
    return _typed(content[key], kind, key)


def _classes(entries: List[Any]) -> Tuple[Tuple[int, str], ...]:
    classes = tuple(
        (_get(_typed(each, dict, "a class"), "id", int), _get(each, "name", str)) for each in entries
    )
    if not classes:
        raise ValueError("it names no class")
    if len({number for number, _ in classes}) < len(classes):
        raise ValueError("two classes have one id")
    return classes


def _score(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"score_threshold is {value!r}, not from 0 to 1")
    return float(value)


def _input_spec(described: Mapping[str, Any]) -> InputSpec:
    sizes = {key: _get(described, key, int) for key in ("min_size", "max_size", "fixed_height", "fixed_width", "least")}
    beyond = {key: value for key, value in sizes.items() if not 0 <= value <= _LONGEST_SIDE}
    if beyond:
        raise ValueError(f"{beyond} is not from 0 to {_LONGEST_SIDE} pixels")
    levels = {key: _floats(_get(described, key, list), key, 3) for key in ("pixel_mean", "pixel_std")}
    return InputSpec(format=_get(described, "format", str), **sizes, **levels)


def _decoding(described: Mapping[str, Any]) -> Decoding:
    levels = tuple(_level(_typed(each, dict, "a level")) for each in _get(described, "levels", list))
    counts = {key: _get(described, key, int) for key in ("num_classes", "top_k", "max_detections")}
    if not levels or min(counts.values()) < 1 or described["box_coding"] not in BOX_CODINGS:
        raise ValueError(f"it decodes {len(levels)} levels, {counts}, {described['box_coding']!r}")
    return Decoding(
        levels=levels,
        box_coding=described["box_coding"],
        has_centerness=_get(described, "has_centerness", bool),
        delta_weights=_floats(_get(described, "delta_weights", list), "delta_weights", 4),
        largest_log_scale=_floats([described["largest_log_scale"]], "largest_log_scale", 1)[0],
        score_threshold=_score(_get(described, "score_threshold", float)),
        nms_threshold=_score(_get(described, "nms_threshold", float)),
        **counts,
    )


def _level(described: Mapping[str, Any]) -> Level:
    sizes = {key: _get(described, key, int) for key in ("height", "width", "stride")}
    anchors = tuple(_floats(_typed(each, list, "an anchor"), "an anchor", 4) for each in described["anchors"])
    if not anchors or not all(1 <= value <= _LONGEST_SIDE for value in sizes.values()):
        raise ValueError(f"a level has {sizes} and {len(anchors)} anchors")
    (offset,) = _floats([described["offset"]], "offset", 1)
    return Level(name=_get(described, "name", str), offset=offset, anchors=anchors, **sizes)


def _floats(values: List[Any], key: str, count: int) -> Tuple[float, ...]:
    numbers = tuple(float(_typed(each, float, key)) for each in values)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{key} is not {count} finite numbers")
    return numbers
