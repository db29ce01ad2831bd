"""Rewards for masks in original pixels: how much of them agrees, and how well their outlines do.

All of them are in [0, 1] and follow two rules. An answer without a mask or without the segmentation token earns 0.0,
and so does an invalid text (unless `require_valid=False`). Empty masks follow `segrl.geometry.empty_score`: an empty
mask of an empty truth earns 1.0, an empty mask on exactly one side 0.0. Masks of different sizes are an error.
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
    """IoU of the masks, or a power of it.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        power: Positive exponent; 2 pays little for a rough mask and more for the last improvements.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `power` is not positive.
        DataError: If the masks differ in shape.
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
    """Dice coefficient of the masks.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        DataError: If the masks differ in shape.
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
    """Dice of the foreground probabilities, which also pays for being sure; of the mask where there are none.

    Args:
        prediction: Mask in original pixels, and its probabilities if the trainer keeps them. A mask without foreground
            is empty whatever its probabilities.
        target: True mask of the same shape.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        DataError: If the masks differ in shape, or a probability is not in [0, 1].
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
    """IoU of the rims of the masks, which large lesions do not win by their inside.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        dilation: Width of the rim as a positive share of the image's diagonal; see `segrl.metrics.boundary_iou`.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `dilation` is not positive.
        DataError: If the masks differ in shape.
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
    """Structure-measure of the mask: does it have the shape of the truth, as a whole and in parts?

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        alpha: Weight of the object part, in [0, 1]; see `segrl.metrics.s_measure`.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `alpha` is not in [0, 1].
        DataError: If the masks differ in shape.
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
    """Closeness of the outlines: 1.0 if they are the same, 0.0 from a distance on.

    The distance is the larger of the two directed 95th percentiles; see `segrl.metrics.hausdorff`.

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        limit: Distance from which nothing is paid, as a positive share of the image's diagonal.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0 (the distance is infinite), no mask 0.0.

    Raises:
        RewardError: If `limit` is not positive.
        DataError: If the masks differ in shape.
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
    """Share of the outlines that agree up to a tolerance (normalised surface distance, surface Dice).

    Args:
        prediction: Mask in original pixels.
        target: True mask of the same shape.
        tolerance_px: Largest distance that counts as agreement, in original pixels; see `segrl.metrics.surface_dice`.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; both masks empty 1.0, exactly one empty 0.0, no mask 0.0.

    Raises:
        RewardError: If `tolerance_px` is negative.
        DataError: If the masks differ in shape.
    """
    check_setting(0 <= tolerance_px < math.inf, "tolerance_px", tolerance_px, "a number of pixels, such as 2")
    mask = _scored_mask(prediction, require_valid)
    return 0.0 if mask is None else surfaces.surface_dice(mask, target.mask, tolerance_px)


def _scored_mask(prediction: Prediction, require_valid: bool) -> np.ndarray | None:
    """The mask, or None where the lowest value is due whatever the mask is."""
    if not prediction.has_seg or (require_valid and not prediction.valid):
        return None
    return prediction.mask
