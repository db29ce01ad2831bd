"""Boxes, masks and matching, functions on arrays; and the readers of image and mask files."""

from segrl.geometry.boxes import area, giou, pairwise_giou, pairwise_iou, validate_boxes
from segrl.geometry.image_files import open_image, read_image
from segrl.geometry.mask_images import binarize, mask_values, read_mask_file, write_mask_image
from segrl.geometry.masks import (
    boxes_from_mask,
    deepest_points,
    empty_score,
    foreground,
    mask_to_box,
    mask_to_rle,
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
    "open_image",
    "pairwise_giou",
    "pairwise_iou",
    "read_image",
    "read_mask_file",
    "resize_mask",
    "rle_to_mask",
    "soft_target",
    "validate_boxes",
    "write_mask_image",
]
