"""Rewards for masks in original pixels, by overlap and by agreement of the outlines.

All of them are in [0, 1]. An answer without a mask or without the segmentation token scores 0.0, and so does an invalid
text (unless `require_valid=False`). Empty masks follow `segrl.geometry.empty_score`: 1.0 if both are empty, 0.0 if
exactly one is. Masks of different sizes are an error.
"""

from __future__ import annotations

import math

import numpy as np

from segrl.geometry.masks import empty_score
from segrl.metrics import overlap as metrics
from segrl.metrics import structure, surfaces
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target
from segrl.rewards.builtin.rules import ALL_INVARIANCES, BOTH_OR_NOTHING, check_setting
from segrl.rewards.registry import register_reward

__all__ = ["boundary_iou", "hd95", "mask_dice", "mask_iou", "nsd", "s_measure", "soft_dice"]


@register_reward(
    "mask_iou",
    needs_mask=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("mask",),
    equation="IoU^power, IoU = |P ∩ T| / |P ∪ T|",
    source="Jaccard index; squared in LENS",
)
def mask_iou(prediction: Prediction, target: Target, *, power: float = 1.0, require_valid: bool = True) -> float:
    """Return the IoU of the masks, or a power of it.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        power: Positive exponent; 2 scores a rough mask low and rewards the last improvements more.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `power` is not positive.
        DataError: If the masks differ in shape.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 4, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> mask_iou(read_answer(text, CompletionFormat(), target, mask=mask), target, power=2)
        0.25
    """
    check_setting(0 < power < math.inf, "power", power, "a positive number, such as 1 or 2")
    mask = _scored_mask(prediction, require_valid)
    return 0.0 if mask is None else metrics.iou(mask, target.mask) ** power


@register_reward(
    "mask_dice",
    needs_mask=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("mask",),
    equation="2 · |P ∩ T| / (|P| + |T|)",
    source="Dice coefficient",
)
def mask_dice(prediction: Prediction, target: Target, *, require_valid: bool = True) -> float:
    """Return the Dice coefficient of the masks.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        DataError: If the masks differ in shape.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 2, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> mask_dice(read_answer(text, CompletionFormat(), target, mask=mask), target)
        0.4
    """
    mask = _scored_mask(prediction, require_valid)
    return 0.0 if mask is None else metrics.dice(mask, target.mask)


@register_reward(
    "soft_dice",
    needs_mask=True,
    needs_probability=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("mask",),
    equation="2 · Σ pT / (Σ p + Σ T), p: foreground probabilities",
    source="Milletari et al. 2016, without squares",
)
def soft_dice(prediction: Prediction, target: Target, *, require_valid: bool = True) -> float:
    """Return the Dice of the foreground probabilities, or of the mask if there are none.

    Args:
        prediction: Mask in original pixels, and its probabilities if the trainer keeps them. A mask without foreground
            is empty whatever its probabilities.
        target: True mask of the same shape.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        DataError: If the masks differ in shape, or a probability is not in [0, 1].

    Example:
        >>> import numpy as np
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 4, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> answer = read_answer(text, CompletionFormat(), target, mask=mask, probability=np.where(mask, 0.75, 0.0))
        >>> round(soft_dice(answer, target), 4)
        0.5455
    """
    mask = _scored_mask(prediction, require_valid)
    if mask is None:
        return 0.0
    if prediction.probability is None:
        return metrics.dice(mask, target.mask)
    score = structure.soft_dice(prediction.probability, target.mask)
    empty = empty_score(not mask.any(), target.empty)
    return score if empty is None else empty


@register_reward(
    "boundary_iou",
    needs_mask=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order", "flip"),
    equation="IoU of rims; rim: foreground within max(1, round(dilation · diagonal)) px of the background",
    source="Cheng et al. 2021, Boundary IoU",
)
def boundary_iou(
    prediction: Prediction, target: Target, *, dilation: float = 0.02, require_valid: bool = True
) -> float:
    """Return the IoU of the boundaries of the masks, to which the inside of a large lesion contributes nothing.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        dilation: Width of the rim as a positive share of the image's diagonal; see `segrl.metrics.boundary_iou`.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `dilation` is not positive.
        DataError: If the masks differ in shape.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 4, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> round(boundary_iou(read_answer(text, CompletionFormat(), target, mask=mask), target), 4)
        0.4118
    """
    check_setting(0 < dilation < math.inf, "dilation", dilation, "a positive share of the diagonal, such as 0.02")
    mask = _scored_mask(prediction, require_valid)
    return 0.0 if mask is None else surfaces.boundary_iou(mask, target.mask, dilation)


@register_reward(
    "s_measure",
    needs_mask=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order",),
    equation="alpha · S_object + (1 − alpha) · S_region",
    source="Fan et al. 2017, Structure-measure; Seg-R1",
)
def s_measure(prediction: Prediction, target: Target, *, alpha: float = 0.5, require_valid: bool = True) -> float:
    """Return the structure-measure of the mask, its similarity in shape as a whole and by regions.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        alpha: Weight of the object part, in [0, 1]; see `segrl.metrics.s_measure`.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `alpha` is not in [0, 1].
        DataError: If the masks differ in shape.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 4, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> round(s_measure(read_answer(text, CompletionFormat(), target, mask=mask), target), 4)
        0.3925
    """
    check_setting(0 <= alpha <= 1, "alpha", alpha, "a number in [0, 1]")
    mask = _scored_mask(prediction, require_valid)
    return 0.0 if mask is None else structure.s_measure(mask, target.mask, alpha)


@register_reward(
    "hd95",
    needs_mask=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order", "flip"),
    equation="1 − min(HD95 / (limit · image diagonal), 1)",
    source="95th percentile of the Hausdorff distance; the map to [0, 1] is segrl's",
)
def hd95(prediction: Prediction, target: Target, *, limit: float = 0.1, require_valid: bool = True) -> float:
    """Return the closeness of the outlines: 1.0 if they coincide, 0.0 from a distance on.

    The distance is the larger of the two directed 95th percentiles; see `segrl.metrics.hausdorff`.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        limit: Distance from which the score is 0, as a positive share of the image's diagonal.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0 (the distance is infinite), no mask 0.0.

    Raises:
        RewardError: If `limit` is not positive.
        DataError: If the masks differ in shape.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 4, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> round(hd95(read_answer(text, CompletionFormat(), target, mask=mask), target, limit=0.5), 4)
        0.5528
    """
    check_setting(0 < limit < math.inf, "limit", limit, "a positive share of the image's diagonal, such as 0.1")
    mask = _scored_mask(prediction, require_valid)
    if mask is None:
        return 0.0
    farthest = limit * math.hypot(target.height, target.width)
    return 1.0 - min(surfaces.hausdorff(mask, target.mask, 95.0) / farthest, 1.0)


@register_reward(
    "nsd",
    needs_mask=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order", "flip"),
    equation="share of the pixels of both outlines within tolerance_px of the other outline",
    source="Nikolov et al. 2018, surface Dice; pixels count as in MONAI",
)
def nsd(prediction: Prediction, target: Target, *, tolerance_px: float = 2.0, require_valid: bool = True) -> float:
    """Return the share of the outlines that agree within a tolerance (normalised surface distance, surface Dice).

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        tolerance_px: Largest distance that counts as agreement, in original pixels; see `segrl.metrics.surface_dice`.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `tolerance_px` is negative.
        DataError: If the masks differ in shape.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> mask = read_target({"boxes": [[0, 0, 4, 8]], "size": [16, 8]}).mask
        >>> text = "<think>Dark.</think><answer>It is here.<seg></answer>"
        >>> nsd(read_answer(text, CompletionFormat(), target, mask=mask), target)
        0.75
    """
    check_setting(0 <= tolerance_px < math.inf, "tolerance_px", tolerance_px, "a number of pixels, such as 2")
    mask = _scored_mask(prediction, require_valid)
    return 0.0 if mask is None else surfaces.surface_dice(mask, target.mask, tolerance_px)


def _scored_mask(prediction: Prediction, require_valid: bool) -> np.ndarray | None:
    """Return the mask, or None if the score is 0.0 whatever the mask is."""
    if not prediction.has_seg or (require_valid and not prediction.valid):
        return None
    return prediction.mask
