"""The embedded data sets ``digits_det_*``; docs/digits.md describes them."""

from qmimic_d2.data.digits.registration import (
    DIGITS_SPECS,
    DigitsSpec,
    prepare_digits,
    register_digits,
    verify_digits,
)

__all__ = ["DIGITS_SPECS", "DigitsSpec", "prepare_digits", "register_digits", "verify_digits"]
