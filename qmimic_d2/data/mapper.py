"""Mappers: from a dict of a data set to a model's input, with the pixels that every side of this package sees."""

import copy
import struct
from typing import Any, Callable, Dict

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager

from qmimic_d2.image_file import UnusableImageError, open_image

__all__ = ["FileNamingMapper", "ImageMapper", "read_image"]


def read_image(path: str, image_format: str) -> np.ndarray:
    """
    Detectron2's ``read_image`` with the rules of :mod:`qmimic_d2.image_file`.

    Args:
        path: or a URI that Detectron2's PathManager knows.
        image_format: as INPUT.FORMAT: "BGR", "RGB", "L", "YUV-BT.601" or another mode of Pillow.

    Returns:
        shape (H, W, C); uint8, for "YUV-BT.601" float. The pixels of Detectron2's own for files of 8 bits per channel.

    Raises:
        UnusableImageError: it cannot be decoded.
        FileNotFoundError: it is not there.
    """
    with PathManager.open(path, "rb") as file:
        return utils.convert_PIL_to_numpy(open_image(file, path), image_format)


class ImageMapper(DatasetMapper):
    """
    Detectron2's ``DatasetMapper`` that reads images as ``predict`` and the exported detectors do.

    Its arguments, and ``from_config``, are those of ``DatasetMapper``.
    """

    @configurable
    def __init__(self, is_train: bool, **options):
        super().__init__(is_train, **options)

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        """As ``DatasetMapper``, whose reader of images is a part of this method and cannot be overridden alone."""
        dataset_dict = copy.deepcopy(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        utils.check_image_size(dataset_dict, image)
        labels = None
        if "sem_seg_file_name" in dataset_dict:  # numbers of classes: never scaled
            labels = utils.read_image(dataset_dict.pop("sem_seg_file_name"), "L").squeeze(2)
        augmented = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if labels is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(dataset_dict, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, size)
        return dataset_dict


class FileNamingMapper:
    """
    Another mapper, such as :class:`ImageMapper`, whose error names the image.

    Pillow's own error about a file that is cut short names none, and in a training of hours that is the thing to know.
    """

    def __init__(self, mapper: Callable[[Dict[str, Any]], Any]):
        self.mapper = mapper

    def __call__(self, dataset_dict: Dict[str, Any]) -> Any:
        """
        Raises:
            UnusableImageError: the image cannot be decoded.
            FileNotFoundError: it is not there; Python's own names it.
        """
        try:
            return self.mapper(dataset_dict)
        except FileNotFoundError:
            raise
        except UnusableImageError as error:
            raise _named(dataset_dict, str(error)) from error
        except (OSError, SyntaxError, struct.error) as error:  # what Pillow raises of a damaged file
            raise _named(dataset_dict, f"{type(error).__name__}: {error}") from error


def _named(dataset_dict: Dict[str, Any], reason: str) -> UnusableImageError:
    return UnusableImageError(
        f"{dataset_dict.get('file_name')!r} cannot be read as an image: {reason}. Replace the file, or take it out of "
        "the data set"
    )
