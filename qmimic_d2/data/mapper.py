"""A mapper that says which image it could not read."""

import struct
from typing import Any, Callable, Dict

from qmimic_d2.image_file import UnusableImageError

__all__ = ["FileNamingMapper"]


class FileNamingMapper:
    """
    Another mapper, such as Detectron2's ``DatasetMapper``, whose error names the image.

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
        except (OSError, SyntaxError, struct.error) as error:  # what Pillow raises of a damaged file
            raise UnusableImageError(
                f"{dataset_dict.get('file_name')!r} cannot be read as an image: {type(error).__name__}: {error}. "
                "Replace the file, or take it out of the data set"
            ) from error
