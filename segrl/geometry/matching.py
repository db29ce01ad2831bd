"""One-to-one assignment of predicted to ground truth boxes (Hungarian algorithm)."""

# N predicted, M ground truth, K matched boxes

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from segrl.errors import DataError
from segrl.geometry.boxes import pairwise_iou

__all__ = ["Matching", "match", "match_boxes"]


@dataclass(frozen=True)
class Matching:
    """Matched pairs of boxes, ordered by predicted box; no box occurs twice.

    Attributes:
        pred_index: (K,) int64, indices of predicted boxes, increasing.
        true_index: (K,) int64, indices of the ground truth boxes that they are matched to.
        iou: (K,) float64 in (0, 1], IoU of each pair.

    Example:
        >>> matching = match_boxes([[5, 5, 6, 6], [0, 0, 2, 2]], [[0, 0, 2, 2]])
        >>> len(matching), matching.pred_index.tolist(), matching.true_index.tolist()
        (1, [1], [0])
    """

    pred_index: np.ndarray
    true_index: np.ndarray
    iou: np.ndarray

    def __len__(self) -> int:
        return len(self.iou)


def match(cost: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns one-to-one so that the summed cost is minimal.

    Args:
        cost: (N, M) finite costs.

    Returns:
        Row indices (increasing) and column indices, both (min(N, M),) int64; empty if N or M is 0.

    Raises:
        DataError: Not two-dimensional, or a cost that is not finite.

    Example:
        >>> rows, columns = match([[1.0, 2.0], [1.0, 4.0]])  # 2 + 1 is less than 1 + 4
        >>> rows.tolist(), columns.tolist()
        ([0, 1], [1, 0])
    """
    array = np.asarray(cost, dtype=np.float64)
    if array.ndim != 2:
        raise DataError(f"cost: expected shape (N, M), got {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"cost: expected finite numbers, got {array[~np.isfinite(array)][0]}")
    return linear_sum_assignment(array)


def match_boxes(pred: ArrayLike, true: ArrayLike, min_iou: float = 0.0) -> Matching:
    """Match predicted to ground truth boxes one-to-one so that the total IoU is maximal.

    The assignment comes first and the threshold second: `min_iou` never changes the assignment.

    Args:
        pred: (N, 4) xyxy boxes.
        true: (M, 4) xyxy ground truth boxes in the same frame.
        min_iou: A pair is kept if its IoU exceeds this; the default drops pairs that do not overlap.

    Returns:
        The kept pairs; none if either side has no boxes. A duplicate of a matched box stays unmatched.

    Raises:
        DataError: Invalid boxes, see `segrl.geometry.validate_boxes`.

    Example:
        >>> match_boxes([[0, 0, 2, 2], [0, 0, 2, 2]], [[0, 0, 2, 1]]).iou.tolist()
        [0.5]
    """
    iou = pairwise_iou(pred, true)
    rows, columns = linear_sum_assignment(iou, maximize=True)
    matched = iou[rows, columns]
    kept = matched > min_iou
    return Matching(rows[kept], columns[kept], matched[kept])
