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
