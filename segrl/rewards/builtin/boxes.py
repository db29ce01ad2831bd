"""Rewards for boxes in original pixels, paired one-to-one; see `segrl.rewards.builtin.rules` for what all share.

N predicted boxes, M true ones. Unless said otherwise a reward is the total over the pairs divided by max(N, M), so a
box too many costs as much as a box too few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from segrl.geometry.boxes import pairwise_giou, pairwise_iou
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target
from segrl.rewards.builtin.rules import (
    ALL_INVARIANCES,
    BOTH_OR_NOTHING,
    JSON_ANSWERS,
    check_setting,
    drop_duplicates,
    max_assignment,
    trivial_score,
)
from segrl.rewards.registry import register_reward

__all__ = ["box_ap", "box_confidence", "box_count", "box_giou", "box_hungarian", "box_iou", "box_l1"]

COCO_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@register_reward(
    "box_iou",
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=lambda several, **_: ("boxes",) if several == "matched" else (),
    equation="Σ IoU^power / max(N, M); with threshold Σ [IoU > threshold] / max(N, M)",
    source="VLM-R1 (IoU), Seg-Zero (IoU > 0.5), LENS (IoU²)",
)
def box_iou(
    prediction: Prediction,
    target: Target,
    *,
    threshold: float | None = None,
    power: float = 1.0,
    several: Literal["matched", "hull"] = "matched",
    require_valid: bool = True,
) -> float:
    """Mean IoU of the boxes, or the share of boxes that are right.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        threshold: IoU that a pair must exceed to be right; None pays the IoU itself.
        power: Exponent of the IoU (LENS: 2); without a threshold only.
        several: "matched" pairs the boxes one-to-one for the largest reward; "hull" compares the box around all
            predicted boxes with the box around all true ones, whatever their number.
        require_valid: Pay 0.0 for boxes of a text that is not valid.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `threshold` is not in [0, 1), `power` not positive, or `several` does not exist.
    """
    check_setting(threshold is None or 0 <= threshold < 1, "threshold", threshold, "None or a number in [0, 1)")
    check_setting(power > 0, "power", power, "a positive number")
    check_setting(several in ("matched", "hull"), "several", several, "'matched' or 'hull'")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    pred, true = prediction.boxes, target.boxes
    if several == "hull":
        pred, true = _hull(pred), _hull(true)
    iou = _iou(pred, true)
    gain = iou**power if threshold is None else iou > threshold
    return max_assignment(gain) / max(len(pred), len(true))


@register_reward(
    "box_giou",
    range=(-1.0, 1.0),
    empty={"both": 1.0, "prediction": -1.0, "truth": -1.0},
    invariant=ALL_INVARIANCES,
    monotone=("boxes",),
    equation="(Σ GIoU − |N − M|) / max(N, M)",
    source="Rezatofighi et al. 2019",
)
def box_giou(prediction: Prediction, target: Target, *, require_valid: bool = True) -> float:
    """Mean generalised IoU of the boxes, which also says how far off a box is that misses.

    Boxes are paired for the largest total GIoU. A box without a partner counts -1, the limit of far boxes.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        require_valid: Pay -1.0 for boxes of a text that is not valid.

    Returns:
        A score in [-1, 1]; no predicted and no true box 1.0, boxes on exactly one side -1.0.
    """
    score = trivial_score(prediction, len(target.boxes), require_valid=require_valid, lowest=-1.0)
    if score is not None:
        return score
    pred, true = prediction.boxes, target.boxes
    gain = pairwise_giou(pred[drop_duplicates(pred, true)], true) + 1  # above that of no partner
    return max_assignment(gain) / max(len(pred), len(true)) - 1


@register_reward(
    "box_l1",
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order", "flip"),
    monotone=("boxes",),
    equation="Σ [mean |Δ coordinate| < within_px] / max(N, M); graded: Σ max(0, 1 − mean |Δ| / within_px) / max(N, M)",
    source="Seg-Zero and VisionReasoner, box L1 reward",
)
def box_l1(
    prediction: Prediction,
    target: Target,
    *,
    within_px: float = 10.0,
    graded: bool = False,
    resized_to: int | None = None,
    require_valid: bool = True,
) -> float:
    """Share of boxes whose coordinates are off by less than some pixels, on average over the four.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        within_px: Mean distance that a pair must stay below.
        graded: Pay a pair linearly less with its distance, instead of 1 or 0.
        resized_to: Measure as if the image had been resized to a square with this edge, as Seg-Zero's and
            VisionReasoner's data are (840); None measures in original pixels.
        require_valid: Pay 0.0 for boxes of a text that is not valid.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `within_px` or `resized_to` is not positive.
    """
    check_setting(within_px > 0, "within_px", within_px, "a positive number of pixels")
    check_setting(resized_to is None or resized_to > 0, "resized_to", resized_to, "None or a positive edge in pixels")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    pred, true = prediction.boxes, target.boxes
    scale = 1.0 if resized_to is None else resized_to / np.array([target.width, target.height] * 2)
    kept = pred[drop_duplicates(pred, true)]
    distance = np.abs((kept[:, None] - true[None]) * scale).mean(axis=2)
    return max_assignment(closeness(distance, within_px, graded)) / max(len(pred), len(true))


@register_reward(
    "box_count",
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("boxes",),
    equation="[N = M]; graded: max(0, 1 − |N − M| / max(N, M))",
    source="",
)
def box_count(prediction: Prediction, target: Target, *, graded: bool = False, require_valid: bool = True) -> float:
    """Pay for the right number of boxes, wherever they are.

    A repeated box is a mistake of its own: it cannot make up for a missing one.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        graded: Pay less the more boxes are missing or too many, instead of 1 or 0.
        require_valid: Pay 0.0 for boxes of a text that is not valid.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.
    """
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    said, wanted = len(prediction.boxes), len(target.boxes)
    different = len(drop_duplicates(prediction.boxes, target.boxes))
    mistakes = abs(different - wanted) + said - different
    return max(0.0, 1 - mistakes / max(said, wanted)) if graded else float(mistakes == 0)


@register_reward(
    "box_hungarian",
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("boxes",),
    equation="max: Σ IoU / max(N, M); f_beta: (1 + β²) Σ IoU / (N + β² M)",
    source="MedVol-R1, R_s (max); panoptic quality (f_beta, min_iou 0.5)",
)
def box_hungarian(
    prediction: Prediction,
    target: Target,
    *,
    mode: Literal["max", "f_beta"] = "max",
    beta: float = 1.0,
    min_iou: float = 0.0,
    require_valid: bool = True,
) -> float:
    """Total IoU of the paired boxes, divided by their number.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        mode: "max" divides by max(N, M). "f_beta" is the F score of Σ IoU / N (precision) and Σ IoU / M (recall);
            with `beta=1` it divides by the mean of N and M, and with `min_iou=0.5` it is the panoptic quality.
        beta: Below 1 weights precision, above 1 recall.
        min_iou: IoU that a pair must exceed to count.
        require_valid: Pay 0.0 for boxes of a text that is not valid.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `mode` does not exist, `beta` is not positive or `min_iou` not in [0, 1).
    """
    check_setting(mode in ("max", "f_beta"), "mode", mode, "'max' or 'f_beta'")
    check_setting(beta > 0, "beta", beta, "a positive number")
    check_setting(0 <= min_iou < 1, "min_iou", min_iou, "a number in [0, 1)")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    said, wanted = len(prediction.boxes), len(target.boxes)
    iou = _iou(prediction.boxes, target.boxes)
    total = max_assignment(np.where(iou > min_iou, iou, 0.0))
    return total / max(said, wanted) if mode == "max" else (1 + beta**2) * total / (said + beta**2 * wanted)


@register_reward(
    "box_ap",
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("flip", "rescale"),
    equation="mean over thresholds of Σ_k max precision at recall ≥ k/M, / M; with count_penalty · min(1, M / N)",
    source="COCO; VLM-R1, odLength",
)
def box_ap(
    prediction: Prediction,
    target: Target,
    *,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    count_penalty: bool = True,
    require_valid: bool = True,
) -> float:
    """Average precision of the boxes of one image, without classes.

    Boxes are ranked by confidence, or by their order in the text without confidences or where those are equal. In this
    order each takes the free true box with the largest IoU, if that reaches the threshold. The area under the
    precision envelope is exact; COCO samples it at 101 points, which differs by at most 0.01.

    Args:
        prediction: Boxes in original pixels, and their confidences.
        target: True boxes in original pixels.
        thresholds: IoU that a pair must reach; the result is the mean over them.
        count_penalty: Multiply by M / N if there are more boxes than true ones. Average precision alone lets boxes
            below the last hit pass for free, so that a grid of boxes pays.
        require_valid: Pay 0.0 for boxes of a text that is not valid.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `thresholds` is empty or not in (0, 1].
    """
    given = [] if isinstance(thresholds, int | float) else list(thresholds)
    check_setting(bool(given) and all(0 < t <= 1 for t in given), "thresholds", thresholds, "numbers in (0, 1]")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    said, wanted = len(prediction.boxes), len(target.boxes)
    if said == 0:
        return 0.0
    confidence = np.zeros(said) if prediction.scores is None else prediction.scores
    ranked = prediction.boxes[np.argsort(-confidence, kind="stable")]
    iou = _iou(ranked, target.boxes)
    mean = sum(_average_precision(iou, threshold) for threshold in given) / len(given)
    return mean * min(1.0, wanted / said) if count_penalty else mean


@register_reward(
    "box_confidence",
    completion_format=JSON_ANSWERS,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=ALL_INVARIANCES,
    monotone=("boxes",),
    equation="max(0, Σ_hit c − Σ_miss c) / max(N, M)",
    source="Visual-RFT, confidence reward",
)
def box_confidence(
    prediction: Prediction, target: Target, *, threshold: float = 0.5, require_valid: bool = True
) -> float:
    """Pay for being confident of the boxes that hit, and only of those.

    A box that hits a true one earns its confidence c, any other loses its own. Visual-RFT pays 1 − c for a miss, so
    that a wrong box with confidence 0 earns as much as a right one; here it earns nothing.

    Args:
        prediction: Boxes in original pixels, and their confidences.
        target: True boxes in original pixels.
        threshold: IoU that a hit must exceed. Boxes are paired for the largest total confidence.
        require_valid: Pay 0.0 for boxes of a text that is not valid.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side or without confidences 0.0.

    Raises:
        RewardError: If `threshold` is not in [0, 1).
    """
    check_setting(0 <= threshold < 1, "threshold", threshold, "a number in [0, 1)")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    if prediction.scores is None:
        return 0.0
    kept = drop_duplicates(prediction.boxes, target.boxes, prediction.scores)
    hits = pairwise_iou(prediction.boxes[kept], target.boxes) > threshold
    right = max_assignment(hits * prediction.scores[kept, None])
    wrong = float(prediction.scores.sum()) - right
    return max(0.0, right - wrong) / max(len(prediction.boxes), len(target.boxes))


def closeness(distance: np.ndarray, within_px: float, graded: bool) -> np.ndarray:
    """What pairs at these distances are worth: 1 below `within_px` and 0 else, or linearly less up to it."""
    return np.maximum(0.0, 1 - distance / within_px) if graded else (distance < within_px).astype(np.float64)


def _iou(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(N, M) IoU; 0 in the rows of repeated boxes, which have no partner."""
    iou = np.zeros((len(pred), len(true)))
    kept = drop_duplicates(pred, true)
    iou[kept] = pairwise_iou(pred[kept], true)
    return iou


def _hull(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])[None] if len(boxes) else boxes


def _average_precision(iou: np.ndarray, threshold: float) -> float:
    """Average precision of boxes ranked by row, with (N, M) IoU."""
    left = np.where(iou >= threshold, iou, 0.0)
    hits: list[int] = []  # ranks of the boxes that hit, counted from 0
    while len(hits) < left.shape[1]:
        start = hits[-1] + 1 if hits else 0
        candidates = np.flatnonzero(left[start:].any(axis=1))
        if len(candidates) == 0:
            break
        rank = start + int(candidates[0])
        left[:, np.argmax(left[rank])] = 0.0
        hits.append(rank)
    precision = np.arange(1, len(hits) + 1) / (np.array(hits, dtype=np.int64) + 1)
    envelope = np.maximum.accumulate(precision[::-1])
    return float(envelope.sum()) / iou.shape[1]
