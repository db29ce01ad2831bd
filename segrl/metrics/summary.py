"""Summarise per-sample scores: means, bootstrap confidence intervals, breakdowns by group."""

# n samples, k metrics

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError

__all__ = ["bootstrap_ci", "nested_bootstrap_ci", "paired_bootstrap_ci", "paired_difference", "summarise"]

SUMMARY_METRICS = {"mdice": "dice", "miou": "iou", "fail": "fail"}
GROUPINGS = ("modality", "anatomy")
RESAMPLED_VALUES_AT_ONCE = 2**22  # 32 MB of float64


def bootstrap_ci(
    values: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: (n,) finite values, one per sample.
        level: Coverage, between 0 and 1.
        n_resamples: How often the samples are redrawn with replacement.
        seed: The same seed and values give the same interval.

    Returns:
        Lower and upper end; both equal the value if n is 1.

    Raises:
        DataError: No values, values that are not finite, or a setting out of range.

    Example:
        >>> bootstrap_ci([0.0] * 50 + [1.0] * 50)
        (0.4, 0.6)
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise DataError(f"values: expected shape (n,), got {array.shape}")
    low, high = _intervals(array[:, None], level, n_resamples, seed)[:, 0]
    return float(low), float(high)


def paired_bootstrap_ci(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of `mean(a - b)` for two systems scored on the same samples.

    Args:
        a: (n,) scores of one system.
        b: (n,) scores of the other, in the same order.
        level: See `bootstrap_ci`.
        n_resamples: See `bootstrap_ci`.
        seed: See `bootstrap_ci`.

    Returns:
        Lower and upper end; if both are above 0, `a` scores higher.

    Raises:
        DataError: The lengths differ, or as `bootstrap_ci`.

    Example:
        >>> paired_bootstrap_ci([0.5, 0.75, 1.0], [0.25, 0.5, 0.75])
        (0.25, 0.25)
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(f"a and b: expected scores of the same samples, got shapes {first.shape} and {second.shape}")
    return bootstrap_ci(first - second, level=level, n_resamples=n_resamples, seed=seed)


def paired_difference(new: ArrayLike, old: ArrayLike) -> list[float]:
    """Return `mean(new - old)` and the ends of its 95 % interval (`paired_bootstrap_ci`).

    Args:
        new: (n,) scores of one system.
        old: (n,) scores of the other, of the same samples in the same order.

    Raises:
        DataError: As `paired_bootstrap_ci`.

    Example:
        >>> paired_difference([0.5, 0.75, 1.0], [0.25, 0.5, 0.75])
        [0.25, 0.25, 0.25]
    """
    first, second = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    interval = paired_bootstrap_ci(first, second)
    return [float((first - second).mean()), *interval]


def nested_bootstrap_ci(
    values: Sequence[ArrayLike], *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean over runs, where runs and their samples are both drawn.

    Runs are redrawn with replacement, and of each the samples too: the interval covers other seeds and other samples.
    With one run it is that of `bootstrap_ci`, up to the random numbers. With two or three it is still too narrow.

    Args:
        values: For each run its (n,) finite values; n may differ.
        level: See `bootstrap_ci`.
        n_resamples: See `bootstrap_ci`.
        seed: See `bootstrap_ci`.

    Returns:
        Lower and upper end.

    Raises:
        DataError: No runs, a run without values, or values that are not finite.

    Example:
        >>> nested_bootstrap_ci([[0.5, 0.5], [1.0]])
        (0.5, 1.0)
    """
    runs = [np.asarray(value, dtype=np.float64) for value in values]
    if not runs:
        raise DataError("values: expected at least one run, got none")
    for number, run in enumerate(runs):
        if run.ndim != 1 or not len(run) or not np.isfinite(run).all():
            raise DataError(f"values[{number}]: expected finite values of shape (n,), n at least 1, got {run.shape}")
    rng = np.random.default_rng(seed)
    means = [
        np.mean([run[rng.integers(len(run), size=len(run))].mean() for run in (runs[n] for n in drawn)])
        for drawn in rng.integers(len(runs), size=(n_resamples, len(runs)))
    ]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _intervals(values: np.ndarray, level: float, n_resamples: int, seed: int) -> np.ndarray:
    """Compute the (2, k) ends of the intervals of the k means of (n, k) values; the columns share their resamples."""
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
    """Compute means, 95% bootstrap intervals and breakdowns of per-sample results.

    Args:
        records: One mapping per sample with a finite number (or bool) for each metric, by default "dice", "iou" and
            "fail". The keys in `groupings` are optional: missing or empty ones form the group "unspecified". Other keys
            are ignored.
        metrics: Name of each mean, with the key of the averaged values in the records.
        groupings: Keys of the records by which the breakdowns are made.
        optional: Names of metrics that do not apply to every sample: a record may hold None for them. Their mean is
            taken over the other records, and is None if there are none.

    Returns:
        Plain Python values, ready for JSON: `{"mdice", "miou", "fail", "n", "ci95": {"mdice": [low, high], "miou": ...,
        "fail": ...}, "groups": {"modality": {name: the same without "groups"}, "anatomy": ...}}`; groups are in
        alphabetical order. With `optional` metrics, "n_scored" holds the number of records in each of their means; the
        interval is None where that is 0.

    Raises:
        DataError: No records, a missing key, or a value that is not finite; the record is named. Also an `optional`
            name that is no metric.

    Example:
        >>> records = [{"dice": 0.5, "modality": "CT"}, {"dice": 1.0, "modality": "CT"}, {"dice": 0.0}]
        >>> summary = summarise(records, metrics={"mdice": "dice"}, groupings=["modality"])
        >>> summary["mdice"], summary["groups"]["modality"]["CT"]["mdice"], list(summary["groups"]["modality"])
        (0.5, 0.75, ['CT', 'unspecified'])
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
    """Return the values of one record; NaN, which no record may hold, replaces a None where that is allowed."""
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
    """Summarise the (n, k) values of k named metrics; the NaN of a column that is `free` are left out."""
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
