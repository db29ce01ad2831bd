"""Evaluation: mask overlap, failures, bootstrap intervals and the summary of a run.

Overlap scores are fractions in [0, 1]; reports multiply by 100. Masks are bool or integer arrays in which every nonzero
pixel is foreground. Empty masks follow `segrl.masks.empty_score`: both empty 1.0, exactly one empty 0.0.
"""

# n samples, k metrics, S side of a square mask

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError
from segrl.masks import BOTH_EMPTY_SCORE, empty_score, foreground, resize_mask

__all__ = [
    "bootstrap_ci",
    "constant_mask_baseline",
    "dice",
    "failure",
    "iou",
    "paired_bootstrap_ci",
    "summarise",
]

SUMMARY_METRICS = {"mdice": "dice", "miou": "iou", "fail": "fail"}
GROUPINGS = ("modality", "anatomy")
RESAMPLED_VALUES_AT_ONCE = 2**22
CANDIDATE_THRESHOLDS = 64


def dice(pred: ArrayLike, true: ArrayLike) -> float:
    """Dice coefficient, `2 |P and T| / (|P| + |T|)`.

    Args:
        pred: Predicted mask, (H, W) or a volume (D, H, W); bool or integer.
        true: True mask of the same shape.

    Returns:
        Dice in [0, 1]; both empty 1.0, exactly one empty 0.0.

    Raises:
        DataError: Shapes differ, or a float mask.

    Example:
        >>> dice([[1, 1, 0]], [[0, 255, 255]])
        0.5
    """
    overlap, pred_area, true_area = _areas(pred, true)
    empty = empty_score(pred_area == 0, true_area == 0)
    return 2 * overlap / (pred_area + true_area) if empty is None else empty


def iou(pred: ArrayLike, true: ArrayLike) -> float:
    """Intersection over union, `|P and T| / |P or T|`.

    Args:
        pred: Predicted mask, (H, W) or a volume (D, H, W); bool or integer.
        true: True mask of the same shape.

    Returns:
        IoU in [0, 1]; both empty 1.0, exactly one empty 0.0.

    Raises:
        DataError: Shapes differ, or a float mask.
    """
    overlap, pred_area, true_area = _areas(pred, true)
    empty = empty_score(pred_area == 0, true_area == 0)
    return overlap / (pred_area + true_area - overlap) if empty is None else empty


def _areas(pred: ArrayLike, true: ArrayLike) -> tuple[int, int, int]:
    inside, truth = foreground(pred, "pred", ndim=None), foreground(true, "true", ndim=None)
    if inside.shape != truth.shape:
        raise DataError(f"pred: expected the shape of true {truth.shape}, got {inside.shape}; resize the prediction")
    return int(np.count_nonzero(inside & truth)), int(np.count_nonzero(inside)), int(np.count_nonzero(truth))


def failure(prediction_mask: ArrayLike | None, true_mask: ArrayLike, valid_format: bool) -> bool:
    """Whether a sample counts into the Failure Rate: Dice is 0, or the format is invalid (CORE-Seg, evaluation).

    Args:
        prediction_mask: (H, W) mask, or `None` if none was predicted, which is a failure.
        true_mask: (H, W) mask.
        valid_format: Whether the text had the required form.

    Returns:
        True for a failure. An empty prediction of an empty truth has Dice 1 and is none.

    Raises:
        DataError: As `dice`.
    """
    return not valid_format or prediction_mask is None or dice(prediction_mask, true_mask) == 0.0


def bootstrap_ci(
    values: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:
        values: (n,) finite values, one per sample.
        level: Coverage, between 0 and 1.
        n_resamples: How often the samples are redrawn with replacement.
        seed: The same seed and values give the same interval.

    Returns:
        Lower and upper end; both equal the value if n is 1.

    Raises:
        DataError: No values, values that are not finite, or a setting out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise DataError(f"values: expected shape (n,), got {array.shape}")
    low, high = _intervals(array[:, None], level, n_resamples, seed)[:, 0]
    return float(low), float(high)


def paired_bootstrap_ci(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `mean(a - b)`, two systems scored on the same samples.

    Args:
        a: (n,) scores of one system.
        b: (n,) scores of the other, in the same order.
        level: See `bootstrap_ci`.
        n_resamples: See `bootstrap_ci`.
        seed: See `bootstrap_ci`.

    Returns:
        Lower and upper end; an interval above 0 says that `a` is better.

    Raises:
        DataError: The lengths differ, or as `bootstrap_ci`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(f"a and b: expected scores of the same samples, got shapes {first.shape} and {second.shape}")
    return bootstrap_ci(first - second, level=level, n_resamples=n_resamples, seed=seed)


def _intervals(values: np.ndarray, level: float, n_resamples: int, seed: int) -> np.ndarray:
    """(n, k) values to the (2, k) ends of the intervals of their means; the k columns share their resamples."""
    n = len(values)
    if n == 0:
        raise DataError("values: expected at least one sample, got none")
    if not np.isfinite(values).all():
        raise DataError(f"values: expected finite numbers, got {values[~np.isfinite(values)][0]}")
    if not 0 < level < 1 or n_resamples < 1:
        raise DataError(f"expected 0 < level < 1 and n_resamples >= 1, got level={level} and n_resamples={n_resamples}")
    rng = np.random.default_rng(seed)
    block = max(1, RESAMPLED_VALUES_AT_ONCE // n)
    means = [
        values[rng.integers(n, size=(min(block, n_resamples - start), n))].mean(axis=1)
        for start in range(0, n_resamples, block)
    ]
    return np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)


def summarise(
    records: Sequence[Mapping[str, Any]],
    *,
    metrics: Mapping[str, str] = SUMMARY_METRICS,
    groupings: Sequence[str] = GROUPINGS,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Means, 95% bootstrap intervals and breakdowns of per-sample results; plain Python values, ready for JSON.

    Args:
        records: One mapping per sample with a finite number (or bool) for each metric, by default "dice", "iou" and
            "fail". The keys in `groupings` are optional: missing or empty ones form the group "unspecified". Other keys
            are ignored.
        metrics: Names of the means, each with the key in the records of what is averaged.
        groupings: Keys of the records that the breakdowns are by.
        optional: Names of the metrics that do not apply to every sample: a record may hold None for them. Their mean is
            over the other records, and None if there is none.

    Returns:
        `{"mdice", "miou", "fail", "n", "ci95": {"mdice": [low, high], "miou": ..., "fail": ...}, "groups": {"modality":
        {name: the same without "groups"}, "anatomy": ...}}`; groups are in alphabetical order. With `optional` metrics
        "n_scored" says for each over how many of the n records its mean is; its interval is None where that is 0.

    Raises:
        DataError: No records, a missing key, or a value that is not finite; the record is named. Also an `optional`
            name that is no metric.
    """
    if len(records) == 0:
        raise DataError("records: expected at least one sample, got none")
    unknown = sorted(set(optional) - set(metrics))
    if unknown:
        raise DataError(f"optional: {unknown}; expected some of the metrics {list(metrics)}")
    keys, free = list(metrics.values()), [name in optional for name in metrics]
    values = np.array([_scores(index, record, keys, free) for index, record in enumerate(records)])
    groups = {}
    for grouping in groupings:
        names = np.array([str(record.get(grouping) or "unspecified") for record in records])
        groups[grouping] = {str(name): _summary(values[names == name], metrics, free) for name in np.unique(names)}
    return {**_summary(values, metrics, free), "groups": groups}


def _scores(index: int, record: Mapping[str, Any], keys: Sequence[str], free: Sequence[bool]) -> list[float]:
    """The values of one record; NaN, which no record may hold, stands for a None where that is allowed."""
    missing = [key for key in keys if key not in record]
    if missing:
        raise DataError(f"records[{index}]: missing {missing}, got the keys {sorted(record)}")
    given = {key: record[key] for key in keys}
    try:
        scores = [
            math.nan if may and record[key] is None else float(record[key]) for key, may in zip(keys, free, strict=True)
        ]
    except (TypeError, ValueError) as error:
        raise DataError(f"records[{index}]: expected numbers, got {given}") from error
    if not all(record[key] is None or math.isfinite(score) for key, score in zip(keys, scores, strict=True)):
        raise DataError(f"records[{index}]: expected finite scores, got {given}")
    return scores


def _summary(values: np.ndarray, names: Iterable[str], free: Sequence[bool]) -> dict[str, Any]:
    """The (n, k) values of the k named metrics; a column that is `free` leaves its NaN out."""
    columns = dict(zip(names, values.T, strict=True))
    scored = {name: column[~np.isnan(column)] for (name, column), may in zip(columns.items(), free, strict=True) if may}
    always = np.ascontiguousarray(values[:, ~np.array(free)])
    means = dict(zip([name for name in columns if name not in scored], always.mean(axis=0).tolist(), strict=True))
    ends = dict(zip(means, _intervals(always, 0.95, 2000, 0).T.tolist(), strict=True))
    means |= {name: float(column.mean()) if len(column) else None for name, column in scored.items()}
    ends |= {name: list(bootstrap_ci(column)) if len(column) else None for name, column in scored.items()}
    summary: dict[str, Any] = {**{name: means[name] for name in columns}, "n": len(values)}
    if scored:
        summary["n_scored"] = {name: len(column) for name, column in scored.items()}
    return {**summary, "ci95": {name: ends[name] for name in columns}}


def constant_mask_baseline(
    train_masks: Iterable[ArrayLike], *, size: int = 128, thresholds: Sequence[float] | None = None
) -> tuple[np.ndarray, float]:
    """The best mask that ignores the image: what a model must beat to have looked at it.

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
        DataError: No masks, no thresholds, or as `segrl.masks.resize_mask`.
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
