"""The same masks in several conventions, side by side, and which rows make the difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from segrl.errors import unknown_name
from segrl.evaluation.conventions.cases import KINDS, Case
from segrl.evaluation.conventions.published import CONVENTIONS, ConventionError

__all__ = ["check_conventions", "compare_conventions", "conventions_page", "explain_difference"]

_ORDER = (
    "giou",
    "ciou",
    "p@0.5",
    "p@0.7",
    "p@0.8",
    "p@0.9",
    "n_acc",
    "t_acc",
    "mdice",
    "miou",
    "fail",
    "nsd",
    "hd95_voxels",
    "hd95_mm",
)
_TITLES = {"giou": "gIoU", "ciou": "cIoU", "n_acc": "N-acc", "t_acc": "T-acc", "mdice": "mDice", "miou": "mIoU"}


def check_conventions(names: Sequence[str]) -> list[str]:
    """Return the names of conventions that are asked for, each once; none, and "all", mean all.

    Raises:
        UnknownNameError: No such convention.

    Example:
        >>> check_conventions(["lisa", "lisa"]), len(check_conventions(["all"])) == len(CONVENTIONS)
        (['lisa'], True)
    """
    chosen = [name for name in names if name != "all"]
    for name in chosen:
        if name not in CONVENTIONS:
            raise unknown_name("convention", name, [*CONVENTIONS, "all"])
    return list(CONVENTIONS) if len(chosen) < len(names) or not chosen else list(dict.fromkeys(chosen))


def compare_conventions(cases: Sequence[Case], names: Sequence[str] = ()) -> dict[str, Any]:
    """Score some rows in several conventions.

    Args:
        cases: The rows.
        names: Names of `CONVENTIONS`; none means all.

    Returns:
        Plain Python values: "n"; "kinds", the number of rows of each of `KINDS`; "conventions", for each its "source"
        and "rules", and its "scores" (None for one that is NaN there), or None with the "reason" why there are none;
        "differences", for pairs whose
        means are of the same score, "of" the one and "from" the other, the "points" of `explain_difference`, and what
        is not of rows: "averaging", such as a mean over classes.

    Raises:
        UnknownNameError: No such convention.

    Example:
        >>> import numpy as np
        >>> found = compare_conventions([Case.of(np.zeros((2, 2), dtype=bool), np.zeros((2, 2), dtype=bool))])
        >>> {name: (one["scores"] or {}).get("giou") for name, one in found["conventions"].items()}["rela"]
        >>> found["conventions"]["rela"]["reason"]
        'rela divides by zero on these rows: no pixel is true or predicted'
    """
    found: dict[str, Any] = {}
    for name in check_conventions(names):
        convention = CONVENTIONS[name]
        entry: dict[str, Any] = {"source": convention.source, "rules": dict(convention.rules)}
        try:
            scores = {score: None if math.isnan(value) else value for score, value in convention(cases).items()}
            reason = ""
        except ConventionError as error:
            scores, reason = None, str(error)
        found[name] = {**entry, "scores": scores, "reason": reason}
    kinds = {kind: sum(case.kind == kind for case in cases) for kind in KINDS}
    return {"n": len(cases), "kinds": kinds, "conventions": found, "differences": _differences(cases, found)}


def _differences(cases: Sequence[Case], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each convention from segrl's, or else from the first, for each score whose mean both explain."""
    scored = [name for name, entry in found.items() if entry["scores"] is not None]
    listed = []
    for mean in dict.fromkeys(mean for name in scored for mean in CONVENTIONS[name].rows):
        names = [name for name in scored if mean in CONVENTIONS[name].rows]
        base = "segrl" if "segrl" in names else names[0]
        for name in names:
            if name != base:
                points = _explained(cases, CONVENTIONS[base].rows[mean], CONVENTIONS[name].rows[mean])
                rest = found[name]["scores"][mean] - found[base]["scores"][mean] - math.fsum(points.values())
                listed.append({"of": name, "from": base, "score": mean, "points": points, "averaging": rest})
    return listed


def explain_difference(cases: Sequence[Case], first: str, second: str) -> dict[str, float]:
    """Divide the difference of two conventions' means over rows among the kinds of rows that cause it.

    Args:
        cases: The rows.
        first: A convention.
        second: Another that has a mean of the same score; gIoU where both have it.

    Returns:
        Points of the difference, second minus first, by kind; their sum is the difference of the means of the rows' own
        scores. A row that one of the two leaves out changes what all others weigh, and is counted with that.

    Raises:
        ConventionError: The means are of different scores, or one of the two has no rule for some of the rows.

    Example:
        >>> import numpy as np
        >>> nothing, square = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
        >>> cases = [Case.of(nothing, nothing), Case.of(square, square)]
        >>> explain_difference(cases, "vision_reasoner", "segrl")
        {'both empty': 0.5, 'plain': -0.5}
    """
    one, other = CONVENTIONS[first], CONVENTIONS[second]
    mean = next((mean for mean in one.rows if mean in other.rows), None)
    if mean is None:
        raise ConventionError(f"{first} averages {one.mean}, {second} {other.mean}; compare two of the same score")
    for convention in (one, other):
        convention(cases)  # raises where it has no rule
    return _explained(cases, one.rows[mean], other.rows[mean])


def _explained(cases: Sequence[Case], *rows: Callable[[Case], float | None]) -> dict[str, float]:
    shares = [_shares(row, cases) for row in rows]
    parts: dict[str, list[float]] = {}
    for case, before, after in zip(cases, *shares, strict=True):
        parts.setdefault(case.kind, []).append(after - before)
    return {kind: math.fsum(parts[kind]) for kind in KINDS if kind in parts}


def _shares(row: Callable[[Case], float | None], cases: Sequence[Case]) -> list[float]:
    """Return what each row adds to the mean."""
    values = [row(case) for case in cases]
    count = sum(value is not None for value in values)
    return [0.0 if value is None else value / count for value in values]


def conventions_page(found: Mapping[str, Any]) -> str:
    """Return what `compare_conventions` found as Markdown: the table, the rules with their sources, the rows.

    Example:
        >>> import numpy as np
        >>> square = np.ones((4, 4), dtype=bool)
        >>> print(conventions_page(compare_conventions([Case.of(square, square)], ["segrl"])).splitlines()[4])
        | gIoU | 100.00 |
    """
    ones = found["conventions"]
    known = {name for one in ones.values() for name in (one["scores"] or {})}
    lines = [f"# {found['n']} rows in {len(ones)} conventions, %", "", f"| | {' | '.join(ones)} |"]
    lines.append("| --- " * (1 + len(ones)) + "|")
    for score in (name for name in _ORDER if name in known):
        cells = [_cell(score, one["scores"] or {}) for one in ones.values()]
        lines.append(f"| {_TITLES.get(score, score)} | {' | '.join(cells)} |")
    lines += ["", *(f"- {one['reason']}" for one in ones.values() if one["reason"])]
    lines += ["", "## Rows", ""]
    lines += [f"- {count} {kind}: {KINDS[kind]}" for kind, count in found["kinds"].items() if count]
    if found["differences"]:
        kinds = [kind for kind, count in found["kinds"].items() if count]
        columns = ["all", *kinds, "averaging"]
        lines += ["", "## Differences, in points, by the rows that cause them", ""]
        lines += [f"| | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
        for one in found["differences"]:
            parts = [*(one["points"].get(kind, 0.0) for kind in kinds), one["averaging"]]
            values = [math.fsum(parts), *parts]
            what = f"{one['of']} - {one['from']}, {_TITLES.get(one['score'], one['score'])}"
            lines.append(f"| {what} | {' | '.join(f'{round(100 * value, 2) + 0.0:+.2f}' for value in values)} |")
        lines += ["", "A row that a convention leaves out changes what every other row weighs."]
        lines += ["What is not of rows, such as a mean over classes, is averaging."]
    lines += ["", "## Rules", ""]
    questions = list(dict.fromkeys(question for one in ones.values() for question in one["rules"]))
    lines += [f"| | {' | '.join(questions)} |", "| --- " * (1 + len(questions)) + "|"]
    lines += [f"| {name} | {' | '.join(one['rules'][q] for q in questions)} |" for name, one in ones.items()]
    lines += ["", *(f"- {name}: {one['source']}" for name, one in ones.items())]
    return "\n".join(lines) + "\n"


def _cell(score: str, scores: Mapping[str, float | None]) -> str:
    value = scores.get(score)
    if value is None:
        return "NaN" if score in scores else "-"
    return f"{value:.2f}" if score.startswith("hd95") else f"{100 * value:.2f}"
