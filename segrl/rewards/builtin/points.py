"""Rewards for points, in original pixels. Points are paired with lesions one-to-one; see `segrl.rewards.builtin.rules`.

P predicted points, M lesions, which are the true boxes. The score is the total over the pairs divided by max(P, M). An
answer with boxes but no points is not empty, so it scores 0.0 where nothing is to be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target
from segrl.rewards.builtin.boxes import closeness
from segrl.rewards.builtin.rules import (
    BOTH_OR_NOTHING,
    JSON_ANSWERS,
    check_setting,
    drop_duplicates,
    max_assignment,
    trivial_score,
)
from segrl.rewards.registry import register_reward

__all__ = ["point_distance", "point_in_box", "point_in_mask"]


@register_reward(
    "point_in_box",
    completion_format=JSON_ANSWERS,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order", "rescale"),
    equation="Σ [point in true box] / max(P, M)",
    source="",
)
def point_in_box(prediction: Prediction, target: Target, *, require_valid: bool = True) -> float:
    """Return the share of lesions with a point in their box.

    Args:
        prediction: Points in original pixels. A point on the right or lower edge of a box is outside of it.
        target: True boxes in original pixels.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; nothing predicted and nothing to find 1.0, exactly one of them 0.0.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> text = '<think>Dark.</think><answer>[{"point_2d": [3, 4]}, {"point_2d": [12, 4]}]</answer>'
        >>> json = CompletionFormat("original_px", require_seg=False, answer_format="json")
        >>> point_in_box(read_answer(text, json, target), target)
        0.5
    """
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    return _share(prediction, target, lambda points: _inside(points, target.boxes))


@register_reward(
    "point_in_mask",
    completion_format=JSON_ANSWERS,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order", "rescale"),
    equation="Σ [point on foreground of the lesion] / max(P, M)",
    source="",
)
def point_in_mask(prediction: Prediction, target: Target, *, require_valid: bool = True) -> float:
    """Return the share of lesions with a point on their foreground.

    Args:
        prediction: Points in original pixels; a point belongs to the pixel that it falls into.
        target: True mask and boxes. A lesion is the foreground inside one of its boxes.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; nothing predicted and nothing to find 1.0, exactly one of them 0.0.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> text = '<think>Dark.</think><answer>[{"point_2d": [3, 4]}, {"point_2d": [12, 4]}]</answer>'
        >>> json = CompletionFormat("original_px", require_seg=False, answer_format="json")
        >>> point_in_mask(read_answer(text, json, target), target)
        0.5
    """
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score

    def gain(points: np.ndarray) -> np.ndarray:
        x, y = np.floor(points).astype(np.int64).T
        on_image = (x >= 0) & (y >= 0) & (x < target.width) & (y < target.height)
        on_mask = np.zeros(len(points), dtype=bool)
        on_mask[on_image] = target.mask[y[on_image], x[on_image]]
        return on_mask[:, None] & _inside(points, target.boxes)

    return _share(prediction, target, gain)


@register_reward(
    "point_distance",
    completion_format=JSON_ANSWERS,
    range=(0.0, 1.0),
    empty=BOTH_OR_NOTHING,
    invariant=("box_order",),
    equation="Σ [distance < within_px] / max(P, M); graded: Σ max(0, 1 − distance / within_px) / max(P, M)",
    source="VisionReasoner (30 px), Seg-Zero (100 px)",
)
def point_distance(
    prediction: Prediction,
    target: Target,
    *,
    within_px: float = 30.0,
    graded: bool = False,
    inside_box: bool = False,
    resized_to: int | None = None,
    require_valid: bool = True,
) -> float:
    """Return the share of lesions with a point near `Target.points`, by Euclidean distance.

    Args:
        prediction: Points in original pixels.
        target: Its points lie deep inside each lesion.
        within_px: Distance below which a pair counts.
        graded: Score a pair linearly by its distance, instead of 1 or 0.
        inside_box: A point counts only inside (or on the edge of) its own predicted box, or, if there are not as many
            points as boxes, inside any of them (Seg-Zero, VisionReasoner).
        resized_to: As in `box_l1`.
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; nothing predicted and nothing to find 1.0, exactly one of them 0.0.

    Raises:
        RewardError: If `within_px` or `resized_to` is not positive.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer, read_target
        >>> target = read_target({"boxes": [[0, 0, 8, 8]], "size": [16, 8]})
        >>> text = '<think>Dark.</think><answer>[{"point_2d": [4.5, 3.5]}]</answer>'
        >>> json = CompletionFormat("original_px", require_seg=False, answer_format="json")
        >>> point_distance(read_answer(text, json, target), target, within_px=2.0, graded=True)
        0.5
    """
    check_setting(0 < within_px < math.inf, "within_px", within_px, "a positive number of pixels")
    check_setting(resized_to is None or resized_to > 0, "resized_to", resized_to, "None or a positive edge in pixels")
    if (score := trivial_score(prediction, len(target.boxes), require_valid=require_valid)) is not None:
        return score
    scale = 1.0 if resized_to is None else resized_to / np.array([target.width, target.height])
    counts = _inside_own_box(prediction) if inside_box else np.ones(len(prediction.points))
    kept = drop_duplicates(prediction.points, target.points, counts)
    distance = np.linalg.norm((prediction.points[kept, None] - target.points[None]) * scale, axis=2)
    gain = closeness(distance, within_px, graded) * counts[kept, None]
    return max_assignment(gain) / max(len(prediction.points), len(target.points))


def _share(prediction: Prediction, target: Target, gain_of: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return the total of the paired (P, M) gains over max(P, M); repeated points have no partner."""
    points = prediction.points[drop_duplicates(prediction.points, np.zeros((0, 2)))]
    return max_assignment(gain_of(points)) / max(len(prediction.points), len(target.boxes))


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return (P, M) bool: whether a point lies in a half-open box."""
    at = points[:, None]
    return np.all((at >= boxes[None, :, :2]) & (at < boxes[None, :, 2:]), axis=2)


def _inside_own_box(prediction: Prediction) -> np.ndarray:
    """Return (P,): 1 for a point in its own predicted box, or in any if P != N; else 0."""
    points, boxes = prediction.points, prediction.boxes
    if len(points) != len(boxes):
        return _inside_any(points, boxes)
    return np.all((points >= boxes[:, :2]) & (points <= boxes[:, 2:]), axis=1).astype(np.float64)


def _inside_any(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return (P,): 1 for a point inside or on the edge of any of N boxes; else 0.

    A sweep from left to right, in O((P + N) log P): a model may write thousands of both. `tree` (Fenwick) holds +1 at
    the first and -1 behind the last height of each box that is open at this x; a prefix sum counts the boxes that hold
    a height.
    """
    heights, level = np.unique(points[:, 1], return_inverse=True)
    first = np.searchsorted(heights, boxes[:, 1], side="left")
    behind = np.searchsorted(heights, boxes[:, 3], side="right")
    n_boxes, n_points = len(boxes), len(points)
    tree = [0] * (len(heights) + 2)

    def add(position: int, value: int) -> None:
        position += 1
        while position < len(tree):
            tree[position] += value
            position += position & -position

    def count(position: int) -> int:
        total, position = 0, position + 1
        while position:
            total += tree[position]
            position -= position & -position
        return total

    # at one x, boxes open before points are looked up, and close after: their edges belong to them
    kind = np.repeat([0, 1, 2], [n_boxes, n_points, n_boxes])
    index = np.concatenate([np.arange(n_boxes), np.arange(n_points), np.arange(n_boxes)])
    order = np.lexsort((kind, np.concatenate([boxes[:, 0], points[:, 0], boxes[:, 2]])))
    inside = np.zeros(n_points)
    for step, item in zip(kind[order].tolist(), index[order].tolist(), strict=True):
        if step == 1:
            inside[item] = count(int(level[item])) > 0
        else:
            add(int(first[item]), 1 - step)
            add(int(behind[item]), step - 1)
    return inside
