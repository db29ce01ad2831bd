"""Does curation find what was made hard? Recall and precision of the selection on planted hard cases.

    python benchmarks/curation.py --seeds 5            # 100 images each, 30 of them hard
    python benchmarks/curation.py --estimators         # Clauset's exponent and x_min on samples of power laws

Half of the hard cases are faint (an eighth of the others' contrast), the other half are thin arcs. Settings are
the defaults, but for images of 64 px, fewer steps and other encoders; each mode and vote selects from the same errors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from segrl.curation import (
    Case,
    CommitteeSettings,
    DifficultySettings,
    TailSettings,
    find_difficulty,
    find_tail,
    read_errors,
    vote,
)
from segrl.reports import say

__all__ = ["main"]

SIDE, COUNT, SHARE = 64, 100, 0.3
COMMITTEE = CommitteeSettings(
    encoders=("tu-regnetx_002", "tu-regnetx_002", "resnet18"), size=SIDE, steps=100, processes=1
)


def planted(folder: Path, seed: int) -> tuple[list[Case], set[str]]:
    """Draw cases, and return the ids of the hard ones with them."""
    cases, hard = [], set()
    for number in range(COUNT):
        rng = np.random.default_rng((seed, number))
        y, x = np.mgrid[:SIDE, :SIDE]
        top, left, radius = rng.uniform(16, SIDE - 16), rng.uniform(16, SIDE - 16), rng.uniform(6, 13)
        distance = np.hypot(y - top, (x - left) * rng.uniform(0.8, 1.25))
        mask, contrast = distance < radius, rng.uniform(60, 90)
        if number < SHARE * COUNT:
            hard.add(f"case{number:03d}")
            if number % 2:
                contrast /= 8
            else:
                turn = rng.uniform(0, 2 * np.pi)
                angle = (np.arctan2(y - top, x - left) - turn) % (2 * np.pi)
                mask = (abs(distance - radius) < 1.2) & (angle < 2.5)
        texture = gaussian_filter(rng.normal(0, 60, (SIDE, SIDE)), 2) + rng.normal(0, 6, (SIDE, SIDE))
        image = np.clip(90 + texture + contrast * mask, 0, 255).astype(np.uint8)
        paths = folder / f"{number}.png", folder / f"{number}_mask.png"
        Image.fromarray(image).save(paths[0])
        Image.fromarray(mask.astype(np.uint8) * 255).save(paths[1])
        cases.append(Case(f"case{number:03d}", *paths, "planted", "", "CT", "Lung", "nodule", "CC0-1.0"))
    return cases, hard


def measure(seeds: int) -> None:
    """Print recall and precision by vote and mode, mean and range over seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as home:
            cases, hard = planted(Path(home), seed)
            build = Path(home, "build")
            build.mkdir()
            find_difficulty(cases, DifficultySettings(committee=COMMITTEE), build)
            errors = read_errors(build)
        for kind in ("share", "mean", "median"):
            votes = vote([errors[case.id] for case in cases], TailSettings(vote=kind))
            for mode in ("knee", "clauset"):
                tail = find_tail(votes, TailSettings(vote=kind, mode=mode))
                chosen = {case.id for case, error in zip(cases, votes, strict=True) if error >= tail.threshold}
                right = len(chosen & hard)
                scores = right / len(hard), right / max(1, len(chosen))
                found.setdefault(f"{kind}, {mode}", []).append(scores)
                say(f"seed {seed}: {kind}, {mode}: threshold {tail.threshold:.3f}, recall {scores[0]:.2f}, precision "
                    f"{scores[1]:.2f}")  # fmt: skip
    for name, scores in found.items():
        (recall, precision), low, high = np.mean(scores, 0), np.min(scores, 0), np.max(scores, 0)
        say(f"{name}: recall {recall:.2f} ({low[0]:.2f} to {high[0]:.2f}), precision {precision:.2f} "
            f"({low[1]:.2f} to {high[1]:.2f})")  # fmt: skip


def estimators(samples: int = 20, alpha: float = 2.5, x_min: float = 0.01) -> None:
    """Print mean and standard error of Clauset's exponent, and x_min, on samples whose answer is known."""
    for name, inside, below in (("pure", 500, 0), ("uniform below x_min", 500, 500)):
        found = []
        for seed in range(samples):
            rng = np.random.default_rng(seed)
            parts = rng.uniform(0, x_min, below), x_min * (1 - rng.random(inside)) ** (-1 / (alpha - 1))
            values = np.concatenate(parts)
            tails = [find_tail(values[values < 1], TailSettings(x_min=begin)) for begin in ("nearest", "longest")]
            found.append([(tail.alpha, tail.x_min) for tail in tails])
        for begin, pairs in zip(("nearest", "longest"), np.array(found).transpose(1, 2, 0), strict=True):
            (exponent, start), errors = pairs.mean(axis=1), pairs.std(axis=1, ddof=1) / samples**0.5
            say(f"{name}, {begin}: exponent {exponent:.3f} ± {errors[0]:.3f} (is {alpha}); x_min / truth "
                f"{start / x_min:.3f} ± {errors[1] / x_min:.3f}, median {np.median(pairs[1]) / x_min:.3f}")  # fmt: skip


def plain_x_min(values: np.ndarray) -> float:
    """Find x_min as Clauset et al. say, without a package: the start whose tail is nearest to its own fit."""
    ordered = np.sort(values)
    logs = np.log(ordered)
    best, found = 2.0, ordered[0]
    for start in range(len(ordered) - 1):
        rest = logs[start:] - logs[start]
        if rest.sum() > 0:
            fitted = 1 - np.exp(-rest * len(rest) / rest.sum())
            distance = float(abs(fitted - np.arange(len(rest)) / len(rest)).max())
            best, found = min((best, found), (distance, ordered[start]))
    return float(found)


def starts(x_min: float = 0.01, alpha: float = 2.5) -> None:
    """Print how far Clauset's x_min is off on samples of several sizes, and whether `find_tail` gives the same."""
    for count, samples in ((500, 200), (2000, 200), (5000, 60)):
        ratios, same = [], 0
        for seed in range(samples):
            values = x_min * (1 - np.random.default_rng(seed).random(count)) ** (-1 / (alpha - 1))
            values = values[values < 1]
            found = plain_x_min(values)
            ratios.append(found / x_min)
            same += count == 500 and seed < 20 and bool(np.isclose(found, find_tail(values).x_min or 0))
        mean, error, median = np.mean(ratios), np.std(ratios, ddof=1) / samples**0.5, np.median(ratios)
        near = np.mean(abs(np.array(ratios) - 1) < 0.1)
        say(f"{count} errors, {samples} samples: x_min / truth {mean:.3f} ± {error:.3f}, median {median:.3f}, in 10 % "
            f"{near:.2f}" + (f"; find_tail gives the same on {same} of 20" if count == 500 else ""))  # fmt: skip


def main() -> None:
    """Measure what the flags ask for."""
    parser = argparse.ArgumentParser(description="Recall and precision of the selection on planted hard cases.")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="of the planted sets")
    parser.add_argument("--estimators", action="store_true", help="measure Clauset's estimators instead")
    arguments = parser.parse_args()
    if arguments.estimators:
        estimators()
        starts()
    else:
        measure(arguments.seeds)


if __name__ == "__main__":
    main()
