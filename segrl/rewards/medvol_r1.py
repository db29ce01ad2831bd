"""The text rewards of MedVol-R1: the answer names a key slice and gives the boxes on it.

R = slice_format + slice_visibility + slice_boxes, weight 1.0 each, without the reward of the propagated mask. The paper
is silent on volumes without foreground: there the right answer names no slice and no box (`{}`).
"""

# D slices, N predicted and M true boxes on the slice

from __future__ import annotations

from typing import Any

from segrl.prediction import Prediction, VolumeTarget
from segrl.rewards.boxes import box_hungarian
from segrl.rewards.registry import register_reward
from segrl.rewards.rules import ALL_INVARIANCES, BOTH_OR_NOTHING, JSON_ANSWERS

__all__ = ["slice_boxes", "slice_format", "slice_visibility"]


@register_reward(
    "slice_format",
    reading=JSON_ANSWERS,
    needs_truth=False,
    volume=True,
    range=(0.0, 1.0),
    invariant=ALL_INVARIANCES,
    equation="[valid text whose answer names a slice, or nothing at all]",
    source="MedVol-R1, R_f",
)
def slice_format(prediction: Prediction, target: Any) -> float:
    """Pay for a valid text whose answer names a key slice.

    The answer is JSON, see `segrl.json_answers`. Whether the slice exists is not checked here: the other two rewards
    pay nothing for one that does not.

    Args:
        prediction: Its status and slice are read.
        target: Not read.

    Returns:
        1.0 for a valid text that names a slice, or neither a slice nor boxes; else 0.0, also for boxes without a slice.
    """
    return float(prediction.valid and (prediction.slice_index is not None or _says_nothing(prediction)))


@register_reward(
    "slice_visibility",
    reading=JSON_ANSWERS,
    volume=True,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    equation="F_k / max_t F_t, F the foreground area of a slice",
    source="MedVol-R1, R_a",
)
def slice_visibility(prediction: Prediction, target: VolumeTarget, *, require_valid: bool = True) -> float:
    """Foreground area on the named slice, relative to the slice with most of it.

    Args:
        prediction: Its slice, counted from 0, is read.
        target: True volume.
        require_valid: Pay 0.0 for a text that is not valid.

    Returns:
        A score in [0, 1]; no slice or one outside the volume 0.0. In a volume without foreground 1.0 for an answer that
        names neither slice nor boxes, else 0.0.
    """
    k = _slice(prediction, target, require_valid)
    return k if isinstance(k, float) else float(target.slice_areas[k] / target.slice_areas.max())


@register_reward(
    "slice_boxes",
    reading=JSON_ANSWERS,
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
        prediction: Its slice, counted from 0, and its boxes are read.
        target: True volume; the true boxes are those of the 8-connected components on the slice.
        require_valid: Pay 0.0 for a text that is not valid.

    Returns:
        A score in [0, 1]; no slice, one outside the volume, or one without foreground 0.0, so that naming an empty
        slice with no boxes does not pay. A volume without foreground as in `slice_visibility`.
    """
    k = _slice(prediction, target, require_valid)
    if isinstance(k, float):
        return k
    truth = target.at(k)
    return 0.0 if truth.empty else box_hungarian(prediction, truth, require_valid=require_valid)


def _says_nothing(prediction: Prediction) -> bool:
    return prediction.slice_index is None and len(prediction.boxes) + len(prediction.points) == 0


def _slice(prediction: Prediction, target: VolumeTarget, require_valid: bool) -> int | float:
    """The named slice, or the score (a float) where there is none to look at."""
    if require_valid and not prediction.valid:
        return 0.0
    if target.empty:
        return float(_says_nothing(prediction))
    k = prediction.slice_index
    return k if k is not None and 0 <= k < target.depth else 0.0
