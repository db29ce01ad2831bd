"""The best mask that ignores the image: the floor that a model must beat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike

from segrl.errors import DataError
from segrl.evaluation.base import overlap_record
from segrl.evaluation.images import read_image_target
from segrl.geometry.masks import BOTH_EMPTY_SCORE, resize_mask
from segrl.predictions.prediction import Prediction, Status

__all__ = ["constant_mask_baseline", "evaluate_constant_mask"]

CANDIDATE_THRESHOLDS = 64


def constant_mask_baseline(
    train_masks: Iterable[ArrayLike], *, size: int = 128, thresholds: Sequence[float] | None = None
) -> tuple[np.ndarray, float]:
    """Return the best mask that ignores the image: what a model must beat to have looked at it.

    The training masks are resized to a square and averaged, and the average is cut at the threshold with the highest
    mean Dice on those training masks. Score it with `dice(resize_mask(mask, true.shape), true)`.

    Args:
        train_masks: (H, W) masks, sizes may differ; empty masks count by the empty rule.
        size: Side S of the square.
        thresholds: Candidates; a pixel is foreground if its average exceeds the threshold. By default evenly spaced
            from 0 to the highest average, which leaves no pixel; so rare and scattered lesions are served too.

    Returns:
        (S, S) bool mask and its threshold; the lowest threshold wins a tie.

    Raises:
        DataError: No masks, no thresholds, or as `segrl.geometry.resize_mask`.

    Example:
        >>> left = np.array([[1, 1, 0, 0]] * 4)
        >>> mask, threshold = constant_mask_baseline([left, left, left], size=4)
        >>> mask[0].tolist()
        [True, True, False, False]
    """
    flat = [resize_mask(mask, (size, size)).ravel() for mask in train_masks]
    if not flat:
        raise DataError("train_masks: expected at least one mask, got none")
    masks = np.stack(flat).astype(np.float32)
    average = masks.mean(axis=0, dtype=np.float64)
    if thresholds is None:
        thresholds = np.linspace(0.0, average.max(), CANDIDATE_THRESHOLDS).tolist()
    levels = np.sort(np.asarray(thresholds, dtype=np.float64))
    if levels.size == 0:
        raise DataError("thresholds: expected at least one candidate, got none")
    candidates = average > levels[:, None]
    areas = masks.sum(axis=1)[:, None] + candidates.sum(axis=1)
    overlaps = 2 * masks @ candidates.T.astype(np.float32)
    scores = np.divide(overlaps, areas, out=np.full(areas.shape, BOTH_EMPTY_SCORE), where=areas > 0)
    best = int(scores.mean(axis=0).argmax())
    return candidates[best].reshape(size, size), float(levels[best])


def evaluate_constant_mask(train: Dataset, test: Dataset, *, size: int = 128) -> list[dict[str, Any]]:
    """Score the mask that is best on average over the training rows, the floor that a model must beat.

    Args:
        train: Rows whose masks are averaged; see `segrl.evaluation.constant_mask_baseline`.
        test: Rows that the mask, resized to each, is compared with.
        size: Side of the square in which the masks are averaged, pixels.

    Returns:
        Records for `segrl.metrics.summarise`, one per test row in order; `fail` is Dice = 0, since there is no text.

    Raises:
        DataError: No training rows, or a mask that is not binary.

    Example:
        >>> from segrl.data import make_synthetic
        >>> rows = make_synthetic(3, size=32)
        >>> scores = evaluate_constant_mask(rows, rows, size=32)
        >>> [sorted(record) == sorted(scores[0]) and 0 < record["dice"] < 1 for record in scores]
        [True, True, True]
    """
    mask, _ = constant_mask_baseline((read_image_target(row).mask for row in _without_images(train)), size=size)
    records = []
    for row in _without_images(test):
        target = read_image_target(row)
        guess = resize_mask(mask, (target.height, target.width))
        silent = Prediction("", None, None, np.zeros((0, 4)), Status.VALID, has_seg=False, mask=guess)
        records.append(overlap_record(silent, target))
    return records


def _without_images(dataset: Dataset) -> Iterable[dict[str, Any]]:
    """The rows, whose images need not be decoded."""
    rows: Any = dataset.remove_columns("image") if "image" in dataset.column_names else dataset
    return rows
