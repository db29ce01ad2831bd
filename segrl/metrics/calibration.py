"""Confidence against scores: is an answer that is sure of itself better, and does its confidence mean what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError

__all__ = ["calibration", "certain_half_gain", "reliability", "risk_coverage"]


def reliability(confidence: ArrayLike, score: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """Compute a reliability diagram: the mean score of answers by their confidence (Guo et al. 2017).

    Args:
        confidence: (n,) in [0, 1].
        score: (n,) in [0, 1], such as Dice.
        bins: Of equal width; those without answers are left out.

    Returns:
        "bins", for each its "confidence" and "score", both means, and "n"; and "ece", the expected calibration error,
        the mean distance of the two, weighted by n.

    Raises:
        DataError: No answers, different lengths, or numbers outside [0, 1].

    Example:
        >>> found = reliability([0.9, 0.9, 0.1], [1.0, 0.6, 0.1])
        >>> [(item["n"], item["score"]) for item in found["bins"]], round(found["ece"], 3)
        ([(1, 0.1), (2, 0.8)], 0.067)
    """
    sure, scores = _pair(confidence, score)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    found = [
        {"confidence": float(sure[here].mean()), "score": float(scores[here].mean()), "n": int(here.sum())}
        for number in range(bins)
        if (here := place == number).any()
    ]
    ece = sum(abs(item["confidence"] - item["score"]) * item["n"] for item in found) / len(sure)
    return {"bins": found, "ece": float(ece)}


def risk_coverage(confidence: ArrayLike, score: ArrayLike) -> dict[str, Any]:
    """Compute the risk-coverage curve (Geifman and El-Yaniv 2017): what is lost if only the surest answers are kept.

    Args:
        confidence: (n,) in [0, 1].
        score: (n,) in [0, 1]; the risk of an answer is 1 minus its score.

    Returns:
        "coverage" and "risk", (n,): the share of answers that are kept, surest first, and their mean risk, and "aurc",
        the mean of the risks. Answers of equal confidence are kept together: each has the mean risk of them all.

    Raises:
        DataError: See `reliability`.

    Example:
        >>> curve = risk_coverage([0.9, 0.2, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0])
        >>> curve["coverage"], [round(risk, 3) for risk in curve["risk"]], round(curve["aurc"], 3)
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.25, 0.333, 0.5], 0.271)
    """
    sure, scores = _pair(confidence, score)
    ordered = np.argsort(-sure, kind="stable")
    _, equal, counts = np.unique(sure[ordered], return_inverse=True, return_counts=True)
    loss = (np.bincount(equal, 1 - scores[ordered]) / counts)[equal]
    kept = np.arange(1, len(loss) + 1)
    risk = np.cumsum(loss) / kept
    return {"coverage": (kept / len(loss)).tolist(), "risk": risk.tolist(), "aurc": float(risk.mean())}


def certain_half_gain(
    confidence: ArrayLike, score: ArrayLike, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> list[float]:
    """Compute how much better the more certain half of the answers is than the rest.

    Args:
        confidence: (n,) in [0, 1], n of 2 or more.
        score: (n,) in [0, 1].
        level: Coverage of the interval.
        n_resamples: How often the answers are redrawn with replacement, and divided anew.
        seed: The same seed and values give the same interval.

    Returns:
        Mean score of the more certain half minus that of the others, and the ends of its bootstrap interval.

    Raises:
        DataError: See `reliability`; or fewer than two answers.

    Example:
        >>> certain_half_gain([0.9] * 50 + [0.1] * 50, [1.0] * 50 + [0.5] * 50)[0]
        0.5
    """
    sure, scores = _pair(confidence, score)
    if len(sure) < 2:
        raise DataError(f"confidence: {len(sure)} answer; two halves need 2 or more")
    rng = np.random.default_rng(seed)

    def gain(chosen: np.ndarray) -> float:
        ordered = chosen[np.argsort(-sure[chosen], kind="stable")]
        half = len(ordered) // 2
        return float(scores[ordered[:half]].mean() - scores[ordered[half:]].mean())

    drawn = [gain(rng.integers(0, len(sure), len(sure))) for _ in range(n_resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return [gain(np.arange(len(sure))), float(low), float(high)]


def calibration(confidence: Sequence[float], score: Sequence[float]) -> dict[str, Any]:
    """Return `reliability`, `risk_coverage` and, of two answers or more, `certain_half_gain` in one mapping.

    Example:
        >>> sorted(calibration([0.9, 0.1], [1.0, 0.0]))
        ['aurc', 'bins', 'certain_half_gain', 'coverage', 'ece', 'n', 'risk']
    """
    gain = certain_half_gain(confidence, score) if len(confidence) > 1 else None
    return {
        "n": len(confidence),
        **reliability(confidence, score),
        **risk_coverage(confidence, score),
        "certain_half_gain": gain,
    }


def _pair(confidence: ArrayLike, score: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    sure, scores = np.asarray(confidence, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if sure.ndim != 1 or sure.shape != scores.shape or not sure.size:
        raise DataError(f"confidence and score: shapes {sure.shape} and {scores.shape}; expected (n,), n of 1 or more")
    for name, values in (("confidence", sure), ("score", scores)):
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError(f"{name}: {values[~((values >= 0) & (values <= 1))][0]}; expected numbers in [0, 1]")
    return sure, scores
