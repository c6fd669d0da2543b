"""Data sets; importing it registers them with Detectron2's catalogs and does no other work."""

from qmimic_d2.data.digits.registration import (
    DIGITS_SPECS,
    DigitsSpec,
    prepare_digits,
    register_digits,
    verify_digits,
)
from qmimic_d2.data.wider_face.registration import load_wider_face, register_wider_face

__all__ = [
    "DIGITS_SPECS",
    "DigitsSpec",
    "load_wider_face",
    "prepare_digits",
    "register_digits",
    "register_wider_face",
    "verify_digits",
]

register_digits()
register_wider_face()
