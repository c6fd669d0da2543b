"""Looking at a config and its weights before anything is trained with them."""

from qmimic_d2.analysis.activation_memory import measure_activation_memory
from qmimic_d2.analysis.calibration import (
    LEAST_AP,
    MAX_RELATIVE_STRIDE,
    build_calibration_loader,
    default_strides,
    evenly_spaced,
    is_signed,
    measure_ap,
    measure_codes,
    measure_features,
    recommend_stride,
)
from qmimic_d2.analysis.feature_statistics import CodeStatistics, FeatureStatistics
from qmimic_d2.analysis.model_cost import ModelCost, PartCost, measure_cost

__all__ = [
    "LEAST_AP",
    "MAX_RELATIVE_STRIDE",
    "CodeStatistics",
    "FeatureStatistics",
    "ModelCost",
    "PartCost",
    "build_calibration_loader",
    "default_strides",
    "evenly_spaced",
    "is_signed",
    "measure_activation_memory",
    "measure_ap",
    "measure_codes",
    "measure_cost",
    "measure_features",
    "recommend_stride",
]
