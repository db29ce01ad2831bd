"""Overlap of two masks: Dice, IoU, and the failures of CORE-Seg.

Overlap scores are fractions in [0, 1]; reports multiply by 100. Masks are bool or integer arrays in which every nonzero
pixel is foreground. Empty masks follow `segrl.geometry.empty_score`: both empty 1.0, exactly one empty 0.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError
from segrl.geometry.masks import empty_score, foreground

__all__ = ["dice", "failure", "iou", "overlaps"]


def dice(pred: ArrayLike, true: ArrayLike) -> float:
    """Compute the Dice coefficient, `2 |P and T| / (|P| + |T|)`.

    Args:
        pred: Predicted mask, (H, W) or a volume (D, H, W); bool or integer.
        true: Ground truth mask of the same shape.

    Returns:
        Dice in [0, 1]; both empty 1.0, exactly one empty 0.0.

    Raises:
        DataError: Shapes differ, or a float mask.

    Example:
        >>> dice([[1, 1, 0]], [[0, 255, 255]])
        0.5
    """
    return overlaps(pred, true)[0]


def iou(pred: ArrayLike, true: ArrayLike) -> float:
    """Compute the intersection over union (IoU), `|P and T| / |P or T|`.

    Args:
        pred: Predicted mask, (H, W) or a volume (D, H, W); bool or integer.
        true: Ground truth mask of the same shape.

    Returns:
        IoU in [0, 1]; both empty 1.0, exactly one empty 0.0.

    Raises:
        DataError: Shapes differ, or a float mask.

    Example:
        >>> iou([[1, 1, 1, 0]], [[0, 0, 255, 255]])
        0.25
    """
    return overlaps(pred, true)[1]


def overlaps(pred: ArrayLike, true: ArrayLike) -> tuple[float, float]:
    """Compute `dice` and `iou` in one pass over the masks.

    Raises:
        DataError: As these.

    Example:
        >>> overlaps([[1, 1, 0]], [[0, 255, 255]])
        (0.5, 0.3333333333333333)
    """
    overlap, pred_area, true_area = _areas(pred, true)
    empty = empty_score(pred_area == 0, true_area == 0)
    if empty is not None:
        return empty, empty
    total = pred_area + true_area
    return 2 * overlap / total, overlap / (total - overlap)


def _areas(pred: ArrayLike, true: ArrayLike) -> tuple[int, int, int]:
    inside, truth = foreground(pred, "pred", ndim=None), foreground(true, "true", ndim=None)
    if inside.shape != truth.shape:
        raise DataError(f"pred: expected the shape of true {truth.shape}, got {inside.shape}; resize the prediction")
    return int(np.count_nonzero(inside & truth)), int(np.count_nonzero(inside)), int(np.count_nonzero(truth))


def failure(prediction_mask: ArrayLike | None, true_mask: ArrayLike, valid_format: bool) -> bool:
    """Return whether a sample counts into the Failure Rate: Dice is 0, or the format is invalid (CORE-Seg).

    Args:
        prediction_mask: (H, W) mask, of a volume (D, H, W); None if none was predicted, which counts as an empty one.
        true_mask: Ground truth mask of the same shape.
        valid_format: Whether the text has the required format.

    Returns:
        True for a failure. An empty prediction of an empty ground truth has Dice 1 and is no failure.

    Raises:
        DataError: As `dice`.

    Example:
        >>> failure([[1, 0]], [[1, 1]], True), failure([[1, 0]], [[0, 1]], True), failure([[1, 0]], [[1, 0]], False)
        (False, True, True)
    """
    predicted = np.zeros_like(true_mask) if prediction_mask is None else prediction_mask
    return not valid_format or dice(predicted, true_mask) == 0.0
