"""The three rewards of CORE-Seg, `R = format + box_f1 + dual_granularity_mask` with a weight of 1.0 each.

The paper is silent on invalid texts, empty sides and empty masks. One rule is chosen here: whatever is invalid or
missing returns the lowest value of the reward, so that no text gains by not answering.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from segrl.errors import DataError
from segrl.geometry.boxes import giou, pairwise_iou
from segrl.geometry.masks import empty_score, mask_to_box
from segrl.geometry.matching import match
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target
from segrl.rewards.builtin.rules import check_setting, drop_duplicates
from segrl.rewards.registry import register_reward

__all__ = ["box_f1", "dual_granularity_mask", "format_reward"]

LOWEST_GIOU = -1.0
MeanOver = Literal["matched", "true_positives"]


@register_reward("format", needs_target=False, range=(0.0, 1.0), invariant=("box_order", "flip", "rescale"),
                 equation="1 if the text follows the grammar, else 0", source="CORE-Seg, r_fmt")  # fmt: skip
def format_reward(prediction: Prediction, target: Target) -> float:
    """Return 1.0 if the whole text follows the grammar and its answer holds the segmentation token, else 0.0.

    The ground truth is not read; see `segrl.predictions.parse_completion` for the grammar.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> text = '<answer>No lesion is visible.<seg></answer>'
        >>> format_reward(read_answer(text, CompletionFormat()), None)
        0.0
    """
    return float(prediction.valid)


@register_reward(
    "box_f1",
    range=(0.0, 1.0),
    empty={"both": 1.0, "prediction": 0.0, "target": 0.0},
    invariant=("box_order", "flip", "rescale"),
    monotone=("boxes",),
    equation="mean IoU of matched pairs · F1, F1 = 2 · TP / (N + M), TP: matched pairs with IoU > min_iou",
    source="CORE-Seg, r_bbox",
)
def box_f1(
    prediction: Prediction,
    target: Target,
    *,
    min_iou: float = 0.5,
    mean_over: MeanOver = "matched",
    require_valid: bool = True,
) -> float:
    """Return the mean IoU of the matched boxes times the F1 score of the boxes (CORE-Seg, r_bbox, Eq. 8).

    Boxes are matched one-to-one for the largest total IoU, as many pairs as the shorter list has boxes. A pair whose
    IoU exceeds `min_iou` is a true positive of precision and recall. A repeated box is never matched and lowers the
    precision.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        min_iou: IoU that a matched pair must exceed, in [0, 1). The paper is silent. Below 0.5 a box may be a true
            positive of a lesion that it hardly touches.
        mean_over: Pairs whose IoU is averaged: "matched", every one, as the equation is written, so that pairs with
            IoU 0.9 and 0.3 have a mean of 0.6; or only the "true_positives", the other reading of it.
        require_valid: Return 0.0 for an invalid text. The paper is silent.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `min_iou` is not in [0, 1).

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8], [12, 0, 16, 8]], "size": [16, 8]})
        >>> text = "<think>Dark.</think><answer>At [0, 0, 8, 6], [12, 0, 16, 2].<seg></answer>"
        >>> answer = read_answer(text, CompletionFormat("original_px"), target)  # IoU 0.75 and 0.25, F1 0.5
        >>> box_f1(answer, target), box_f1(answer, target, mean_over="true_positives")
        (0.25, 0.375)
    """
    check_setting(0 <= min_iou < 1, "min_iou", min_iou, "a number in [0, 1), such as 0.5")
    check_setting(mean_over in get_args(MeanOver), "mean_over", mean_over, "matched or true_positives")
    if require_valid and not prediction.valid:
        return 0.0
    n_pred, n_true = len(prediction.boxes), len(target.boxes)
    score = empty_score(n_pred == 0, n_true == 0)
    if score is not None:
        return score
    candidates = drop_duplicates(prediction.boxes, target.boxes)
    iou = pairwise_iou(prediction.boxes[candidates], target.boxes)
    matched = iou[match(-iou)]
    hits = matched > min_iou
    if not hits.any():
        return 0.0
    counted = matched if mean_over == "matched" else matched[hits]
    return float(counted.mean()) * 2 * int(hits.sum()) / (n_pred + n_true)


@register_reward(
    "dual_granularity_mask",
    needs_mask=True,
    range=lambda dice_weight, **_: (LOWEST_GIOU, 1.0 + dice_weight),
    empty=lambda dice_weight, **_: {"both": 1.0 + dice_weight, "prediction": LOWEST_GIOU, "target": LOWEST_GIOU},
    invariant=("box_order", "flip", "rescale"),
    equation="GIoU(box of predicted mask, box of true mask) if Dice < dice_threshold, else 1 + dice_weight · Dice",
    source="CORE-Seg, r_mask",
)
def dual_granularity_mask(
    prediction: Prediction,
    target: Target,
    *,
    dice_threshold: float = 0.05,
    dice_weight: float = 2.0,
    require_valid: bool = True,
) -> float:
    """Score a mask coarsely while it misses and finely once it overlaps (CORE-Seg, r_mask).

    Below `dice_threshold` the reward is the GIoU of the two masks' bounding boxes, which still measures how far off the
    mask is; from there on it is ``1 + dice_weight * Dice``. In GIoU, C is the smallest axis-parallel box that encloses
    both boxes, as Rezatofighi et al. define it; the paper's Eq. 10 calls it their convex hull, which is smaller where
    the boxes lie diagonally.

    Args:
        prediction: Mask in original pixels.
        target: True mask, of the same shape.
        dice_threshold: Dice from which the fine reward applies.
        dice_weight: Slope of the fine reward.
        require_valid: Return the lowest value for an invalid text. The paper is silent.

    Returns:
        A score in [-1, 1 + dice_weight]. No mask, or an empty mask on exactly one side, gives -1.0, which is the
        infimum of GIoU. Both masks empty: ``1 + dice_weight``.

    Raises:
        RewardError: If `dice_threshold` is not in [0, 1], or `dice_weight` negative or infinite.
        DataError: If the masks differ in shape.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 2, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> dual_granularity_mask(read_answer(text, CompletionFormat(), target, mask=mask), target)
        1.8
    """
    check_setting(0 <= dice_threshold <= 1, "dice_threshold", dice_threshold, "a number in [0, 1], such as 0.05")
    check_setting(0 <= dice_weight < math.inf, "dice_weight", dice_weight, "a finite number, 0 or more, such as 2")
    mask, ground_truth = prediction.mask, target.mask
    if mask is None or not prediction.has_seg or (require_valid and not prediction.valid):
        return LOWEST_GIOU
    if mask.shape != ground_truth.shape:
        raise DataError(
            f"the mask has shape {mask.shape}, but the ground truth {ground_truth.shape}; resize the prediction"
        )
    both = int(np.count_nonzero(mask & ground_truth))
    dice = 2 * both / (int(np.count_nonzero(mask)) + target.area) if both else 0.0
    if 0 < dice >= dice_threshold:
        return 1.0 + dice_weight * dice
    pred_box, true_box = mask_to_box(mask), target.mask_box
    if pred_box is None or true_box is None:
        return 1.0 + dice_weight if pred_box is None and true_box is None else LOWEST_GIOU
    return 1.0 if dice >= dice_threshold else float(giou(pred_box, true_box))
