"""Types that every part of a reward works on: the batch, its scores, and other rewards as `Scorer`."""

# n rows

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from segrl.errors import RewardError
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.prediction import Prediction
from segrl.rewards.columns import AnyTarget, position, same_target
from segrl.rewards.registry import RewardInfo

__all__ = ["Batch", "Scorer", "Scores", "ignore_metric", "progress_of", "run"]

_T = TypeVar("_T")
Scores = list[float | None]


class Scorer(Protocol):
    """A reward as the sums and gates that hold it see it; `Reward` is the one implementation."""

    @property
    def name(self) -> str:
        """Name in logs and errors."""
        ...

    @property
    def info(self) -> RewardInfo:
        """Its declarations."""
        ...

    @property
    def completion_format(self) -> CompletionFormat:
        """Format in which completions are parsed without a `prediction` column."""
        ...

    @property
    def is_async(self) -> bool:
        """Whether evaluating it may wait."""
        ...

    @property
    def compares_answers(self) -> bool:
        """Whether an answer's score depends on the other answers to its prompt."""
        ...

    async def evaluate(self, batch: Batch) -> Scores:
        """Return one score per row."""
        ...


def ignore_metric(name: str, value: float) -> None:
    """Stand in for `log_metric` outside of training."""


@dataclass(eq=False)
class Batch:
    """The rows that are scored together, and what the trainer knows about them.

    Attributes:
        predictions: n predictions.
        targets: n targets; None where there is no ground truth.
        group_ids: n ids, equal for the answers to one prompt; None finds the groups, see `groups`.
        progress: Training progress in [0, 1].
        log_metric: TRL's function to log a number.
        call: TRL's keyword arguments; empty outside of a trainer.
        columns: Data set columns for TRL functions outside of a trainer, n values each.
    """

    predictions: Sequence[Prediction]
    targets: Sequence[AnyTarget]
    group_ids: Sequence[Hashable] | None = None
    progress: float = 1.0
    log_metric: Callable[[str, float], None] = ignore_metric
    call: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.predictions)

    def checked(self, name: str) -> Batch:
        """Return the batch, or raise `RewardError` with the name of the reward if lengths differ."""
        n = len(self)
        if len(self.targets) != n:
            raise RewardError(
                f"reward {name!r}: {n} predictions but {len(self.targets)} targets; expected one target per prediction"
            )
        if self.group_ids is not None and len(self.group_ids) != n:
            raise RewardError(f"reward {name!r}: {len(self.group_ids)} group ids for {n} predictions")
        for column, values in self.columns.items():
            if len(values) != n:
                raise RewardError(f"reward {name!r}: column {column!r} has {len(values)} rows for {n} predictions")
        return self

    def groups(self) -> list[list[int]]:
        """Return the rows of each group: those with equal ids, or consecutive ones with equal prompt and target."""
        if self.group_ids is not None:
            by_id: dict[Hashable, list[int]] = {}
            for row, key in enumerate(self.group_ids):
                by_id.setdefault(key, []).append(row)
            return list(by_id.values())
        prompts = self.call.get("prompts") or [None] * len(self)
        found: list[list[int]] = []
        for row in range(len(self)):
            start = found[-1][0] if found else row
            if start < row and prompts[row] == prompts[start] and same_target(self.targets[row], self.targets[start]):
                found[-1].append(row)
            else:
                found.append([row])
        return found

    def where(self, name: str, row: int) -> str:
        """Return the reward and the row, for an error."""
        target = self.targets[row]
        return position(name, row if len(self) > 1 or self.call else None, target.name if target else "")


def run(coroutine: Coroutine[Any, Any, _T], is_async: bool) -> _T:
    """Run a coroutine to its end; one that never waits needs no event loop."""
    if not is_async:
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("a reward that is not async has awaited something")
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:  # in a notebook, whose loop is running
        return pool.submit(asyncio.run, coroutine).result()


def progress_of(state: Any) -> float:
    """Return the training progress in [0, 1] from a trainer's state; 1 without one."""
    if state is None:
        return 1.0
    step, last = getattr(state, "global_step", 0), getattr(state, "max_steps", 0)
    return min(step / last, 1.0) if last > 0 else 0.0
