"""What an exported file tells about itself: ``labels.json``, and the same inside the file. No torch here."""

import json
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Tuple

from qmimic_d2.export.preprocessing import InputSpec

__all__ = ["METADATA_KEY", "ModelDescription"]

# Under this name the description stands in an ONNX file's metadata_props and among a TorchScript archive's files.
METADATA_KEY = "qmimic_d2.json"

_VERSION = 1
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
    """

    classes: Tuple[Tuple[int, str], ...]
    input_spec: InputSpec
    score_threshold: float
    quantizer: str
    source: Mapping[str, str]

    @property
    def names(self) -> List[str]:
        """Class names, in the order of the detector's indices."""
        return [name for _, name in self.classes]

    def to_dict(self) -> Dict[str, Any]:
        """The content of ``labels.json``."""
        spec = self.input_spec
        size = f"{spec.fixed_height} x {spec.fixed_width}" if spec.is_fixed else "any"
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
            "score_threshold": self.score_threshold,
            "quantizer": self.quantizer,
            "preprocessing": {
                "image": f"float32 (3, height, width), channels {spec.format}, grey levels 0 to 255",
                "size": size,
                "resize": resize,
                "normalization": "(image - pixel_mean) / pixel_std, done inside the network",
                **spec.to_dict(),
            },
            "outputs": dict(_OUTPUTS),
            "source": dict(self.source),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModelDescription":
        """
        Raises:
            ValueError: the text is no such description, or of a version that is not known here.
        """
        try:
            content = json.loads(text)
            if content["version"] != _VERSION:
                raise ValueError(f"its version is {content['version']!r}")
            described = content["preprocessing"]
            spec = {key: described[key] for key in InputSpec.__dataclass_fields__}
            return cls(
                classes=tuple((int(each["id"]), str(each["name"])) for each in content["classes"]),
                input_spec=InputSpec.from_dict(spec),
                score_threshold=float(content["score_threshold"]),
                quantizer=str(content["quantizer"]),
                source=dict(content["source"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"no description of version {_VERSION} of an exported detector ({type(error).__name__}: {error})"
            ) from error
