"""Metrics: scores of a predicted mask against the ground truth, and their summary with bootstrap intervals."""

from segrl.metrics.calibration import calibration, certain_half_gain, reliability, risk_coverage
from segrl.metrics.hedging import count_hedges
from segrl.metrics.overlap import dice, failure, iou
from segrl.metrics.registry import make_metric, register_metric
from segrl.metrics.structure import s_measure, soft_dice
from segrl.metrics.summary import bootstrap_ci, nested_bootstrap_ci, paired_bootstrap_ci, paired_difference, summarise
from segrl.metrics.surfaces import boundary_iou, hausdorff, surface, surface_dice, surface_distances

__all__ = [
    "bootstrap_ci",
    "boundary_iou",
    "calibration",
    "certain_half_gain",
    "count_hedges",
    "dice",
    "failure",
    "hausdorff",
    "iou",
    "make_metric",
    "nested_bootstrap_ci",
    "paired_bootstrap_ci",
    "paired_difference",
    "register_metric",
    "reliability",
    "risk_coverage",
    "s_measure",
    "soft_dice",
    "summarise",
    "surface",
    "surface_dice",
    "surface_distances",
]
