"""Are judges to be trusted? Agreement of two on a sample, and planted faults that rules and a judge find."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from segrl.curation.case import Case
from segrl.curation.facts import read_facts
from segrl.curation.judges import PARTS, JudgeSettings, Verdict
from segrl.curation.packages import require
from segrl.curation.planted import KINDS, plant
from segrl.curation.rules import RuleSettings, check_text

__all__ = ["judge_agreement", "judge_calibration", "weighted_kappa"]

_GRADES = 11  # a score of 0 to 1 in tenths


class Scored(Protocol):
    """Whatever has scores."""

    @property
    def scores(self) -> Any: ...
    @property
    def score(self) -> float: ...


def weighted_kappa(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Compute Cohen's kappa of scores in tenths, weighted by the squares of their differences.

    Args:
        first: Scores from 0 to 1.
        second: Of the same texts by another judge.

    Returns:
        At most 1; 0 for agreement by chance. None without scores, or where all of both are one grade, which says
        nothing.

    Raises:
        SegRLError: The extra `curation` is not installed.

    Example:
        >>> weighted_kappa([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]), weighted_kappa([0.8, 0.8], [0.8, 0.8])
        (1.0, None)
    """
    grades = [[round(score * (_GRADES - 1)) for score in scores] for scores in (first, second)]
    if not grades[0] or len({*grades[0], *grades[1]}) == 1:
        return None
    metrics = require("sklearn.metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 is None here
        kappa = float(metrics.cohen_kappa_score(*grades, labels=list(range(_GRADES)), weights="quadratic"))
    return round(kappa, 6) if math.isfinite(kappa) else None


def judge_agreement(first: Sequence[Scored], second: Sequence[Verdict]) -> dict[str, Any]:
    """Compare two judges.

    Args:
        first: Scored texts.
        second: Verdicts of the other judge on the same.

    Returns:
        Number of texts that both scored, weighted kappa of S and of its parts, and the mean difference of S.

    Example:
        >>> verdicts = [Verdict(dict.fromkeys(PARTS, score)) for score in (0.2, 1.0)]
        >>> judge_agreement(verdicts, verdicts)["kappa"]["S"]
        1.0
    """
    both = [(one, other) for one, other in zip(first, second, strict=True) if one.scores and other.scores]
    kappa = {"S": weighted_kappa([one.score for one, _ in both], [other.score for _, other in both])}
    for part in PARTS:
        pairs = [(one.scores[part], other.scores[part]) for one, other in both]
        kappa[part] = weighted_kappa([one for one, _ in pairs], [other for _, other in pairs])
    difference = sum(other.score - one.score for one, other in both) / len(both) if both else None
    return {
        "texts": len(both),
        "without_verdict": len(first) - len(both),
        "kappa": kappa,
        "mean_difference": None if difference is None else round(difference, 6),
    }


def judge_calibration(
    texts: Sequence[tuple[Case, str, str]],
    settings: JudgeSettings,
    rules: RuleSettings,
    judge_all: Callable[[Sequence[tuple[Case, str, str, str]]], Sequence[Verdict]],
) -> dict[str, Any]:
    """Plant faults in accepted texts, and count which of them rules and judge find.

    Args:
        texts: Case, question and reasoning, at least one; the kinds of faults take turns.
        settings: With the number of texts and the threshold.
        rules: What the rules ask of a text.
        judge_all: Asks the judge, also for texts that the rules have found.

    Returns:
        By kind: number, found by rules, by the judge, and by either. Unread verdicts count as not found.
    """
    planted = []
    for number in range(settings.calibration):
        case, query, reasoning = texts[number % len(texts)]
        kind = KINDS[number % len(KINDS)]
        facts = read_facts(case)
        bad = plant(reasoning, facts, kind, random.Random(f"{case.id} {number}"))
        checked = check_text(bad, facts, rules)
        planted.append((kind, case, query, bad, bool(checked.problems or checked.removed)))
    items = [(case, query, bad, f"calibration {number}") for number, (_, case, query, bad, _) in enumerate(planted)]
    verdicts = judge_all(items)
    counts: dict[str, Any] = {}
    for (kind, *_, by_rules), verdict in zip(planted, verdicts, strict=True):
        by_judge = bool(verdict.scores) and verdict.score < settings.threshold
        row = counts.setdefault(kind, {"texts": 0, "rules": 0, "judge": 0, "either": 0})
        row["texts"] += 1
        row["rules"] += by_rules
        row["judge"] += by_judge
        row["either"] += by_rules or by_judge
    return counts
