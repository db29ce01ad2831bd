"""Slow, obvious re-statements of what the library computes fast; they share no code with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def pixels(mask: np.ndarray) -> set[tuple[int, ...]]:
    """The set of foreground coordinates."""
    return {tuple(map(int, index)) for index in np.argwhere(mask)}


def dice(pred: np.ndarray, true: np.ndarray) -> float:
    """Dice from sets of pixels; two empty sets agree."""
    a, b = pixels(pred), pixels(true)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def iou(pred: np.ndarray, true: np.ndarray) -> float:
    """IoU from sets of pixels; two empty sets agree."""
    a, b = pixels(pred), pixels(true)
    return len(a & b) / len(a | b) if a or b else 1.0


def components(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """8-connected components by flood fill."""
    remaining, found = pixels(mask), []
    while remaining:
        front, component = [remaining.pop()], set()
        while front:
            y, x = front.pop()
            component.add((y, x))
            for neighbour in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if neighbour in remaining:
                    remaining.remove(neighbour)
                    front.append(neighbour)
        found.append(component)
    return found


def box_around(component: set[tuple[int, ...]]) -> list[int]:
    """Half-open xyxy box around (y, x) pixels."""
    rows, columns = zip(*component, strict=True)
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


def area_average(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Share of every new pixel that the foreground covers, by exact rational rectangles."""
    (height, width), (new_height, new_width) = mask.shape, size_hw
    out = np.zeros(size_hw)
    for i, j in np.ndindex(size_hw):
        top, left = Fraction(i * height, new_height), Fraction(j * width, new_width)
        bottom, right = Fraction((i + 1) * height, new_height), Fraction((j + 1) * width, new_width)
        covered = Fraction(0)
        for y, x in pixels(mask):
            covered += max(min(bottom, y + 1) - max(top, y), 0) * max(min(right, x + 1) - max(left, x), 0)
        out[i, j] = covered / ((bottom - top) * (right - left))
    return out


def largest_total(gain: np.ndarray) -> float:
    """Largest total of a one-to-one assignment, by trying them all."""
    gain = gain if gain.shape[0] <= gain.shape[1] else gain.T
    rows, columns = gain.shape
    return max(
        sum(float(gain[row, column]) for row, column in enumerate(order))
        for order in itertools.permutations(range(columns), rows)
    )


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def dice_loss(logits: Sequence[float], target: Sequence[float], smoothing: float) -> float:
    """Soft Dice loss of one flattened mask, pixel by pixel."""
    overlap = sum(sigmoid(x) * t for x, t in zip(logits, target, strict=True))
    areas = sum(sigmoid(x) + t for x, t in zip(logits, target, strict=True))
    return 1 - (2 * overlap + smoothing) / (areas + smoothing)


def cross_entropy(logits: Sequence[float], target: Sequence[float]) -> float:
    """Mean binary cross-entropy of one flattened mask, pixel by pixel."""
    terms = [
        -t * math.log(sigmoid(x)) - (1 - t) * math.log(1 - sigmoid(x)) for x, t in zip(logits, target, strict=True)
    ]
    return sum(terms) / len(terms)


def surface(mask: np.ndarray) -> set[tuple[int, ...]]:
    """Foreground with a face neighbour that is not foreground; beyond the image nothing is."""
    inside = pixels(mask)
    steps = [step for step in itertools.product((-1, 0, 1), repeat=mask.ndim) if sum(map(abs, step)) == 1]
    return {p for p in inside if any(tuple(map(sum, zip(p, step, strict=True))) not in inside for step in steps)}


def rim(mask: np.ndarray, radius: int) -> set[tuple[int, ...]]:
    """Foreground whose square of 2 * radius + 1 around it is not all foreground."""
    inside = pixels(mask)
    steps = list(itertools.product(range(-radius, radius + 1), repeat=mask.ndim))
    return {p for p in inside if any(tuple(map(sum, zip(p, step, strict=True))) not in inside for step in steps)}


def boundary_iou(pred: np.ndarray, true: np.ndarray, dilation: float) -> float:
    """IoU of rims."""
    radius = max(1, round(dilation * math.dist(pred.shape, [0] * pred.ndim)))
    a, b = rim(pred, radius), rim(true, radius)
    return len(a & b) / len(a | b) if a or b else 1.0


def directed_distances(pred: np.ndarray, true: np.ndarray, spacing: Sequence[float]) -> list[float]:
    """Sorted distances of every surface element of `pred` to the surface of `true`, every pair measured."""

    def place(p: tuple[int, ...]) -> list[float]:
        return [index * step for index, step in zip(p, spacing, strict=True)]

    goals = [place(q) for q in surface(true)]
    return sorted(min((math.dist(place(p), goal) for goal in goals), default=math.inf) for p in surface(pred))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    rank = percent / 100 * (len(ordered) - 1)
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


def s_measure(pred: np.ndarray, true: np.ndarray, alpha: float) -> float:
    """Structure-measure of neither empty nor full masks, term by term as in the paper, with lists of pixels."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def uniform(values: Sequence[float]) -> float:
        x = mean(values)
        spread = math.sqrt(sum((v - x) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
        return 2 * x / (x**2 + 1 + spread)

    p = {(y, x): float(pred[y, x]) for y, x in np.ndindex(pred.shape)}
    t = {(y, x): float(true[y, x]) for y, x in np.ndindex(true.shape)}
    inside, outside = [q for q in t if t[q]], [q for q in t if not t[q]]
    share = len(inside) / len(t)
    objects = share * uniform([p[q] for q in inside]) + (1 - share) * uniform([1 - p[q] for q in outside])
    # Counted from 1, the centroid rounded half up is the last row and column of the upper left part.
    row, column = (math.floor(mean([q[axis] + 1 for q in inside]) + 0.5) for axis in (0, 1))
    regions = 0.0
    for upper, left in itertools.product((True, False), repeat=2):
        part = [q for q in t if (q[0] < row) == upper and (q[1] < column) == left]
        if not part:
            continue
        a, b = [p[q] for q in part], [t[q] for q in part]
        x, y = mean(a), mean(b)
        spread = sum((v - x) ** 2 for v in a) + sum((v - y) ** 2 for v in b)
        common = sum((v - x) * (w - y) for v, w in zip(a, b, strict=True))
        light = 2 * x * y / (x**2 + y**2) if x or y else 1.0
        regions += len(part) / len(t) * light * (1.0 if spread < 1e-12 else 2 * common / spread)
    return max(0.0, alpha * objects + (1 - alpha) * regions)
