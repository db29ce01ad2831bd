"""The rules that all built-in rewards share: what an empty or invalid answer earns, how things are paired, settings.

1. An invalid text earns the lowest value (unless `require_valid=False`).
2. Saying nothing where nothing is to be found earns the highest value; if exactly one side is empty, the lowest.
3. Predicted and true things are paired one-to-one, for the largest total. A repeated thing is never paired, and counts
   like any other that is not.
"""

# N predicted things (boxes, points), M true ones

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import RewardError
from segrl.geometry.masks import empty_score
from segrl.geometry.matching import match
from segrl.predictions.prediction import Prediction

__all__ = [
    "ALL_INVARIANCES",
    "BOTH_OR_NOTHING",
    "JSON_ANSWERS",
    "check_setting",
    "drop_duplicates",
    "max_assignment",
    "trivial_score",
]

ALL_INVARIANCES = ("box_order", "flip", "rescale")
BOTH_OR_NOTHING = {"both": 1.0, "prediction": 0.0, "truth": 0.0}
# Points, confidences and slices stand in JSON answers only: read otherwise, a reward for them would be blind.
JSON_ANSWERS = {"answer_format": "json", "require_seg": False}


def check_setting(ok: bool, name: str, value: Any, expected: str) -> None:
    """Raise the error for a setting with a wrong value.

    Raises:
        RewardError: Unless `ok`.
    """
    if not ok:
        raise RewardError(f"{name}={value!r}; expected {expected}")


def trivial_score(
    prediction: Prediction, true_count: int, *, require_valid: bool, lowest: float = 0.0, highest: float = 1.0
) -> float | None:
    """What an answer earns before its boxes and points are looked at (rules 1 and 2).

    An answer is empty if it holds neither a box nor a point, so that no reward for boxes pays for hallucinated points.

    Args:
        prediction: The answer.
        true_count: Number of true things, M.
        require_valid: Whether an invalid text earns the lowest value.
        lowest: Lowest value of the reward.
        highest: Highest value of the reward.

    Returns:
        The score, or None where both sides hold something and the formula applies.
    """
    if require_valid and not prediction.valid:
        return lowest
    agreement = empty_score(len(prediction.boxes) + len(prediction.points) == 0, true_count == 0)
    return None if agreement is None else lowest + (highest - lowest) * agreement


def drop_duplicates(pred: np.ndarray, true: np.ndarray, worth: np.ndarray | None = None) -> np.ndarray:
    """Indices of the predicted things that may be paired: all but repetitions (rule 3).

    Args:
        pred: (N, K) boxes or points.
        true: (M, K) boxes or points. Where several true things are the same, as many predicted ones may be that.
        worth: (N,) in which copies may differ, such as confidence: those worth most are kept, so that the order does
            not matter. All are worth the same by default.

    Returns:
        (at most N,) int64, increasing.

    Example:
        >>> drop_duplicates(np.array([[1, 2], [3, 4], [1, 2]]), np.zeros((0, 2))).tolist()
        [0, 1]
    """
    if len(set(map(tuple, pred.tolist()))) == len(pred):
        return np.arange(len(pred))
    allowed = Counter(map(tuple, true.tolist()))
    seen: Counter[tuple[float, ...]] = Counter()
    kept = []
    things = list(map(tuple, pred.tolist()))
    for index in range(len(things)) if worth is None else np.argsort(-worth, kind="stable").tolist():
        seen[things[index]] += 1
        if seen[things[index]] <= max(1, allowed[things[index]]):
            kept.append(index)
    return np.array(sorted(kept), dtype=np.int64)


def max_assignment(gain: ArrayLike) -> float:
    """Largest total gain of pairs that share no row and no column.

    Args:
        gain: (N, M), finite.

    Returns:
        The total over min(N, M) pairs; 0.0 if N or M is 0.

    Example:
        >>> max_assignment([[0.9, 0.8], [0.7, 0.0]])
        1.5
    """
    array = np.asarray(gain, dtype=np.float64)
    rows, columns = match(-array)
    return float(array[rows, columns].sum())
