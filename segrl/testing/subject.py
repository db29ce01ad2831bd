"""The parts of `check_reward`: the reward under test, batches as examples, and properties that can be violated."""

# H/W pixels

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np

from segrl.errors import RewardError
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target, VolumeTarget
from segrl.rewards.reward import Reward
from segrl.rewards.transforms import GroupRelative

__all__ = ["AnyTarget", "Property", "Rows", "Subject", "Violation", "array_fields", "group_size", "leaves", "same"]

AnyTarget = Target | VolumeTarget
ARRAYS = {
    Prediction: ("boxes", "points", "scores", "mask", "probability"),
    Target: ("mask", "boxes"),
    VolumeTarget: ("mask",),
}
TOLERANCE = 1e-5  # of scores computed in two ways: a reward may work in float32
TRL_COLUMNS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra", "prediction", "target",
     "query", "modality", "anatomy", "lesion", "name", "mask", "boxes"}
)  # fmt: skip


class Violation(Exception):
    """A property does not hold for an example."""

    def __init__(self, expected: str, found: str, rows: Rows | None = None) -> None:
        super().__init__(expected, found)
        self.expected, self.found, self.rows = expected, found, rows


@dataclass(eq=False)
class Rows:
    """An example: a batch, the training progress, and a number that picks how it is mirrored, enlarged and shuffled.

    Attributes:
        predictions: n predictions.
        targets: n targets.
        groups: n ids; the rows of a group are consecutive.
        progress: Training progress in [0, 1].
        choice: A number from 0 to 5.
        before: Copies of all arrays.
        scores: The first scores of this example, see `Subject.scores_of`.
    """

    predictions: list[Prediction]
    targets: list[Any]
    groups: list[Hashable]
    progress: float = 1.0
    choice: int = 0
    before: list[dict[str, np.ndarray]] = field(init=False)
    scores: list[float | None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        records = [record for record in (*self.predictions, *self.targets) if record is not None]
        self.before = [array_fields(record, copied=True) for record in records]

    def some(self, rows: Sequence[int]) -> Rows:
        """Return these rows, in this order."""
        return Rows(
            [self.predictions[row] for row in rows],
            [self.targets[row] for row in rows],
            [self.groups[row] for row in rows],
            self.progress,
            self.choice,
        )

    def changed(self, how: Callable[[Prediction, Any], tuple[Prediction, Any]]) -> Rows:
        """Return the rows after a change; rows that share a target still do."""
        pairs = [how(*pair) for pair in zip(self.predictions, self.targets, strict=True)]
        known: dict[int, Any] = {}
        targets = [known.setdefault(id(old), new) for old, (_, new) in zip(self.targets, pairs, strict=True)]
        return Rows([new for new, _ in pairs], targets, self.groups, self.progress, self.choice)


def array_fields(record: Any, copied: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays of a prediction or target by name."""
    found = {name: getattr(record, name) for name in ARRAYS[type(record)]}
    return {name: array.copy() if copied else array for name, array in found.items() if array is not None}


@dataclass(eq=False)
class Subject:
    """The reward under test.

    Attributes:
        reward: The reward.
        columns: Values of the other data set columns that its TRL functions read, the same for all rows.
        returned: How often it returned each score, over the examples.
    """

    reward: Reward
    columns: Mapping[str, Any] = field(default_factory=dict)
    returned: Counter[float | None] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.info = self.reward.info
        self.group_size = group_size(self.reward)
        self.has_trl_function = False
        for leaf in leaves(self.reward):
            info = leaf.info
            if info.form == "trl":
                self.has_trl_function = True
                self._check_columns(leaf.function, info.name)

    def _check_columns(self, function: Callable[..., Any], name: str) -> None:
        for parameter in inspect.signature(function).parameters.values():
            named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if named and parameter.default is parameter.empty and parameter.name not in {*TRL_COLUMNS, *self.columns}:
                raise RewardError(
                    f"reward {name!r} reads the column {parameter.name!r}; "
                    f"pass check_reward(..., columns={{{parameter.name!r}: value}})"
                )

    @cached_property
    def formats(self) -> list[CompletionFormat]:
        """The completion formats to test: the reward's, and except for volumes also the other one."""
        own = self.reward.completion_format
        other = "text" if own.answer_format == "json" else "json"
        return [own] if self.info.volume else [own, replace(own, answer_format=other)]

    def score(self, rows: Rows) -> list[float | None]:
        """Return the scores. Any exception is a violation, since model text is data."""
        predictions, targets = list(rows.predictions), list(rows.targets)
        try:
            if self.has_trl_function:
                columns = {"mask": [target.mask for target in targets], "boxes": [_boxes(target) for target in targets]}
                return self.called(rows, prediction=predictions, target=targets, **columns)
            return self.reward.score_batch(predictions, targets, groups=list(rows.groups), progress=rows.progress)
        except Exception as error:  # any exception of a user's code is the finding
            expected = "one finite number or None per row, and no exception, whatever the model says"
            raise Violation(expected, f"{type(error).__name__}: {error}", rows) from error

    def scores_of(self, rows: Rows) -> list[float | None]:
        """Return the scores of the first evaluation of this example."""
        if rows.scores is None:
            rows.scores = self.score(rows)
            self.returned.update(rows.scores)
        return rows.scores

    def score_group(self, pairs: Sequence[tuple[Prediction, Any]]) -> list[float | None]:
        """Return the scores of the answers of one group, filled up with its first one to the reward's group size."""
        filled = [*pairs, *[pairs[0]] * (-len(pairs) % (self.group_size or 1))]
        rows = Rows([pair[0] for pair in filled], [pair[1] for pair in filled], [0] * len(filled))
        return self.score(rows)[: len(pairs)]

    def called(self, rows: Rows, **columns: Any) -> Any:
        """Return the result of a call by TRL, with these columns and some that the reward does not know."""
        texts: list[Any] = [prediction.text for prediction in rows.predictions]
        if rows.choice % 2 and not self.has_trl_function:
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        call: dict[str, Any] = {
            "prompts": [f"{group}: where is the lesion?" for group in rows.groups],
            "completions": texts,
            "completion_ids": [list(prediction.text.encode()) for prediction in rows.predictions],
            "query": [target.query for target in rows.targets],
            "unknown_column": [None for _ in texts],
            "trainer_state": SimpleNamespace(global_step=round(100 * rows.progress), max_steps=100),
            "log_metric": lambda name, value: None,
            "log_extra": lambda column, values: None,
            **{name: [value] * len(texts) for name, value in self.columns.items()},
            **columns,
        }
        found: Any = self.reward(**call)
        if not self.reward.is_async:
            return found
        with ThreadPoolExecutor(1) as pool:  # this thread may have a running loop, in a notebook
            return pool.submit(asyncio.run, found).result()


def leaves(reward: Reward) -> Iterator[Any]:
    """Yield the functions and classes of a reward, each with its settings."""
    if hasattr(reward.source, "function"):
        yield reward.source
    for inner in reward.inner:
        yield from leaves(inner)


def group_size(reward: Reward) -> int | None:
    """Return the number of which the size of a group must be a multiple, or None."""
    sizes = {step.group_size for step in reward.steps if isinstance(step, GroupRelative) and step.group_size}
    sizes |= {size for inner in reward.inner if (size := group_size(inner))}
    return math.lcm(*sizes) if sizes else None


def _boxes(target: AnyTarget) -> Any:
    return target.boxes if isinstance(target, Target) else []


@dataclass(frozen=True)
class Property:
    """One property that `check_reward` tests.

    Attributes:
        name: Name in the report.
        examples: Returns the strategy for the examples.
        holds: Raises `Violation` for a counterexample.
        skipped: Returns why it is not tested, beginning with "not declared" or "not applicable"; None if it is.
        max_examples: Largest number of examples.
    """

    name: str
    examples: Callable[[Subject], Any]
    holds: Callable[[Subject, Any], None]
    skipped: Callable[[Subject], str | None] = lambda subject: None
    max_examples: int = 10**9


def same(first: Sequence[float | None], second: Sequence[float | None]) -> bool:
    """Return whether two lists of scores agree."""
    if len(first) != len(second):
        return False
    return all(
        a is b if a is None or b is None else math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        for a, b in zip(first, second, strict=True)
    )
