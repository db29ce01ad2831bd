"""A model judged on a data set: one record per row, and the baselines beside it."""

from segrl.evaluation.base import OnAnswer, overlap_record
from segrl.evaluation.coco_results import CocoMasks, CocoResults
from segrl.evaluation.comparison import compare_records, read_records
from segrl.evaluation.constant_mask import constant_mask_baseline, evaluate_constant_mask
from segrl.evaluation.images import evaluate, evaluate_true_boxes
from segrl.evaluation.stored_masks import StoredMasks, evaluate_masks
from segrl.evaluation.volumes import (
    VOLUME_GROUPINGS,
    VOLUME_METRICS,
    evaluate_oracle_boxes,
    evaluate_volumes,
    summarise_volumes,
    volume_record,
)

__all__ = [
    "VOLUME_GROUPINGS",
    "VOLUME_METRICS",
    "CocoMasks",
    "CocoResults",
    "OnAnswer",
    "StoredMasks",
    "compare_records",
    "constant_mask_baseline",
    "evaluate",
    "evaluate_constant_mask",
    "evaluate_masks",
    "evaluate_oracle_boxes",
    "evaluate_true_boxes",
    "evaluate_volumes",
    "overlap_record",
    "read_records",
    "summarise_volumes",
    "volume_record",
]
