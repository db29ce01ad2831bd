"""Steps that transform the scores of a reward, applied in order: clip, scale, schedule, gate, group-relative.

A score of None (the reward does not apply) stays None in every step.
"""

# n rows

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from segrl.errors import RewardError
from segrl.rewards.base import Batch, Scorer, Scores
from segrl.rewards.registry import Range

__all__ = ["STEPS", "Clip", "Gate", "GroupMode", "GroupRelative", "Scale", "Schedule", "Step"]

GroupMode = Literal["rank", "center", "zscore", "best"]


class Step:
    """One step; `apply` maps scores to scores, `bounds` maps the range of the scores."""

    key: ClassVar[str]

    @property
    def others(self) -> tuple[Scorer, ...]:
        """Other rewards that this step evaluates."""
        return ()

    @property
    def compares_answers(self) -> bool:
        """Whether a score after this step depends on the other answers to the prompt."""
        return any(other.compares_answers for other in self.others)

    async def apply(self, scores: Scores, batch: Batch, bounds: Range | None) -> Scores:
        """Return the scores of a batch after this step.

        Args:
            scores: n scores.
            batch: The rows.
            bounds: Range of the scores before this step, if it is known.
        """
        return [None if score is None else self.map(score, batch) for score in scores]

    def map(self, score: float, batch: Batch) -> float:
        """Return one score after a step that needs no other row."""
        raise AssertionError(f"{type(self).__name__} maps whole batches")

    def bounds(self, before: Range | None) -> Range | None:
        """Return the range after this step."""
        return before


@dataclass(frozen=True)
class Clip(Step):
    """Limit scores to [low, high].

    Example:
        >>> from segrl.rewards import make_reward
        >>> make_reward("box_giou").clip(0.0, 0.5).range
        (0.0, 0.5)
    """

    low: float
    high: float
    key: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise RewardError(f"clip: low={self.low}, high={self.high}; expected low <= high")

    def map(self, score: float, batch: Batch) -> float:
        return min(max(score, self.low), self.high)

    def bounds(self, before: Range | None) -> Range:
        low, high = before or (-math.inf, math.inf)
        return min(max(low, self.low), self.high), min(max(high, self.low), self.high)


@dataclass(frozen=True)
class Scale(Step):
    """Map scores to `factor * score + offset`.

    Example:
        >>> from segrl.rewards import make_reward
        >>> make_reward("box_f1").scale(-2, 0.5).range
        (-1.5, 0.5)
    """

    factor: float
    offset: float = 0.0
    key: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        _check_finite("scale", factor=self.factor, offset=self.offset)

    def map(self, score: float, batch: Batch) -> float:
        return self.factor * score + self.offset

    def bounds(self, before: Range | None) -> Range | None:
        if before is None:
            return None
        low, high = sorted(self.factor * end + self.offset for end in before)
        return low, high


@dataclass(frozen=True)
class Schedule(Step):
    """Multiply scores by a factor that depends on the training progress, linearly interpolated between points.

    Attributes:
        points: (progress, factor) pairs, or a mapping; progress is 0 at the first step of training and 1 at the last.
            The factor is constant before the first point and after the last.

    Example:
        >>> Schedule(((0, 0), (0.5, 2))).factor(0.25)
        1.0
    """

    points: tuple[tuple[float, float], ...]
    key: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        pairs: Any = self.points.items() if isinstance(self.points, dict) else self.points
        try:
            points = tuple(sorted((float(progress), float(factor)) for progress, factor in pairs))
        except (TypeError, ValueError):
            points = ()
        ends = [progress for progress, _ in points]
        if not points or len(set(ends)) < len(ends) or not all(0 <= p <= 1 and math.isfinite(f) for p, f in points):
            raise RewardError(
                f"schedule: points={self.points!r}; expected factors by progress in [0, 1], such as {{0: 0, 0.3: 1}}"
            )
        object.__setattr__(self, "points", points)

    def factor(self, progress: float) -> float:
        """Return the factor at a progress in [0, 1]."""
        ends, factors = zip(*self.points, strict=True)
        return float(np.interp(progress, ends, factors))

    def map(self, score: float, batch: Batch) -> float:
        return score * self.factor(batch.progress)

    def bounds(self, before: Range | None) -> Range | None:
        if before is None:
            return None
        factors = [factor for _, factor in self.points]
        ends = [end * factor for end in before for factor in (min(factors), max(factors))]
        return min(ends), max(ends)


@dataclass(frozen=True)
class Gate(Step):
    """Keep the score only where another reward exceeds `above`; elsewhere the score is `otherwise`.

    Attributes:
        reward: The other reward, a `Reward`. The gate is closed where it does not apply (None).
        above: Its score must exceed this.
        otherwise: Score behind a closed gate. By default 0.0, or the lowest value of the gated reward if that is
            below 0, so that closing the gate never raises the score.

    Example:
        >>> from segrl.rewards import make_reward
        >>> make_reward("box_giou").gate("format").range, make_reward("box_giou").gate("format", otherwise=-3).range
        ((-1.0, 1.0), (-3, 1.0))
    """

    reward: Scorer
    above: float = 0.0
    otherwise: float | None = None
    key: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        _check_finite("gate", above=self.above, otherwise=0.0 if self.otherwise is None else self.otherwise)

    @property
    def others(self) -> tuple[Scorer, ...]:
        return (self.reward,)

    async def apply(self, scores: Scores, batch: Batch, bounds: Range | None) -> Scores:
        conditions = await self.reward.evaluate(batch)
        closed = self._closed(bounds)
        return [
            score if score is None or (condition is not None and condition > self.above) else closed
            for score, condition in zip(scores, conditions, strict=True)
        ]

    def bounds(self, before: Range | None) -> Range | None:
        closed = self._closed(before)
        return None if before is None else (min(before[0], closed), max(before[1], closed))

    def _closed(self, bounds: Range | None) -> float:
        if self.otherwise is not None:
            return self.otherwise
        return 0.0 if bounds is None or not math.isfinite(bounds[0]) else min(0.0, bounds[0])


@dataclass(frozen=True)
class GroupRelative(Step):
    """Score each answer relative to the other answers to the same prompt. Scores of None are left out.

    Attributes:
        mode: "rank" is the share of the others that the answer beats, a tie counting half, in [0, 1] (0.5 for a single
            answer); "center" subtracts the group's mean; "zscore" also divides by its standard deviation (0 if all are
            equal); "best" is 1 for the highest score and 0 for all others (1 for all if all are equal).
        group_size: Number of consecutive rows of a group. By default a group is a run of rows with the same prompt and
            the same ground truth; give the size if a data set repeats rows.

    Example:
        >>> from segrl.predictions import Frame, parse_completion
        >>> from segrl.rewards import make_reward
        >>> texts = ["<think>a</think><answer>No lesion is visible.<seg></answer>", "no answer", "none"]
        >>> answers = [parse_completion(text, Frame("original_px", (8, 8))) for text in texts]
        >>> make_reward("format").group_relative("rank").score_batch(answers, [None] * 3)
        [1.0, 0.25, 0.25]
    """

    mode: GroupMode = "rank"
    group_size: int | None = None
    key: ClassVar[str] = "group_relative"

    def __post_init__(self) -> None:
        if self.mode not in get_args(GroupMode):
            raise RewardError(f"group_relative: mode={self.mode!r}; expected one of {', '.join(get_args(GroupMode))}")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise RewardError(f"group_relative: group_size={self.group_size!r}; expected a positive whole number")

    @property
    def compares_answers(self) -> bool:
        return True

    async def apply(self, scores: Scores, batch: Batch, bounds: Range | None) -> Scores:
        result: Scores = [None] * len(scores)
        for rows in self._groups(batch):
            present = [row for row in rows if scores[row] is not None]
            relative = self._relative(np.array([scores[row] for row in present], dtype=np.float64))
            for row, value in zip(present, relative.tolist(), strict=True):
                result[row] = value
        return result

    def bounds(self, before: Range | None) -> Range | None:
        if self.mode in ("rank", "best"):
            return 0.0, 1.0
        if self.mode == "center" and before is not None:
            return before[0] - before[1], before[1] - before[0]
        return None

    def _groups(self, batch: Batch) -> Sequence[Sequence[int]]:
        if self.group_size is None:
            return batch.groups()
        n = len(batch)
        if n % self.group_size:
            raise RewardError(f"group_relative: {n} rows are not a multiple of group_size={self.group_size}")
        return [range(start, start + self.group_size) for start in range(0, n, self.group_size)]

    def _relative(self, scores: np.ndarray) -> np.ndarray:
        if len(scores) == 0:
            return scores
        if self.mode == "best":
            return (scores == scores.max()).astype(np.float64)
        if self.mode == "rank":
            if len(scores) == 1:
                return np.array([0.5])
            beaten = (scores[:, None] > scores).sum(1) + ((scores[:, None] == scores).sum(1) - 1) / 2
            return beaten / (len(scores) - 1)
        if not np.ptp(scores):
            return np.zeros_like(scores)
        centered = scores - scores.mean()
        if self.mode == "center":
            return centered
        unit = centered / np.abs(centered).max()  # the square of a tiny difference would be 0
        return unit / unit.std()


STEPS: dict[str, type[Step]] = {step.key: step for step in (Clip, Scale, Schedule, Gate, GroupRelative)}


def _check_finite(step: str, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"{step}: {name}={value!r}; expected a finite number")
