"""Two systems on the same samples: differences of their scores, by group, and the samples that make them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segrl.errors import DataError
from segrl.metrics.summary import paired_difference

__all__ = ["compare_records", "read_records"]

SCORES = ("dice", "iou", "fail", "box_f1", "hd95_mm", "nsd", "slice_visibility", "slice_boxes")
GROUPINGS = ("modality", "anatomy", "lesion")
_LISTED = 3  # samples named in one error
_KEYS = ("name", "query")


def read_records(run: str | Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a run's answers.

    Args:
        run: Its folder, or a file of records such as `predictions.json`.
        stage: "stage1", "control", "baseline" or another part of the run; None: the run's own answers.

    Returns:
        One record a sample, see `segrl.evaluation.overlap_record`.

    Raises:
        DataError: No such file, which then names those that are there, or one that holds something else.

    Example:
        >>> read_records("no/such/run")
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/run: no such folder; pass the output_dir of a run
    """
    folder = Path(run)
    if folder.is_file() and stage is None:
        path = folder
    elif not folder.is_dir():
        raise DataError(f"{folder}: no such folder; pass the output_dir of a run")
    else:
        path = folder / ("predictions.json" if stage is None else f"predictions_{stage}.json")
    if not path.is_file():
        found = sorted(other.name for other in folder.glob("predictions*.json")) or "none"
        raise DataError(f"{path}: no such file (there: {found}); evaluate the run, or pass another stage")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); evaluate the run again") from error
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: expected a list of records, one a sample; evaluate the run again")
    return records


def compare_records(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    *,
    scores: Sequence[str] | None = None,
    groupings: Sequence[str] = GROUPINGS,
    cases: int = 5,
    names: tuple[str, str] = ("first", "second"),
) -> dict[str, Any]:
    """Compare two systems sample by sample.

    Samples are matched by their name and question, in whatever order they are.

    Args:
        first: Records of one system.
        second: Records of the other.
        scores: Scores to compare; by default those of `SCORES` that both have. Samples to which a score does not apply,
            where it is None in one of the two, are left out of it.
        groupings: Keys of the records by which the differences are broken down; a grouping with one group is left out.
        cases: Samples listed on either end, by the difference of the first score.
        names: Of the two systems, for errors.

    Returns:
        Plain Python values: "n"; "scores", for each score "n", the means "first" and "second", "difference" (second
        minus first) and its paired 95 % bootstrap interval "ci95", None without samples; "groups", the same by grouping
        and group; "gained" and "lost", the samples with the largest differences, the largest first.

    Raises:
        DataError: The systems were not asked the same, or a score is not there.

    Example:
        >>> first = [{"name": "a", "dice": 0.5}, {"name": "b", "dice": 0.25}]
        >>> found = compare_records(first, [{"name": "b", "dice": 0.75}, {"name": "a", "dice": 0.5}], groupings=())
        >>> found["scores"]["dice"]["difference"], found["gained"][0]["name"], found["lost"]
        (0.25, 'b', [])
    """
    first, second = list(first), match_records(first, second, names)
    if scores is None:
        scores = [name for name in SCORES if all(name in record for record in (*first, *second))]
        if not scores:
            raise DataError(f"{names[0]} and {names[1]} share none of the scores {', '.join(SCORES)}")
    for name in scores:
        for system, records in zip(names, (first, second), strict=True):
            if not all(name in record for record in records):
                known = [key for key in SCORES if key in records[0]]
                raise DataError(f"score {name!r} is not in the records of {system}, which have {known}")
    groups = {}
    for grouping in groupings:
        members = np.array([str(record.get(grouping) or "unspecified") for record in first])
        if len(set(members)) > 1:
            groups[grouping] = {
                str(group): _compared(first, second, scores, np.flatnonzero(members == group))
                for group in np.unique(members)
            }
    listed = _cases(first, second, scores[0])
    return {
        "n": len(first),
        "scores": _compared(first, second, scores, np.arange(len(first))),
        "groups": groups,
        "gained": [case for case in reversed(listed) if case["difference"] > 0][:cases],
        "lost": [case for case in listed if case["difference"] < 0][:cases],
    }


def _key(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(record.get(key) or "") for key in _KEYS)


def match_records(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], names: tuple[str, str]
) -> list[Mapping[str, Any]]:
    """Return the second records in the order of the first.

    Args:
        first: Records of one system.
        second: Records of another.
        names: Of the two systems, for errors.

    Raises:
        DataError: The systems were not asked the same.
    """
    keys = [[_key(record) for record in records] for records in (first, second)]
    if keys[0] == keys[1]:
        return list(second)
    counts = [Counter(found) for found in keys]
    if counts[0] == counts[1] and max(counts[0].values()) == 1:
        places = {key: number for number, key in enumerate(keys[1])}
        return [second[places[key]] for key in keys[0]]
    only = [list((counts[n] - counts[1 - n]).elements()) for n in (0, 1)]
    if not any(only):
        twice = [key for key, count in counts[0].items() if count > 1]
        raise DataError(f"{len(twice)} samples occur more than once, in another order, such as {_said(twice)}")
    parts = [
        f"{len(keys)} only in {name}, such as {_said(keys)}" for name, keys in zip(names, only, strict=True) if keys
    ]
    raise DataError(
        f"{names[0]} and {names[1]} were not asked the same: of {len(first)} and {len(second)} samples are "
        f"{'; '.join(parts)}; evaluate both on one split"
    )


def _said(keys: Sequence[tuple[str, ...]]) -> str:
    return ", ".join(repr(name or query) for name, query in keys[:_LISTED])


def _compared(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], scores: Sequence[str], chosen: np.ndarray
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in scores:
        pairs = [(first[n][name], second[n][name]) for n in chosen]
        both = np.array([pair for pair in pairs if None not in pair], dtype=np.float64).reshape(-1, 2)
        if not len(both):
            found[name] = {"n": 0, "first": None, "second": None, "difference": None, "ci95": None}
            continue
        difference, low, high = paired_difference(both[:, 1], both[:, 0])
        means = [float(mean) for mean in both.mean(axis=0)]
        found[name] = {
            "n": len(both),
            "first": means[0],
            "second": means[1],
            "difference": difference,
            "ci95": [low, high],
        }
    return found


def _cases(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], score: str) -> list[dict[str, Any]]:
    """Return all samples that have the score, from the largest loss to the largest gain."""
    found = []
    for one, other in zip(first, second, strict=True):
        if None in (one[score], other[score]):
            continue
        values = [float(one[score]), float(other[score])]
        name, query = _key(one)
        found.append(
            {
                "name": name,
                "query": query,
                "first": values[0],
                "second": values[1],
                "difference": values[1] - values[0],
                "text": str(other.get("text") or ""),
            }
        )
    return sorted(found, key=lambda case: case["difference"])
