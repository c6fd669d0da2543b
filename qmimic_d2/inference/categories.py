"""The classes of a detector: their ids and names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, List, Optional

from qmimic_d2.export.description import ModelDescription

if TYPE_CHECKING:  # a device with an exported detector has no Detectron2
    from detectron2.config import CfgNode

__all__ = ["Category", "described_categories", "unknown_names_note"]


@dataclass(frozen=True)
class Category:
    """
    A class of the detector.

    Attributes:
        id: as the data set's annotation file has it, or else the model's class index.
        name: as labels show it.
        is_named: whether the name is the data set's; False where it stands for one that is not known.
    """

    id: int
    name: str
    is_named: bool = True


def described_categories(description: ModelDescription) -> List[Category]:
    """The classes of an exported detector."""
    return [Category(number, name, description.has_names) for number, name in description.classes]


def unknown_names_note(categories: List[Category], cfg: Optional["CfgNode"] = None, path: str = "") -> str:
    """
    What to do where the class names are not known; "" where they are.

    Args:
        categories: of the detector.
        cfg: its config, if that is where the names should have come from.
        path: of an exported file, if not.
    """
    if all(each.is_named for each in categories):
        return ""
    count = len(categories)
    numbers = f'the {count} classes are called "0" to "{count - 1}"' if count > 1 else 'the class is called "0"'
    remedy = (
        "If a module of yours registers the data set, name it: python -m qmimic_d2 --import MODULE COMMAND ..."
    )
    if cfg is None:
        return f"{path!r} was exported without class names, so {numbers}. Export it again with them. {remedy}"
    return (
        f"No data set of DATASETS.TEST {tuple(cfg.DATASETS.TEST)} and DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has "
        f"class names here for {count} classes, so {numbers}. {remedy}"
    )
