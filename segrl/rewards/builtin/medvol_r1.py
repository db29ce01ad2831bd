"""The rewards of MedVol-R1: the answer names a key slice and gives the boxes on it; a frozen segmenter propagates them.

R = slice_format + slice_visibility + slice_boxes + propagated_dice, weight 1.0 each. The paper is silent on volumes
without foreground: there the right answer names no slice and no box (`{}`), which `slice_format` accepts unless
`allow_empty=False`. A slice that does not exist, or that was
not shown (`segrl.predictions.NOT_SHOWN`), scores like none.
"""

# D slices, H/W pixels, N predicted and M true boxes on the slice

from __future__ import annotations

from typing import Any

from segrl.errors import DataError
from segrl.metrics import overlap as metrics
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import VolumeTarget
from segrl.rewards.builtin.boxes import box_hungarian
from segrl.rewards.builtin.rules import ALL_INVARIANCES, BOTH_OR_NOTHING, JSON_ANSWERS, check_setting, json_answer
from segrl.rewards.registry import register_reward

__all__ = ["propagated_dice", "slice_boxes", "slice_format", "slice_visibility"]


@register_reward(
    "slice_format",
    completion_format=JSON_ANSWERS,
    needs_target=False,
    volume=True,
    range=(0.0, 1.0),
    invariant=ALL_INVARIANCES,
    equation="[valid text whose answer names a slice and a box in bbox_2d_list; or, with allow_empty, nothing at all]",
    source="MedVol-R1, R_f",
)
def slice_format(prediction: Prediction, target: Any, *, allow_empty: bool = True) -> float:
    """Return 1.0 for a valid text whose answer names a key slice and at least one box in `bbox_2d_list`, else 0.0.

    The answer is JSON, see `segrl.predictions.json_answers`. Whether the slice exists is not checked here: the other
    rewards score 0.0 for one that does not exist or was not shown.

    Args:
        prediction: Its status, slice and answer are read.
        target: Not read.
        allow_empty: Accept an answer that names neither a slice nor boxes (`{}`), the right one for a volume without
            foreground. The paper is silent on such volumes; False scores the answer 0.0.

    Returns:
        0.0 or 1.0; a slice without boxes, boxes without a slice, and boxes under another key 0.0.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> text = '<think>Dark.</think><answer>[]</answer>'
        >>> slice_format(read_answer(text, CompletionFormat(require_seg=False, answer_format="json")), None)
        1.0
    """
    if not prediction.valid:
        return 0.0
    if _says_nothing(prediction):
        return float(allow_empty)
    boxes = any(item is not None and item.get("bbox_2d_list") for item in json_answer(prediction).objects)
    return float(boxes and prediction.slice_index is not None)


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
    """Return the foreground area on the named slice, relative to the slice with the largest area.

    That slice is taken from the whole volume: if only some slices are shown and it is not among them, the best score is
    below 1, only slightly if the shown ones lie close together.

    Args:
        prediction: Its slice, counted from 0 in the whole volume, is read.
        target: True volume.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no slice, one that was not shown or one outside the volume 0.0. In a volume without
        foreground 1.0 for an answer that names neither slice nor boxes, else 0.0.

    Example:
        >>> import numpy as np
        >>> from segrl.predictions import CompletionFormat, VolumeTarget, read_answer
        >>> mask = np.zeros((4, 8, 8), dtype=bool)
        >>> mask[1, 2:6, 2:6] = mask[2, 2:6, 2:4] = True
        >>> target = VolumeTarget.from_mask(mask)
        >>> text = '<think>Dark.</think><answer>{"slice": 3, "bbox_2d_list": [[2, 2, 4, 4]]}</answer>'
        >>> json = CompletionFormat("original_px", require_seg=False, answer_format="json")
        >>> answer = read_answer(text, json, target)
        >>> slice_visibility(answer, target)
        0.5
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
    """Return the total IoU of the paired boxes on the named slice, divided by max(N, M).

    Args:
        prediction: Its slice, counted from 0 in the whole volume, and its boxes are read.
        target: True volume; the true boxes are those of the 8-connected components on the slice.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no slice, one that was not shown, one outside the volume, or one without foreground 0.0, so
        that naming an empty slice without boxes scores nothing. A volume without foreground as in `slice_visibility`.

    Example:
        >>> import numpy as np
        >>> from segrl.predictions import CompletionFormat, VolumeTarget, read_answer
        >>> mask = np.zeros((4, 8, 8), dtype=bool)
        >>> mask[1, 2:6, 2:6] = mask[2, 2:6, 2:4] = True
        >>> target = VolumeTarget.from_mask(mask)
        >>> text = '<think>Dark.</think><answer>{"slice": 3, "bbox_2d_list": [[2, 2, 4, 4]]}</answer>'
        >>> json = CompletionFormat("original_px", require_seg=False, answer_format="json")
        >>> answer = read_answer(text, json, target)
        >>> slice_boxes(answer, target)
        0.5
    """
    k = _slice(prediction, target, require_valid)
    if isinstance(k, float):
        return k
    on_slice = target.at(k)
    return 0.0 if on_slice.empty else box_hungarian(prediction, on_slice, require_valid=require_valid)


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
    """Return the Dice of the mask that a frozen segmenter propagates from the boxes, on slices near the named one.

    Args:
        prediction: Its slice, counted from 0 in the whole volume, and its mask (D, H, W) in original pixels are read.
        target: True volume of the same shape.
        delta: Slices on either side of the named one that count; at the ends of the volume there are fewer. The paper
            tries 2, 5, 10 and 15. The segmenter must propagate as far; slices beyond its reach count as empty.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no slice, one that was not shown, one outside the volume, or no mask 0.0. Slices without
        foreground around the named one 0.0 whatever the mask, so that naming a distant slice without boxes scores
        nothing. In a volume without foreground 1.0 for an answer that names neither slice nor boxes and whose mask is
        missing or empty, else 0.0.

    Raises:
        RewardError: If `delta` is not a whole number of 0 or more.
        DataError: If the mask has another shape than the ground truth.

    Example:
        >>> import numpy as np
        >>> from segrl.predictions import CompletionFormat, VolumeTarget, read_answer
        >>> mask = np.zeros((4, 8, 8), dtype=bool)
        >>> mask[1, 2:6, 2:6] = mask[2, 2:6, 2:4] = True
        >>> target = VolumeTarget.from_mask(mask)
        >>> text = '<think>Dark.</think><answer>{"slice": 3, "bbox_2d_list": [[2, 2, 4, 4]]}</answer>'
        >>> json = CompletionFormat("original_px", require_seg=False, answer_format="json")
        >>> answer = read_answer(text, json, target, mask=mask & (np.arange(8) < 4))
        >>> propagated_dice(answer, target)
        0.8
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
    """Return the index of the named slice, or the score (a float) if there is none."""
    if require_valid and not prediction.valid:
        return 0.0
    if target.empty:
        return float(_says_nothing(prediction))
    k = prediction.slice_index
    return k if k is not None and 0 <= k < target.depth else 0.0  # NOT_SHOWN is negative
