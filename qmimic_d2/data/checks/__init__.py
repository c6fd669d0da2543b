"""Checks of data sets before a run, by format, and repairs of what Detectron2 cannot take but is harmless."""

from qmimic_d2.data.checks.findings import DataSetError, Findings

__all__ = ["DataSetError", "Findings"]
