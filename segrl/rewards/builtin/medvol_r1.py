"""The rewards of MedVol-R1: the answer names a key slice and gives the boxes on it; a frozen segmenter propagates them.

R = slice_format + slice_visibility + slice_boxes + propagated_dice, weight 1.0 each. The paper is silent on volumes
without foreground: there the right answer names no slice and no box (`{}`). A slice that does not exist, or that was
not shown (`segrl.predictions.NOT_SHOWN`), is paid like none.
"""

# D slices, H/W pixels, N predicted and M true boxes on the slice

from __future__ import annotations

from typing import Any

from segrl.errors import DataError
from segrl.metrics import overlap as metrics
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import VolumeTarget
from segrl.rewards.builtin.boxes import box_hungarian
from segrl.rewards.builtin.rules import ALL_INVARIANCES, BOTH_OR_NOTHING, JSON_ANSWERS, check_setting
from segrl.rewards.registry import register_reward

__all__ = ["propagated_dice", "slice_boxes", "slice_format", "slice_visibility"]


@register_reward(
    "slice_format",
    completion_format=JSON_ANSWERS,
    needs_truth=False,
    volume=True,
    range=(0.0, 1.0),
    invariant=ALL_INVARIANCES,
    equation="[valid text whose answer names a slice, or nothing at all]",
    source="MedVol-R1, R_f",
)
def slice_format(prediction: Prediction, target: Any) -> float:
    """Pay for a valid text whose answer names a key slice.

    The answer is JSON, see `segrl.predictions.json_answers`. Whether the slice exists is not checked here: the other
    rewards pay nothing for one that does not, or that was not shown.

    Args:
        prediction: Its status and slice are read.
        target: Not read.

    Returns:
        1.0 for a valid text that names a slice, or neither a slice nor boxes; else 0.0, also for boxes without a slice.
    """
    return float(prediction.valid and (prediction.slice_index is not None or _says_nothing(prediction)))


@register_reward(
    "slice_visibility",
    completion_format=JSON_ANSWERS,
    volume=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    equation="F_k / max_t F_t, F the foreground area of a slice",
    source="MedVol-R1, R_a",
)
def slice_visibility(prediction: Prediction, target: VolumeTarget, *, require_valid: bool = True) -> float:
    """Foreground area on the named slice, relative to the slice with most of it.

    The largest slice is that of the whole volume: where only some slices are shown and it is not among them, the best
    score is below 1, a little if the shown ones lie close together.

    Args:
        prediction: Its slice, counted from 0 in the whole volume, is read.
        target: True volume.
        require_valid: Pay 0.0 for a text that is not valid.

    Returns:
        A score in [0, 1]; no slice, one that was not shown or one outside the volume 0.0. In a volume without
        foreground 1.0 for an answer that names neither slice nor boxes, else 0.0.
    """
    k = _slice(prediction, target, require_valid)
    return k if isinstance(k, float) else float(target.slice_areas[k] / target.slice_areas.max())


@register_reward(
    "slice_boxes",
    completion_format=JSON_ANSWERS,
    volume=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("boxes",),
    equation="Σ IoU / max(N, M) on the named slice",
    source="MedVol-R1, R_s",
)
def slice_boxes(prediction: Prediction, target: VolumeTarget, *, require_valid: bool = True) -> float:
    """Total IoU of the paired boxes on the named slice, divided by max(N, M).

    Args:
        prediction: Its slice, counted from 0 in the whole volume, and its boxes are read.
        target: True volume; the true boxes are those of the 8-connected components on the slice.
        require_valid: Pay 0.0 for a text that is not valid.

    Returns:
        A score in [0, 1]; no slice, one that was not shown, one outside the volume, or one without foreground 0.0, so
        that naming an empty slice with no boxes does not pay. A volume without foreground as in `slice_visibility`.
    """
    k = _slice(prediction, target, require_valid)
    if isinstance(k, float):
        return k
    truth = target.at(k)
    return 0.0 if truth.empty else box_hungarian(prediction, truth, require_valid=require_valid)


@register_reward(
    "propagated_dice",
    completion_format=JSON_ANSWERS,
    needs_mask=True,
    volume=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("mask",),
    equation="2 · |P ∩ T| / (|P| + |T|) over the slices |t − k| ≤ delta around the named slice k",
    source="MedVol-R1, R_c",
)
def propagated_dice(
    prediction: Prediction, target: VolumeTarget, *, delta: int = 5, require_valid: bool = True
) -> float:
    """Dice of the mask that a frozen segmenter propagates from the boxes, on the slices around the named one.

    Args:
        prediction: Its slice, counted from 0 in the whole volume, and its mask (D, H, W) in original pixels are read.
        target: True volume of the same shape.
        delta: Slices on either side of the named one that count; at the ends of the volume there are fewer. The paper
            tries 2, 5, 10 and 15. Let the segmenter reach as far, or what it could not reach is missing.
        require_valid: Pay 0.0 for the mask of a text that is not valid.

    Returns:
        A score in [0, 1]; no slice, one that was not shown, one outside the volume, or no mask 0.0. Slices without
        foreground around the named one 0.0 whatever the mask, so that naming a slice far from everything with no boxes
        does not pay. In a volume without foreground 1.0 for an answer that names neither slice nor boxes and whose mask
        is missing or empty, else 0.0.

    Raises:
        RewardError: If `delta` is not a whole number of 0 or more.
        DataError: If the mask has another shape than the truth.
    """
    whole = isinstance(delta, int) and not isinstance(delta, bool) and delta >= 0
    check_setting(whole, "delta", delta, "a whole number of slices, 0 or more, such as 5")
    mask = prediction.mask
    if mask is not None and mask.shape != target.mask.shape:
        raise DataError(
            f"the mask has the shape {mask.shape}; expected {target.mask.shape}, (slices, height, width) of the volume"
        )
    k = _slice(prediction, target, require_valid)
    if isinstance(k, float):
        return k if mask is None or not mask.any() else 0.0
    around = slice(max(k - delta, 0), k + delta + 1)
    if mask is None or not target.slice_areas[around].any():
        return 0.0
    return metrics.dice(mask[around], target.mask[around])


def _says_nothing(prediction: Prediction) -> bool:
    return prediction.slice_index is None and len(prediction.boxes) + len(prediction.points) == 0


def _slice(prediction: Prediction, target: VolumeTarget, require_valid: bool) -> int | float:
    """The named slice, or the score (a float) where there is none to look at."""
    if require_valid and not prediction.valid:
        return 0.0
    if target.empty:
        return float(_says_nothing(prediction))
    k = prediction.slice_index
    return k if k is not None and 0 <= k < target.depth else 0.0  # NOT_SHOWN is negative
