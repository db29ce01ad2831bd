"""Metrics that also read probabilities: soft Dice, and the structure-measure.

A prediction is a mask (bool or integer) or an array of probabilities (float, in [0, 1]). Probabilities are empty if
none exceeds 0.5, that is, if their mask is. Empty masks follow `segrl.geometry.empty_score`.
"""

# H/W pixels, P prediction, T ground truth (0 or 1), n pixels

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError
from segrl.geometry.masks import empty_score, foreground

__all__ = ["s_measure", "soft_dice"]


def soft_dice(probability: ArrayLike, true: ArrayLike) -> float:
    """Compute the Dice of probabilities, ``2 sum(PT) / (sum P + sum T)``, without squares or smoothing.

    Args:
        probability: Probabilities in [0, 1], float, of any shape; a bool or integer mask scores its Dice.
        true: Ground truth mask of the same shape, bool or integer.

    Returns:
        A score in [0, 1]; both empty 1.0, exactly one empty 0.0.

    Raises:
        DataError: Shapes differ, or values outside of [0, 1].

    Example:
        >>> soft_dice([[0.75, 0.25]], [[1, 0]])
        0.75
    """
    guess, truth, empty = _read(probability, true)
    if empty is not None:
        return empty
    overlap, area = float(guess[truth].sum()), float(guess.sum())
    return 2 * overlap / (area + int(np.count_nonzero(truth)))


def s_measure(pred: ArrayLike, true: ArrayLike, alpha: float = 0.5) -> float:
    """Compute the structure-measure, ``alpha * S_object + (1 - alpha) * S_region`` (Fan et al. 2017).

    `S_object` is high if foreground and background are each uniform in the prediction and differ. With x the mean and
    s the standard deviation (n - 1) of P over the foreground of T, the foreground scores ``2x / (x^2 + 1 + s)``; the
    background does likewise with 1 - P, and the two are weighted by their areas. `S_region` is the mean SSIM of the
    four rectangles that meet at the centroid of T, weighted by their areas.

    Two differences from the published code, which scores some wrong masks high: empty masks follow
    `segrl.geometry.empty_score`; and a rectangle in which P and T are both constant scores its brightness term,
    ``2xy / (x^2 + y^2)``, where the original gives 1.0 even to all foreground against all background.

    Args:
        pred: (H, W) mask, bool or integer, or probabilities in [0, 1] as floats, which are empty if none exceeds 0.5.
        true: (H, W) ground truth mask, bool or integer.
        alpha: Weight of the object part, in [0, 1].

    Returns:
        A score in [0, 1], 1.0 for equal masks; both empty 1.0, exactly one empty 0.0. For a ground truth
        without background the score is the mean of the prediction.

    Raises:
        DataError: Shapes differ, values outside of [0, 1], or alpha out of range.

    Example:
        >>> true = np.zeros((8, 8), dtype=bool)
        >>> true[2:6, 2:6] = True
        >>> s_measure(true, true), s_measure(~true, true), round(s_measure(np.roll(true, 1), true), 3)
        (1.0, 0.0, 0.728)
    """
    if not 0 <= alpha <= 1:
        raise DataError(f"alpha={alpha}; expected a number in [0, 1]")
    guess, truth, empty = _read(pred, true)
    if truth.ndim != 2:
        raise DataError(f"true: expected shape (H, W), got {truth.shape}; score a volume slice by slice")
    if empty is not None:
        return empty
    ones = truth.astype(np.uint8)  # faster to sum than bool
    # The pixel that holds the centroid belongs to the upper left part; halves are rounded up.
    y, x = (math.floor(_mean_index(np.add.reduce(ones, axis=axis, dtype=np.uint32)) + 1.5) for axis in (1, 0))
    parts = [
        _sums(guess[up, left], truth[up, left])
        for up in (slice(None, y), slice(y, None))
        for left in (slice(None, x), slice(x, None))
    ]
    whole = _Sums(*map(sum, zip(*parts, strict=True)))
    if whole.t == whole.n:
        return float(whole.p / whole.n)
    share = whole.t / whole.n
    inside = _uniform(whole.t, whole.pt, whole.ppt)
    # Over the background, 1 - P has the sums n - sum P and n - 2 sum P + sum P^2.
    n, p, pp = whole.n - whole.t, whole.p - whole.pt, whole.pp - whole.ppt
    outside = _uniform(n, n - p, n - 2 * p + pp)
    objects = share * inside + (1 - share) * outside
    regions = sum(part.n / whole.n * _similarity(part) for part in parts if part.n)
    return float(min(max(alpha * objects + (1 - alpha) * regions, 0.0), 1.0))


def _read(pred: ArrayLike, true: ArrayLike) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Return the prediction as bool or float64, the ground truth, and the score if one of them is empty."""
    guess, truth = np.asarray(pred), foreground(true, "true", ndim=None)
    soft = np.issubdtype(guess.dtype, np.floating)
    if not soft:
        guess = foreground(guess, "pred", ndim=None)
    if guess.shape != truth.shape:
        raise DataError(f"pred: expected the shape of true {truth.shape}, got {guess.shape}; resize the prediction")
    if not soft or guess.size == 0:
        return guess, truth, empty_score(not guess.any(), not truth.any())
    low, high = float(guess.min()), float(guess.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise DataError(
            f"pred: expected probabilities in [0, 1], got values from {low} to {high}; pass the sigmoid of logits"
        )
    return guess.astype(np.float64, copy=False), truth, empty_score(high <= 0.5, not truth.any())


def _mean_index(counts: np.ndarray) -> float:
    return float(np.arange(len(counts)) @ counts / counts.sum())


class _Sums(NamedTuple):
    """Number of pixels, and the sums of P, T, PT, P^2 and P^2 T over them."""

    n: float
    p: float
    t: float
    pt: float
    pp: float
    ppt: float


def _sums(pred: np.ndarray, true: np.ndarray) -> _Sums:
    t = int(np.count_nonzero(true))
    if pred.dtype == np.bool_:
        p, pt = int(np.count_nonzero(pred)), int(np.count_nonzero(pred & true))
        return _Sums(pred.size, p, t, pt, p, pt)
    hit = pred[true]
    squares = float(np.vdot(pred, pred)), float(np.vdot(hit, hit))
    return _Sums(pred.size, float(pred.sum()), t, float(hit.sum()), *squares)


def _uniform(n: float, total: float, squares: float) -> float:
    """Compute ``2x / (x^2 + 1 + s)`` of n values from their sum and their sum of squares."""
    mean = total / n
    spread = math.sqrt(max(squares - n * mean * mean, 0.0) / (n - 1)) if n > 1 else 0.0
    return 2 * mean / (mean * mean + 1 + spread)


def _similarity(part: _Sums) -> float:
    """Compute the SSIM of P and T over one rectangle, without its constants."""
    x, y = part.p / part.n, part.t / part.n
    light = 1.0 if x == y else 2 * x * y / (x * x + y * y)
    # Where P and T are both constant the SSIM is 0 / 0 up to rounding; only the brightness term is left.
    spread = max(part.pp - part.p * x, 0.0) + (part.t - part.t * y)
    if spread <= 1e-12 * part.n:
        return light
    return light * 2 * (part.pt - part.p * y) / spread
