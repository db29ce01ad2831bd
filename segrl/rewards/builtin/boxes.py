"""Rewards for boxes in original pixels, paired one-to-one by the rules of `segrl.rewards.builtin.rules`.

N predicted boxes, M true ones. Unless stated otherwise a reward is the total over the pairs divided by max(N, M), so
that an extra box lowers it as much as a missing one.
"""

from __future__ import annotations

import math
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
    """Return the mean IoU of the boxes, or the share of boxes that exceed an IoU.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        threshold: IoU that a pair must exceed to score 1; None scores it by its IoU.
        power: Exponent of the IoU (LENS: 2), without a threshold only.
        several: "matched" pairs the boxes one-to-one for the largest score; "hull" compares the box around all
            predicted boxes with the box around all true ones, whatever their number.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `threshold` is not in [0, 1), `power` not positive, or `several` does not exist.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> text = "<think>Dark.</think><answer>At [0, 0, 8, 4].<seg></answer>"
        >>> box_iou(read_answer(text, CompletionFormat("original_px"), target), target)
        0.5
    """
    check_setting(threshold is None or 0 <= threshold < 1, "threshold", threshold, "None or a number in [0, 1)")
    check_setting(0 < power < math.inf, "power", power, "a positive number")
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
    empty={"both": 1.0, "prediction": -1.0, "target": -1.0},
    invariant=ALL_INVARIANCES,
    monotone=("boxes",),
    equation="(Σ GIoU − |N − M|) / max(N, M)",
    source="Rezatofighi et al. 2019",
)
def box_giou(prediction: Prediction, target: Target, *, require_valid: bool = True) -> float:
    """Return the mean generalised IoU of the boxes, which also measures how far off a missing box is.

    Boxes are paired for the largest total GIoU. A box without a partner counts -1, the limit for distant boxes.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        require_valid: Return -1.0 for an invalid text.

    Returns:
        A score in [-1, 1]; no predicted and no true box 1.0, boxes on exactly one side -1.0.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 4, 8]], "size": [16, 8]})
        >>> text = "<think>Dark.</think><answer>At [12, 0, 16, 8].<seg></answer>"
        >>> box_giou(read_answer(text, CompletionFormat("original_px"), target), target)
        -0.5
    """
    score = trivial_score(prediction, len(target.boxes), require_valid=require_valid, lowest=-1.0)
    if score is not None:
        return score
    pred, true = prediction.boxes, target.boxes
    gain = pairwise_giou(pred[drop_duplicates(pred, true)], true) + 1  # relative to the -1 of a box without a partner
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
    """Return the share of boxes whose four coordinates are off by less than some pixels on average.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        within_px: Mean distance below which a pair counts.
        graded: Score a pair linearly by its distance, instead of 1 or 0.
        resized_to: Measure as if the image had been resized to a square with this edge, as Seg-Zero's and
            VisionReasoner's data are (840); None measures in original pixels.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `within_px` or `resized_to` is not positive.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> text = "<think>Dark.</think><answer>At [0, 0, 8, 4].<seg></answer>"
        >>> box_l1(read_answer(text, CompletionFormat("original_px"), target), target, within_px=4.0, graded=True)
        0.75
    """
    check_setting(0 < within_px < math.inf, "within_px", within_px, "a positive number of pixels")
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
    """Score the number of boxes, wherever they are.

    A repeated box is a mistake of its own: it does not replace a missing one.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        graded: Decrease with the number of missing or extra boxes, instead of 1 or 0.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8], [10, 0, 12, 8]], "size": [16, 8]})
        >>> text = "<think>Dark.</think><answer>At [0, 0, 8, 4].<seg></answer>"
        >>> box_count(read_answer(text, CompletionFormat("original_px"), target), target, graded=True)
        0.5
    """
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    n_pred, n_true = len(prediction.boxes), len(target.boxes)
    distinct = len(drop_duplicates(prediction.boxes, target.boxes))
    mistakes = abs(distinct - n_true) + n_pred - distinct
    return max(0.0, 1 - mistakes / max(n_pred, n_true)) if graded else float(mistakes == 0)


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
    """Return the total IoU of the paired boxes divided by the number of boxes.

    Args:
        prediction: Boxes in original pixels.
        target: True boxes in original pixels.
        mode: "max" divides by max(N, M). "f_beta" is the F score of Σ IoU / N (precision) and Σ IoU / M (recall);
            with `beta=1` it divides by the mean of N and M, and with `min_iou=0.5` it is the panoptic quality.
        beta: Below 1 weights precision, above 1 recall.
        min_iou: IoU that a pair must exceed to count.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `mode` does not exist, `beta` is not positive or `min_iou` not in [0, 1).

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8], [10, 0, 12, 8]], "size": [16, 8]})
        >>> text = "<think>Dark.</think><answer>At [0, 0, 8, 4].<seg></answer>"
        >>> box_hungarian(read_answer(text, CompletionFormat("original_px"), target), target)
        0.25
    """
    check_setting(mode in ("max", "f_beta"), "mode", mode, "'max' or 'f_beta'")
    check_setting(0 < beta < math.inf, "beta", beta, "a positive number")
    check_setting(0 <= min_iou < 1, "min_iou", min_iou, "a number in [0, 1)")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    n_pred, n_true = len(prediction.boxes), len(target.boxes)
    iou = _iou(prediction.boxes, target.boxes)
    total = max_assignment(np.where(iou > min_iou, iou, 0.0))
    return total / max(n_pred, n_true) if mode == "max" else (1 + beta**2) * total / (n_pred + beta**2 * n_true)


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
    """Return the average precision of the boxes of one image, without classes.

    Boxes are ranked by confidence, ties and boxes without confidence by their order in the text. In this order each
    takes the unmatched true box with the largest IoU, if that reaches the threshold. The area under the precision
    envelope is exact; COCO samples it at 101 points, which differs by at most 0.01.

    Args:
        prediction: Boxes in original pixels, and their confidences.
        target: True boxes in original pixels.
        thresholds: IoU that a pair must reach; the result is the mean over them.
        count_penalty: Multiply by M / N if N > M. Average precision alone ignores boxes ranked below the last hit, so
            that a grid of boxes scores well.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side 0.0.

    Raises:
        RewardError: If `thresholds` is empty or not in (0, 1].

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> text = "<think>Dark.</think><answer>At [0, 0, 8, 8], [12, 0, 16, 8].<seg></answer>"
        >>> box_ap(read_answer(text, CompletionFormat("original_px"), target), target)
        0.5
    """
    given = [] if isinstance(thresholds, int | float) else list(thresholds)
    check_setting(bool(given) and all(0 < t <= 1 for t in given), "thresholds", thresholds, "numbers in (0, 1]")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    n_pred, n_true = len(prediction.boxes), len(target.boxes)
    if n_pred == 0:
        return 0.0
    confidence = np.zeros(n_pred) if prediction.scores is None else prediction.scores
    ranked = prediction.boxes[np.argsort(-confidence, kind="stable")]
    iou = _iou(ranked, target.boxes)
    mean = sum(_average_precision(iou, threshold) for threshold in given) / len(given)
    return mean * min(1.0, n_true / n_pred) if count_penalty else mean


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
    """Score confidence in the boxes that hit, and only in those.

    A box that hits a true one adds its confidence c, any other subtracts its own. Visual-RFT adds 1 − c for a miss, so
    that a wrong box with confidence 0 scores as much as a right one; here it scores 0.

    Args:
        prediction: Boxes in original pixels, and their confidences.
        target: True boxes in original pixels.
        threshold: IoU that a hit must exceed. Boxes are paired for the largest total confidence.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; no predicted and no true box 1.0, boxes on exactly one side or without confidences 0.0.

    Raises:
        RewardError: If `threshold` is not in [0, 1).

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> text = '<think>Dark.</think><answer>[{"bbox_2d": [0, 0, 8, 8], "score": 0.75}]</answer>'
        >>> json = CompletionFormat("original_px", require_seg=False, answer_format="json")
        >>> box_confidence(read_answer(text, json, target), target)
        0.75
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
    """Return the scores of pairs at these distances: 1 below `within_px` and 0 else, or linear up to it."""
    return np.maximum(0.0, 1 - distance / within_px) if graded else (distance < within_px).astype(np.float64)


def _iou(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the (N, M) IoU; 0 in the rows of repeated boxes, which have no partner."""
    iou = np.zeros((len(pred), len(true)))
    kept = drop_duplicates(pred, true)
    iou[kept] = pairwise_iou(pred[kept], true)
    return iou


def _hull(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])[None] if len(boxes) else boxes


def _average_precision(iou: np.ndarray, threshold: float) -> float:
    """Return the average precision of boxes ranked by row, with (N, M) IoU."""
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
