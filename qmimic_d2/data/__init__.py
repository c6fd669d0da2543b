"""Data sets; importing it registers them with Detectron2's catalogs and does no other work."""

from qmimic_d2.data.digits import (
    DIGITS_SPECS,
    DigitsSpec,
    prepare_digits,
    register_digits,
    verify_digits,
)

__all__ = ["DIGITS_SPECS", "DigitsSpec", "prepare_digits", "register_digits", "verify_digits"]

register_digits()
