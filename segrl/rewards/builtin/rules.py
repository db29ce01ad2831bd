"""The rules that all built-in rewards share: empty and invalid answers, pairing, checks of settings.

1. An invalid text scores the lowest value (unless `require_valid=False`).
2. An empty answer where nothing is to be found scores the highest value; if exactly one side is empty, the lowest.
3. Predicted and true objects are paired one-to-one, for the largest total. A repeated object is never paired, and
   counts like any other without a partner.
"""

# N predicted objects (boxes, points), M true ones

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import RewardError
from segrl.geometry.masks import empty_score
from segrl.geometry.matching import match
from segrl.predictions.json_answers import Answer, read_json_answer
from segrl.predictions.prediction import Prediction
from segrl.predictions.text_answers import MAX_COORDINATE

__all__ = [
    "ALL_INVARIANCES",
    "BOTH_OR_NOTHING",
    "JSON_ANSWERS",
    "check_setting",
    "drop_duplicates",
    "json_answer",
    "max_assignment",
    "trivial_score",
]

ALL_INVARIANCES = ("box_order", "flip", "rescale")
BOTH_OR_NOTHING = {"both": 1.0, "prediction": 0.0, "target": 0.0}
# Only JSON answers hold points, confidences and slices.
JSON_ANSWERS = {"answer_format": "json", "require_seg": False}


def check_setting(ok: bool, name: str, value: Any, expected: str) -> None:
    """Raise `RewardError` for a setting with a wrong value, unless `ok`."""
    if not ok:
        raise RewardError(f"{name}={value!r}; expected {expected}")


def trivial_score(
    prediction: Prediction, true_count: int, *, require_valid: bool, lowest: float = 0.0, highest: float = 1.0
) -> float | None:
    """Return the score fixed by validity and emptiness alone (rules 1 and 2), or None.

    An answer is empty if it holds neither a box nor a point, so that a reward for boxes does not score hallucinated
    points as an empty answer.

    Args:
        prediction: The answer.
        true_count: Number of true objects, M.
        require_valid: Whether an invalid text scores the lowest value.
        lowest: Lowest value of the reward.
        highest: Highest value of the reward.

    Returns:
        The score, or None if both sides hold an object, so that the formula applies.
    """
    if require_valid and not prediction.valid:
        return lowest
    agreement = empty_score(len(prediction.boxes) + len(prediction.points) == 0, true_count == 0)
    return None if agreement is None else lowest + (highest - lowest) * agreement


def json_answer(prediction: Prediction) -> Answer:
    """Read the answer of a prediction as JSON again, for rewards that look at its keys.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> answer = read_answer('<answer>{"slice": 3}<seg></answer>', CompletionFormat())
        >>> json_answer(answer).objects
        [{'slice': 3}]
    """
    text = prediction.answer or ""
    if text.endswith(">"):  # the segmentation token: JSON never ends like this
        text = text[: max(text.rfind("<"), 0)]
    return read_json_answer(text, MAX_COORDINATE)


def drop_duplicates(pred: np.ndarray, true: np.ndarray, worth: np.ndarray | None = None) -> np.ndarray:
    """Return the indices of the predicted objects that may be paired: all but repetitions (rule 3).

    Args:
        pred: (N, K) boxes or points.
        true: (M, K) boxes or points. If several are equal, as many equal predicted ones are kept.
        worth: (N,) values in which copies may differ, such as confidences; the copies with the highest are kept, so
            that their order does not matter. Equal by default.

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
    objects = list(map(tuple, pred.tolist()))
    for index in range(len(objects)) if worth is None else np.argsort(-worth, kind="stable").tolist():
        seen[objects[index]] += 1
        if seen[objects[index]] <= max(1, allowed[objects[index]]):
            kept.append(index)
    return np.array(sorted(kept), dtype=np.int64)


def max_assignment(gain: ArrayLike) -> float:
    """Return the largest total gain of pairs that share no row and no column.

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
