"""Where the hard cases begin: the tail of a set's errors, and two thresholds for it.

After CORE-Seg, section 3: "the tail is fitted by p(x) ~ x^-alpha, x >= x_min", alpha by the estimator of Clauset et al.
(2009, doi:10.1137/070710111), and the threshold is the knee of the fitted curve (Satopaa et al. 2011, "Finding a
'Kneedle' in a Haystack"). Silent there: how members vote, where the fit begins whose knee is x_min itself, the grid on
which the knee is sought, and what errors of exactly 1 count for. Each is a setting or said here.
"""

# n cases, m members of a committee

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from segrl.curation.packages import require
from segrl.errors import DataError

__all__ = ["Comparison", "Tail", "TailSettings", "find_tail", "vote"]

Vote = Literal["share", "mean", "median"]
Mode = Literal["knee", "clauset", "quantile"]
Start = Literal["nearest", "longest"]
REJECTED = 0.1  # p of a likelihood ratio below which its sign counts, as in Clauset et al.
_FEWEST_FITTED = 10  # distinct errors below which nothing is fitted
_KEPT = 0.990  # Stephens' modified statistic at p = 0.1, see `_longest`


@dataclass(frozen=True, kw_only=True)
class TailSettings:
    """Settings of vote and threshold, `difficulty: {tail: ...}`.

    Attributes:
        vote: How members agree on one error for a case (silent in the paper). "share": the largest error that a share
            of the members reaches, so that a case is hard if that share of the members says so; "mean"; "median".
        share: Of the members that must be beyond the threshold, for the vote "share".
        mode: What selects. "knee": the knee of the fitted curve, the paper's x_min. "clauset": `x_min`. "quantile": no
            fit.
        x_min: Where the power law begins. "nearest", as Clauset et al.: where the tail is nearest to its fit
            (Kolmogorov-Smirnov). "longest": the smallest error from which a test does not reject the fit, p >= 0.1
            (Corral and Deluca 2013, doi:10.2478/s11600-013-0154-9). Any tail of a power law is a power law, so the
            nearest one begins too late: by 20 % on average, and within 5 % of the truth with "longest"
            (`benchmarks/curation.py --estimators`).
        start: Quantile of the errors at which the fit begins whose knee is sought (silent: the paper's x_min is both).
        grid: Points of the grid on which the knee is sought, at equal distances from there to 1 (silent).
        sensitivity: S of Kneedle.
        fewest: Errors that a fit needs. With fewer, all sources of a modality are taken together, and if they are still
            too few the quantile selects.
        quantile: For the mode "quantile", and where a fit is not possible.

    Raises:
        DataError: A number out of range.

    Example:
        >>> TailSettings(share=0)
        Traceback (most recent call last):
        segrl.errors.DataError: share=0; expected more than 0, and 1 at most
    """

    vote: Vote = "share"
    share: float = 0.5
    mode: Mode = "knee"
    start: float = 0.5
    grid: int = 1001
    sensitivity: float = 1.0
    x_min: Start = "nearest"
    fewest: int = 50
    quantile: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DataError(f"share={self.share}; expected more than 0, and 1 at most")
        for name in ("start", "quantile"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}; expected 0 or more, and less than 1")
        if self.grid < 10 or self.sensitivity <= 0 or self.fewest < _FEWEST_FITTED:
            raise DataError(
                f"grid={self.grid}, sensitivity={self.sensitivity}, fewest={self.fewest}; expected 10 points or more, "
                f"a positive number, and {_FEWEST_FITTED} errors or more"
            )


@dataclass(frozen=True)
class Comparison:
    """Likelihood of the power law against that of another distribution, on the same errors.

    Attributes:
        other: Name of the other.
        ratio: Normalised log-likelihood ratio; positive where the power law fits better.
        p: Probability of a ratio so far from 0 if both fit alike; None where it cannot be computed.

    Example:
        >>> Comparison("lognormal", -2.0, 0.05).ratio < 0  # the lognormal fits better
        True
    """

    other: str
    ratio: float
    p: float | None


@dataclass(frozen=True)
class Tail:
    """Tail of the errors of one set.

    Attributes:
        errors: Number of errors.
        ones: Of exactly 1, complete misses. They are hard in any case and in no fit: a density has no ties at its
            bound.
        zeros: Of exactly 0, in no fit either.
        start: Error at which the fit begins whose knee is sought; None without a fit.
        start_alpha: Its exponent, by Clauset's estimator, which knows no upper bound.
        knee: Knee of that curve between `start` and 1; None where Kneedle finds none.
        knee_alpha: Exponent from the knee on; None where too few errors are beyond it.
        x_min: Where the power law begins, as the setting `x_min` says.
        alpha: Exponent from `x_min` on.
        alpha_error: Standard error of `alpha`, (alpha - 1) / sqrt(n).
        bounded_alpha: The exponent by maximum likelihood for a power law that ends at 1, as errors do.
        beyond: Errors from `x_min` on, those of exactly 1 left out.
        comparisons: With lognormal and exponential, from `x_min` on; as published, without the bound.
        threshold: The smallest error that is hard.
        selected_by: "knee", "clauset" or "quantile".
        notes: What a reader must know, such as that the tail is no power law.

    Example:
        >>> find_tail([0.1, 0.2, 0.6, 0.9]).notes
        ('4 errors, 4 of them between 0 and 1: too few to fit a tail; the quantile 0.5 selects',)
    """

    errors: int
    ones: int
    zeros: int
    start: float | None
    start_alpha: float | None
    knee: float | None
    knee_alpha: float | None
    x_min: float | None
    alpha: float | None
    alpha_error: float | None
    bounded_alpha: float | None
    beyond: int
    comparisons: tuple[Comparison, ...]
    threshold: float
    selected_by: Mode
    notes: tuple[str, ...]

    @property
    def power_law(self) -> bool | None:
        """Whether no other distribution fits better; None without a fit."""
        if self.x_min is None:
            return None
        return not any(found.ratio < 0 and found.p is not None and found.p < REJECTED for found in self.comparisons)


def vote(errors: ArrayLike, settings: TailSettings | None = None) -> np.ndarray:
    """Return one error for each case.

    Args:
        errors: (n, m), of each member, 0 to 1.
        settings: How members vote.

    Returns:
        (n,) float.

    Raises:
        DataError: Another shape, or an error that is not from 0 to 1.

    Example:
        >>> vote([[0.2, 0.9, 0.4]]).tolist(), vote([[0.2, 0.9, 0.4]], TailSettings(share=1.0)).tolist()
        ([0.4], [0.2])
    """
    settings = settings or TailSettings()
    values = np.asarray(errors, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise DataError(f"errors of the shape {values.shape}; expected (cases, members), one or more of both")
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError("errors: expected numbers from 0 to 1")
    if settings.vote == "mean":
        return values.mean(axis=1)
    if settings.vote == "median":
        return np.median(values, axis=1)
    needed = math.ceil(settings.share * values.shape[1] - 1e-9)
    return np.sort(values, axis=1)[:, values.shape[1] - needed]


def find_tail(errors: ArrayLike, settings: TailSettings | None = None) -> Tail:
    """Fit the tail of the errors of a set, and choose the threshold of its hard cases.

    Args:
        errors: (n,) of the cases, 0 to 1.
        settings: How.

    Raises:
        DataError: Errors out of range or none, or errors that are all equal: nothing tells hard from easy.
        SegRLError: The extra `curation` is not installed.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = find_tail(np.concatenate([rng.uniform(0.05, 0.15, 140), rng.uniform(0.6, 0.95, 60)]))
        >>> found.selected_by, bool(0.15 < found.threshold < 0.6)
        ('knee', True)
    """
    settings = settings or TailSettings()
    values = np.sort(np.asarray(errors, dtype=np.float64).reshape(-1))
    if not values.size or not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"{values.size} errors; expected one or more, each from 0 to 1")
    if values[0] == values[-1]:
        raise DataError(
            f"all {values.size} errors are {values[0]:.4g}: nothing tells hard cases from easy ones; train the "
            "committee longer (difficulty: {committee: {steps: ...}}), or look at its masks"
        )
    inner = values[(values > 0) & (values < 1)]
    counts = {
        "errors": values.size,
        "ones": int((values == 1).sum()),
        "zeros": int((values == 0).sum()),
    }
    notes = [f"{counts['ones']} complete misses (error 1) are hard, and in no fit"] if counts["ones"] else []
    by_quantile = float(np.quantile(values, settings.quantile))
    nothing: dict[str, Any] = dict.fromkeys(
        ("start", "start_alpha", "knee", "knee_alpha", "x_min", "alpha", "alpha_error", "bounded_alpha")
    )
    if values.size < settings.fewest or np.unique(inner).size < _FEWEST_FITTED:
        notes.append(f"{values.size} errors, {inner.size} of them between 0 and 1: too few to fit a tail; the quantile "
                     f"{settings.quantile:g} selects")  # fmt: skip
        return Tail(
            **counts, **nothing, beyond=0, comparisons=(), threshold=by_quantile, selected_by="quantile",
            notes=tuple(notes),
        )  # fmt: skip
    knee = _knee(inner, settings)
    clauset, more = _clauset(inner, settings.x_min)
    notes += more
    chosen: Mode = settings.mode
    threshold = {"knee": knee["knee"], "clauset": clauset["x_min"], "quantile": by_quantile}[chosen]
    if threshold is None:
        chosen, threshold = ("clauset", clauset["x_min"]) if clauset["x_min"] is not None else ("quantile", by_quantile)
        notes.append(f"no {settings.mode} was found; {chosen} selects")
    return Tail(**counts, **knee, **clauset, threshold=threshold, selected_by=chosen, notes=tuple(notes))


def _knee(inner: np.ndarray, settings: TailSettings) -> dict[str, Any]:
    """Fit from a quantile of the errors on, and find the knee of the fitted curve."""
    kneed = require("kneed")
    start = float(np.quantile(inner, settings.start))
    found: dict[str, Any] = {"start": start, "start_alpha": _alpha(inner, start), "knee": None, "knee_alpha": None}
    if found["start_alpha"] is None:
        return found
    grid = np.linspace(start, 1.0, settings.grid)
    curve = (grid / start) ** -found["start_alpha"]
    knee = kneed.KneeLocator(grid, curve, S=settings.sensitivity, curve="convex", direction="decreasing").knee
    if knee is not None:
        found |= {"knee": float(knee), "knee_alpha": _alpha(inner, float(knee))}
    return found


def _alpha(inner: np.ndarray, start: float) -> float | None:
    """The exponent by Clauset's estimator, 1 + n / sum(ln(x / start)); None where fewer than two errors differ."""
    logs = np.log(inner[inner >= start] / start)
    return float(1 + logs.size / logs.sum()) if logs.sum() > 0 else None


def _longest(inner: np.ndarray) -> float | None:
    """The smallest error from which a power law is not rejected at p = 0.1; None where it is from each.

    Logarithms of a power law are exponential, so this is Kolmogorov and Smirnov's test of an exponential whose rate is
    fitted, with the modified statistic and the bound of Stephens (1974, doi:10.1080/01621459.1974.10480196).
    """
    logs = np.log(inner)
    for at in np.unique(inner, return_index=True)[1][:-_FEWEST_FITTED]:
        beyond = logs[at + 1 :] - logs[at]
        n = beyond.size
        fitted = 1 - np.exp(-beyond * n / beyond.sum())
        ranks = np.arange(n)
        distance = max((fitted - ranks / n).max(), ((ranks + 1) / n - fitted).max())
        if (distance - 0.2 / n) * (math.sqrt(n) + 0.26 + 0.5 / math.sqrt(n)) < _KEPT:
            return float(inner[at])
    return None


def _clauset(inner: np.ndarray, begin: Start) -> tuple[dict[str, Any], list[str]]:
    powerlaw = require("powerlaw")
    names = ("x_min", "alpha", "alpha_error", "bounded_alpha")
    nothing = {**dict.fromkeys(names), "beyond": 0, "comparisons": ()}, ["no power law could be fitted"]
    longest = _longest(inner) if begin == "longest" else None
    if begin == "longest" and longest is None:
        return nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that are tried and thrown away
        fit = powerlaw.Fit(inner, xmin=longest, verbose=0)
        x_min = float(fit.xmin)
        if not math.isfinite(x_min):
            return nothing
        tail = inner[inner >= x_min]
        bounded = powerlaw.Power_Law(xmin=x_min, xmax=1.0, data=tail, force_numerical_fit=True, verbose=0)
        comparisons = tuple(_compared(fit, other) for other in ("lognormal", "exponential"))
    alpha = float(fit.power_law.alpha)
    found = {
        "x_min": x_min,
        "alpha": alpha,
        "alpha_error": (alpha - 1) / math.sqrt(tail.size),
        "bounded_alpha": float(bounded.alpha),
        "beyond": int(tail.size),
        "comparisons": comparisons,
    }
    better = [c.other for c in comparisons if c.ratio < 0 and c.p is not None and c.p < REJECTED]
    return found, [f"the tail is no power law: {' and '.join(better)} fit better"] if better else []


def _compared(fit: Any, other: str) -> Comparison:
    ratio, p = fit.distribution_compare("power_law", other, normalized_ratio=True)
    if not math.isfinite(ratio):  # equal likelihoods have no variance
        return Comparison(other, 0.0, None)
    return Comparison(other, float(ratio), float(p) if math.isfinite(p) else None)
