"""
The ground truth of WIDER FACE's validation set, from the four .mat files of the official evaluation tool.

All four hold ``event_list``, ``file_list`` and ``face_bbx_list``, cell arrays over the events, the latter two of cell
arrays over an event's images: a name without ".jpg", and a row x, y, w, h per face. ``gt_list`` of the files easy,
medium and hard has the numbers, from 1, of the faces that belong to the subset. An image without a face has one row of
zeros that no subset names.

Shape letters used in this module:

    G   faces of one image
"""

import os
from dataclasses import dataclass
from typing import Dict, List

import numpy as np

__all__ = ["SUBSETS", "WiderFaceGroundTruth", "load_ground_truth", "require_ground_truth"]

SUBSETS = ("easy", "medium", "hard")

_FACES = "wider_face_val.mat"
_SUBSET = "wider_{}_val.mat"


@dataclass(frozen=True)
class WiderFaceGroundTruth:
    """
    What a detector is compared with.

    Attributes:
        boxes: per image, by its id "<event>/<name>", all its faces: (G, 4) float64, x, y, w, h in pixels.
        kept: per subset and image, which of them are to be found: (G,) bool. A detection of another one is
            ignored.
    """

    boxes: Dict[str, np.ndarray]
    kept: Dict[str, Dict[str, np.ndarray]]

    @property
    def events(self) -> List[str]:
        """The events that images belong to, in order."""
        return list(dict.fromkeys(image_id.partition("/")[0] for image_id in self.boxes))

    def require_image(self, image_id: str) -> None:
        """
        Raises:
            ValueError: the event, or the image, is not among these.
        """
        if image_id in self.boxes:
            return
        event = image_id.partition("/")[0]
        if event not in self.events:
            raise ValueError(f"{event!r} (of {image_id!r}) is no event of the ground truth, which has {self.events}")
        raise ValueError(f"{image_id!r} is no image of the ground truth, which has {len(self.boxes)} others")


def require_ground_truth(folder: str) -> None:
    """
    Raises:
        FileNotFoundError: one of the four files is missing; says where to get it.
    """
    names = [_FACES, *(_SUBSET.format(subset) for subset in SUBSETS)]
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise FileNotFoundError(
            f"the ground truth of WIDER FACE's validation set is looked for in {os.path.abspath(folder)}, and "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there. Put {', '.join(names)} there; "
            "they stand in ground_truth/ of the official eval_tools.zip (http://shuoyang1213.me/WIDERFACE/)"
        )


def load_ground_truth(folder: str) -> WiderFaceGroundTruth:
    """
    Args:
        folder: of ``wider_face_val.mat`` and ``wider_{easy,medium,hard}_val.mat``.

    Raises:
        FileNotFoundError: as :func:`require_ground_truth`.
        ValueError: a file is not of the official structure, or does not belong to the others; names it.
    """
    require_ground_truth(folder)
    faces = _read(os.path.join(folder, _FACES), "face_bbx_list")
    ground_truth = WiderFaceGroundTruth({}, {subset: {} for subset in SUBSETS})
    for image_id, boxes in faces.items():
        if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
            raise ValueError(f"{_FACES}: face_bbx_list of {image_id} has the shape {boxes.shape}, not (faces, 4)")
        ground_truth.boxes[image_id] = boxes.reshape(-1, 4).astype(np.float64)
    for subset in SUBSETS:
        path = os.path.join(folder, _SUBSET.format(subset))
        numbers = _read(path, "gt_list")
        if list(numbers) != list(faces):
            raise ValueError(f"{path} lists other images than {_FACES} beside it; take all four from one archive")
        for image_id, boxes in ground_truth.boxes.items():
            indices = numbers[image_id].reshape(-1).astype(np.int64) - 1
            if indices.size and not (0 <= indices.min() and indices.max() < len(boxes)):
                raise ValueError(f"{path}: gt_list of {image_id} names a face that is not among its {len(boxes)}")
            kept = np.zeros(len(boxes), dtype=bool)
            kept[indices] = True
            ground_truth.kept[subset][image_id] = kept
    return ground_truth


def _read(path: str, key: str) -> Dict[str, np.ndarray]:
    """The cell of every image by its id, in the order of the file."""
    from scipy.io import loadmat  # here, because it takes time and this data set alone needs it

    try:
        content = loadmat(path, variable_names=["event_list", "file_list", key])
    except NotImplementedError as error:  # MATLAB 7.3 files are HDF5
        raise ValueError(
            f"{path} is a MATLAB 7.3 file; take the one in ground_truth/ of the official eval_tools.zip, not that "
            "of wider_face_split.zip"
        ) from error
    # scipy raises what it comes upon in a damaged file
    except Exception as error:
        raise ValueError(f"{path} is no MATLAB file that can be read: {type(error).__name__}: {error}") from error
    try:
        cells = {}
        for event, names, row in zip(*(content[each][:, 0] for each in ("event_list", "file_list", key))):
            if len(names) != len(row):
                raise ValueError(f"{key} of {event[0]} has {len(row)} cells for {len(names)} images")
            cells.update((f"{event[0]}/{name[0]}", cell) for name, cell in zip(names[:, 0], row[:, 0]))
        return cells
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has not the structure of the official file (cell arrays event_list, file_list and {key}): "
            f"{type(error).__name__}: {error}"
        ) from error
