"""Ids of a COCO file: what JSON allows, brought to what Detectron2 and COCO's API can sort and compare."""

from typing import Any, Dict, Hashable, List, Optional, Sequence

__all__ = ["Ids", "is_id"]


def is_id(value: Any) -> bool:
    """Whether a value can be an id: a whole number, or a text that is not empty."""
    if isinstance(value, (bool, float)):
        return isinstance(value, float) and value.is_integer()
    return isinstance(value, int) or (isinstance(value, str) and bool(value))


class Ids:
    """
    The ids of images or of categories, and what a reference to one means.

    Whole numbers stay. Texts stay where all ids are texts, unless ``are_sorted`` and all are numbers ("10" would come
    before "2"). A mixture becomes numbers where it can, else texts. A reference is found by its text too: "7" means 7.

    Args:
        raw: usable ids (:func:`is_id`), in the order of the file.
        are_sorted: their order has a meaning, as that of category ids has.

    Attributes:
        duplicates: ids that occur more than once.
    """

    def __init__(self, raw: Sequence[Any], are_sorted: bool = False):
        self._type = _common_type(raw, are_sorted)
        counts: Dict[Hashable, int] = {}
        for each in map(self.own, raw):
            counts[each] = counts.get(each, 0) + 1
        self.duplicates: List[Hashable] = [each for each, count in counts.items() if count > 1]
        self._known = counts
        self._by_text = {str(each): each for each in counts}

    def own(self, value: Any) -> Hashable:
        """A usable id in its final form."""
        value = int(value) if isinstance(value, float) else value
        return value if isinstance(value, self._type) else self._type(value)

    def referred(self, value: Any) -> Optional[Hashable]:
        """The id that a reference means; None for no known one."""
        if type(value) is self._type and value in self._known:
            return value
        if not is_id(value):
            return None
        return self._by_text.get(str(int(value) if isinstance(value, float) else value))


def _common_type(raw: Sequence[Any], are_sorted: bool) -> type:
    kinds = {type(each) for each in raw}
    if kinds == {str} and not are_sorted:
        return str
    if str in kinds and not all(each.isdecimal() for each in raw if isinstance(each, str)):
        return str
    return int
