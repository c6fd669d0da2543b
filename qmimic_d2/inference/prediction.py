"""
Predictions of a trained detector on single images.

Shape letters:
    H, W: height and width of an image, in pixels.
    N: number of detections.
"""

from typing import Optional, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn

from qmimic_d2.export.finite import watch_outputs
from qmimic_d2.export.network import input_spec_of
from qmimic_d2.export.preprocessing import NOT_FINITE, Detections, InputSpec
from qmimic_d2.export.student import build_student
from qmimic_d2.image_file import as_bgr_image

__all__ = ["Predictor", "as_instances"]


class Predictor:
    """
    A trained detector for single images: the student alone, whatever it was trained with.

    As Detectron2's ``DefaultPredictor``, with these differences: the checkpoint is read without running code
    in it, it must fill the whole model, and images so narrow that nothing of them would reach the network are
    padded. Exported files prepare their images by the same code.
    """

    def __init__(self, cfg: CfgNode, weights_key: str = "MODEL.WEIGHTS"):
        """
        Args:
            cfg: of the detector; no file of a teacher is needed.
            weights_key: where the user gave ``cfg.MODEL.WEIGHTS``, for error messages.

        Raises:
            FileNotFoundError, ValueError: there are no weights, or they do not fit the model.
        """
        model = build_student(cfg, weights_key=weights_key)
        self._model, self._spec = model, input_spec_of(cfg, model)

    @classmethod
    def of_model(cls, cfg: CfgNode, model: nn.Module, spec: Optional[InputSpec] = None) -> "Predictor":
        """Of a model that has its weights already, in evaluation mode; ``spec`` takes the place of the config's."""
        predictor = cls.__new__(cls)
        predictor._model, predictor._spec = model, spec or input_spec_of(cfg, model)
        return predictor

    @property
    def model(self) -> nn.Module:
        """The detector, in evaluation mode."""
        return self._model

    def __call__(self, image: np.ndarray, image_format: str = "BGR") -> Instances:
        """
        Args:
            image: shape (H, W, 3), uint8, or what else :func:`qmimic_d2.image_file.as_bgr_image` takes.
            image_format: order of its channels, "BGR" or "RGB".

        Returns:
            N detections on the CPU, by falling score, with ``pred_boxes`` (XYXY, in pixels of ``image``),
            ``scores`` and ``pred_classes``.

        Raises:
            ValueError: another shape, dtype or format; or the model gives numbers that are not finite.
        """
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"image_format is {image_format!r}; give 'BGR' or 'RGB'")
        image = as_bgr_image(image)
        bgr = image if image_format == "BGR" else image[:, :, ::-1]
        return as_instances(self.detect(bgr), image.shape[:2])

    def detect(self, image: np.ndarray) -> Detections:
        """
        As ``qmimic_d2.export.OnnxDetector`` does it.

        Args:
            image: shape (H, W, 3), BGR, uint8.

        Raises:
            ValueError: the model gives numbers that are not finite.
        """
        pixels, placement = self._spec.prepare(image)
        height, width = pixels.shape[1:]
        inputs = {"image": torch.from_numpy(pixels), "height": height, "width": width}
        with torch.no_grad(), watch_outputs(self._model) as watch:
            found = self._model([inputs])[0]["instances"].to("cpu")
        if not watch.is_finite:
            raise ValueError(NOT_FINITE)
        return placement.restore(
            found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy()
        )


def as_instances(found: Detections, size: Tuple[int, int]) -> Instances:
    """Detections of an image of ``size`` (H, W) in Detectron2's class."""
    return Instances(
        size,
        pred_boxes=Boxes(torch.from_numpy(found.boxes)),
        scores=torch.from_numpy(found.scores),
        pred_classes=torch.from_numpy(found.classes),
    )
