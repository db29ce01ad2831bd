"""Boxes, masks and matching: pure functions on arrays."""

from segrl.geometry.boxes import area, giou, pairwise_giou, pairwise_iou, validate_boxes
from segrl.geometry.masks import (
    binarize,
    boxes_from_mask,
    deepest_points,
    empty_score,
    foreground,
    mask_to_box,
    mask_to_rle,
    mask_values,
    resize_mask,
    rle_to_mask,
    soft_target,
)
from segrl.geometry.matching import Matching, match, match_boxes

__all__ = [
    "Matching",
    "area",
    "binarize",
    "boxes_from_mask",
    "deepest_points",
    "empty_score",
    "foreground",
    "giou",
    "mask_to_box",
    "mask_to_rle",
    "mask_values",
    "match",
    "match_boxes",
    "pairwise_giou",
    "pairwise_iou",
    "resize_mask",
    "rle_to_mask",
    "soft_target",
    "validate_boxes",
]
