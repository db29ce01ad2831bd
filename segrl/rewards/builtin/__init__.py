"""The built-in rewards and the presets of published systems; importing this package registers them."""

from segrl.rewards.builtin.boxes import box_ap, box_confidence, box_count, box_giou, box_hungarian, box_iou, box_l1
from segrl.rewards.builtin.core_seg import box_f1, dual_granularity_mask, format_reward
from segrl.rewards.builtin.masks import boundary_iou, hd95, mask_dice, mask_iou, nsd, s_measure, soft_dice
from segrl.rewards.builtin.medvol_r1 import propagated_dice, slice_boxes, slice_format, slice_visibility
from segrl.rewards.builtin.points import point_distance, point_in_box, point_in_mask
from segrl.rewards.builtin.presets import (
    core_seg,
    lens,
    med_reasoner,
    medvol_r1,
    pixel_think,
    seg_r1,
    seg_zero,
    vision_reasoner,
    visual_rft,
    vlm_r1,
    vlm_r1_ovd,
)
from segrl.rewards.builtin.text import json_format, length_budget, non_repeat, repetition, think_answer_format

__all__ = [
    "boundary_iou",
    "box_ap",
    "box_confidence",
    "box_count",
    "box_f1",
    "box_giou",
    "box_hungarian",
    "box_iou",
    "box_l1",
    "core_seg",
    "dual_granularity_mask",
    "format_reward",
    "hd95",
    "json_format",
    "length_budget",
    "lens",
    "mask_dice",
    "mask_iou",
    "med_reasoner",
    "medvol_r1",
    "non_repeat",
    "nsd",
    "pixel_think",
    "point_distance",
    "point_in_box",
    "point_in_mask",
    "propagated_dice",
    "repetition",
    "s_measure",
    "seg_r1",
    "seg_zero",
    "slice_boxes",
    "slice_format",
    "slice_visibility",
    "soft_dice",
    "think_answer_format",
    "vision_reasoner",
    "visual_rft",
    "vlm_r1",
    "vlm_r1_ovd",
]
