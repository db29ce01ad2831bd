"""Box geometry on arrays.

A box is `[x1, y1, x2, y2]` in original pixels, half-open: it covers the columns `x1 <= x < x2` and the rows
`y1 <= y < y2`, so a box around one pixel has area 1. Sides may have zero length (a degenerate box, area 0); they may
not be negative.

Degenerate boxes follow one rule: IoU is 0 with every other box and 1 with an identical box.
"""

# N, M boxes

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError

__all__ = ["area", "giou", "pairwise_giou", "pairwise_iou", "validate_boxes"]


def validate_boxes(boxes: ArrayLike, name: str = "boxes") -> np.ndarray:
    """Return boxes as a checked (N, 4) float64 array.

    Args:
        boxes: (N, 4) xyxy boxes, any frame; an empty sequence means no boxes.
        name: Name of the boxes in error messages.

    Returns:
        (N, 4) float64; (0, 4) for no boxes.

    Raises:
        DataError: Wrong shape, not numbers, non-finite numbers, or `x2 < x1` or `y2 < y1`.

    Example:
        >>> validate_boxes([[0, 0, 2, 1]]), validate_boxes([]).shape
        (array([[0., 0., 2., 1.]]), (0, 4))
        >>> validate_boxes([[2, 0, 0, 1]])
        Traceback (most recent call last):
        segrl.errors.DataError: boxes[0]: expected [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, got [2.0, 0.0, 0.0, 1.0]
    """
    try:
        array = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected numbers of shape (N, 4), got {boxes!r:.200}") from error
    if array.shape == (0,):
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        hint = "; for one box pass [[x1, y1, x2, y2]]" if array.shape == (4,) else ""
        raise DataError(f"{name}: expected shape (N, 4), got {array.shape}{hint}")
    if not (_all(np.isfinite(array)) and _all(array[:, 2:] >= array[:, :2])):
        _raise_at_first(~np.isfinite(array), array, name, "expected finite coordinates")
        reversed_ends = array[:, 2:] < array[:, :2]
        _raise_at_first(reversed_ends, array, name, "expected [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2")
    return array


def _all(true: np.ndarray) -> bool:
    """Return `true.all()`, in a third of the time for a few boxes."""
    return np.count_nonzero(true) == true.size


def _raise_at_first(wrong: np.ndarray, boxes: np.ndarray, name: str, expected: str) -> None:
    if wrong.any():
        row = int(np.nonzero(wrong)[0][0])
        raise DataError(f"{name}[{row}]: {expected}, got {boxes[row].tolist()}")


def area(boxes: ArrayLike) -> np.ndarray:
    """Compute the area of each box in square pixels.

    Args:
        boxes: (..., 4) xyxy boxes.

    Returns:
        (...) float64; 0 for a degenerate box, shape (0,) for boxes of shape (0, 4).

    Example:
        >>> area([[0, 0, 2, 3], [1, 1, 1, 5]]).tolist()
        [6.0, 0.0]
    """
    array = np.asarray(boxes, dtype=np.float64)
    return (array[..., 2] - array[..., 0]) * (array[..., 3] - array[..., 1])


def pairwise_iou(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Compute the intersection over union (IoU) of every box of `a` with every box of `b`.

    Args:
        a: (N, 4) xyxy boxes.
        b: (M, 4) xyxy boxes in the same frame.

    Returns:
        (N, M) float64 in [0, 1]. A degenerate box has IoU 0, or 1 with an identical box. (0, M) or (N, 0) for no boxes.

    Raises:
        DataError: As `validate_boxes`.

    Example:
        >>> pairwise_iou([[0, 0, 2, 2]], [[0, 0, 2, 1], [2, 2, 3, 3]]).tolist()
        [[0.5, 0.0]]
    """
    return _iou_and_union(validate_boxes(a, "a")[:, None], validate_boxes(b, "b")[None])[0]


def pairwise_giou(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Compute the generalised IoU of every box of `a` with every box of `b`; see `giou`.

    Args:
        a: (N, 4) xyxy boxes.
        b: (M, 4) xyxy boxes in the same frame.

    Returns:
        (N, M) float64 in [-1, 1]; (0, M) or (N, 0) for no boxes.

    Raises:
        DataError: As `validate_boxes`.

    Example:
        >>> pairwise_giou([[0, 0, 1, 1]], [[0, 0, 1, 1], [3, 0, 4, 1]]).tolist()
        [[1.0, -0.5]]
    """
    return _giou(validate_boxes(a, "a")[:, None], validate_boxes(b, "b")[None])


def giou(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Compute the generalised IoU of paired boxes (Rezatofighi et al. 2019, algorithm 1).

    It is `IoU - |hull without union| / |hull|`, where the hull is the smallest box around both.

    Args:
        a: (..., 4) xyxy boxes.
        b: (..., 4) xyxy boxes in the same frame; leading dimensions broadcast with those of `a`.

    Returns:
        (...) float64 in [-1, 1], a scalar for one pair of shape (4,). Identical boxes give 1, degenerate or not.
        Different boxes whose common hull has no area (degenerate boxes on one line) give -1, the limit of far boxes.

    Raises:
        DataError: As `validate_boxes`, or the last dimension is not 4.

    Example:
        >>> float(giou([0, 0, 1, 1], [3, 0, 4, 1]))  # hull of area 4, union of area 2
        -0.5
    """
    arrays = []
    for name, boxes in (("a", a), ("b", b)):
        array = np.asarray(boxes, dtype=np.float64)
        if array.ndim == 0 or array.shape[-1] != 4:
            raise DataError(f"{name}: expected shape (..., 4), got {array.shape}")
        validate_boxes(array.reshape(-1, 4), name)
        arrays.append(array)
    return _giou(*arrays)[()]


def _iou_and_union(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Coordinate by coordinate: an operation along a last axis of 2 or 4 takes several times as long.
    (a1, b1, a2, b2), (c1, d1, c2, d2) = _coordinates(a), _coordinates(b)
    width = np.minimum(a2, c2) - np.maximum(a1, c1)
    height = np.minimum(b2, d2) - np.maximum(b1, d1)
    intersection = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    union = (a2 - a1) * (b2 - b1) + (c2 - c1) * (d2 - d1) - intersection
    if _all(union):
        return intersection / union, union
    iou = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return np.where((a == b).all(axis=-1), 1.0, iou), union


def _giou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    iou, union = _iou_and_union(a, b)
    (a1, b1, a2, b2), (c1, d1, c2, d2) = _coordinates(a), _coordinates(b)
    hull = (np.maximum(a2, c2) - np.minimum(a1, c1)) * (np.maximum(b2, d2) - np.minimum(b1, d1))
    if _all(hull):
        gap = (hull - union) / hull
    else:
        gap = np.divide(hull - union, hull, out=np.where(iou == 1.0, 0.0, 1.0), where=hull > 0)
    # Rounding can leave a union a hair above its hull.
    return iou - np.maximum(gap, 0.0)


def _coordinates(boxes: np.ndarray) -> tuple[np.ndarray, ...]:
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]
