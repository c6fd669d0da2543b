"""
From the outputs of a raw network to detections, in numpy alone; Detectron2's inference of RetinaNet and FCOS.

The float32 arithmetic is Detectron2's, step by step. ``decode.c`` and ``decode.mjs`` beside this file do the same.

Shape letters:
    H, W: height and width of the feature map of a level.
    A: anchors of a place.
    K: number of classes.
    N: number of boxes.
"""

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from qmimic_d2.export.preprocessing import NOT_FINITE

__all__ = ["BOX_CODINGS", "Decoding", "Level"]

# What the box outputs are: Detectron2's Box2BoxTransform, and its Box2BoxTransformLinear in units of the anchor's size.
BOX_CODINGS = ("deltas", "distances")


@dataclass(frozen=True)
class Level:
    """
    A feature map, and the anchors on it.

    Attributes:
        name: of the map, such as "p3".
        height, width: H and W.
        stride: pixels of the network's input from one place to the next.
        offset: pixels from the input's edge to the first place.
        anchors: A boxes, XYXY in pixels from a place.
    """

    name: str
    height: int
    width: int
    stride: int
    offset: float
    anchors: Tuple[Tuple[float, ...], ...]

    def grid(self) -> np.ndarray:
        """Every anchor, shape (H W A, 4), float32, XYXY in pixels of the network's input."""
        x, y = ((self.offset + np.arange(n) * self.stride).astype(np.float32) for n in (self.width, self.height))
        places = np.stack([*np.meshgrid(x, y)] * 2, axis=-1)  # (H, W, 4): x, y, x, y
        return (places[:, :, None] + np.asarray(self.anchors, np.float32)).reshape(-1, 4)


@dataclass(frozen=True)
class Decoding:
    """
    Attributes:
        levels: in the order of the outputs.
        num_classes: K.
        box_coding: one of :data:`BOX_CODINGS`.
        has_centerness: whether each level has a third output, with which scores are multiplied.
        delta_weights: by which deltas are divided.
        largest_log_scale: larger deltas of width and height count as this.
        score_threshold: a detection scores more than this.
        top_k: detections that a level keeps, before non-maximum suppression.
        nms_threshold: a box goes if its IoU with a better one of its class is larger.
        max_detections: of an image.
    """

    levels: Tuple[Level, ...]
    num_classes: int
    box_coding: str
    has_centerness: bool
    delta_weights: Tuple[float, ...]
    largest_log_scale: float
    score_threshold: float
    top_k: int
    nms_threshold: float
    max_detections: int

    @property
    def output_shapes(self) -> Dict[str, Tuple[int, int, int, int]]:
        """Shapes (1, channels, H, W) of the network's outputs by their names, in order."""
        kinds = {"logits": self.num_classes, "deltas": 4, **({"centerness": 1} if self.has_centerness else {})}
        return {
            f"{kind}_{level.name}": (1, len(level.anchors) * count, level.height, level.width)
            for level in self.levels
            for kind, count in kinds.items()
        }

    def to_dict(self) -> Dict[str, Any]:
        """As plain numbers, strings and lists, for JSON."""
        return asdict(self)

    def decode(self, outputs: Sequence[np.ndarray]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Args:
            outputs: float32, as :attr:`output_shapes` says; channels are (A, K), (A, 4) and (A,).

        Returns:
            Boxes (N, 4), XYXY in pixels of the network's input and not clipped to it, scores (N,) and classes (N,), by
            falling score. Equal scores stand in the order of levels, places, anchors and classes.

        Raises:
            ValueError: an output is not finite.
        """
        if not all(np.isfinite(each).all() for each in outputs):
            raise ValueError(NOT_FINITE)
        count = len(outputs) // len(self.levels)
        found = [self._level(each, outputs[i * count : (i + 1) * count]) for i, each in enumerate(self.levels)]
        boxes, scores, classes = (np.concatenate(each) for each in zip(*found))
        kept = self._kept(boxes, scores, classes)
        return boxes[kept], scores[kept], classes[kept]

    def _level(self, level: Level, outputs: Sequence[np.ndarray]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits, deltas, *centerness = (_rows(each, len(level.anchors)) for each in outputs)
        scores = _sigmoid(logits)
        if centerness:
            scores = np.sqrt(scores * _sigmoid(centerness[0]))
        scores = scores.ravel()
        best = np.flatnonzero(scores > np.float32(self.score_threshold))
        best = best[np.argsort(-scores[best], kind="stable")[: self.top_k]]
        anchors, classes = np.divmod(best, self.num_classes)
        return self._boxes(deltas[anchors], level.grid()[anchors]), scores[best], classes

    def _boxes(self, deltas: np.ndarray, anchors: np.ndarray) -> np.ndarray:
        """Shapes (N, 4), (N, 4) -> (N, 4)."""
        sizes = anchors[:, 2:] - anchors[:, :2]
        half = np.float32(0.5)
        if self.box_coding == "distances":
            centers = half * (anchors[:, :2] + anchors[:, 2:])
            deltas = np.maximum(deltas, 0) * np.concatenate([sizes, sizes], axis=1)
            return np.concatenate([centers - deltas[:, :2], centers + deltas[:, 2:]], axis=1)
        deltas = deltas / np.asarray(self.delta_weights, np.float32)
        centers = deltas[:, :2] * sizes + (anchors[:, :2] + half * sizes)
        sizes = np.exp(np.minimum(deltas[:, 2:], np.float32(self.largest_log_scale))) * sizes
        return np.concatenate([centers - half * sizes, centers + half * sizes], axis=1)

    def _kept(self, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> List[int]:
        """Indices of what is left after non-maximum suppression within each class, by falling score."""
        kept: List[int] = []
        waiting = np.argsort(-scores, kind="stable")
        while len(waiting) and len(kept) < self.max_detections:
            best, waiting = int(waiting[0]), waiting[1:]
            kept.append(best)
            is_same = classes[waiting] == classes[best]
            waiting = waiting[~(is_same & (_iou(boxes[best], boxes[waiting]) > self.nms_threshold))]
        return kept


def _rows(output: np.ndarray, num_anchors: int) -> np.ndarray:
    """Shape (1, A C, H, W) -> (H W A, C)."""
    _, channels, height, width = output.shape
    table = output.reshape(num_anchors, channels // num_anchors, height, width).transpose(2, 3, 0, 1)
    return table.reshape(-1, channels // num_anchors)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    one = np.float32(1.0)
    with np.errstate(over="ignore"):
        return one / (one + np.exp(-logits))


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of a box (4,) with each of (N, 4): computed in float32, returned as float64 (N,); NaN where both are empty."""
    corner = np.maximum(box[:2], others[:, :2])
    inner = np.maximum(np.minimum(box[2:], others[:, 2:]) - corner, 0).prod(axis=1)
    area, areas = ((each[..., 2:] - each[..., :2]).prod(axis=-1) for each in (box, others))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (inner / (area + areas - inner)).astype(np.float64)
