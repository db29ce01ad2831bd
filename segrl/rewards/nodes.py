"""The nodes of a reward: a function or class with its settings, and a weighted sum of rewards."""

# n rows

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from segrl.errors import RewardError
from segrl.predictions.target import METADATA_COLUMNS
from segrl.rewards.base import Batch, Scorer, Scores
from segrl.rewards.columns import check_target
from segrl.rewards.forms import accepted, filled_in, form_of
from segrl.rewards.registry import RewardInfo, info_of, merged_needs

__all__ = ["TRL_COLUMNS", "Leaf", "Sum"]

# what a TRL reward function is given without a trainer
TRL_COLUMNS = frozenset(
    (*METADATA_COLUMNS, "mask", "boxes", "prompts", "completions", "prediction", "target", "log_metric")
)


@dataclass(frozen=True)
class Leaf:
    """A reward function or class with its settings.

    Attributes:
        function: One of the forms of `segrl.rewards.registry`.
        settings: Keyword arguments of the function, or of the class's constructor.
        registered: The name under which its `RewardInfo` is registered.
    """

    function: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    registered: str = ""

    def __post_init__(self) -> None:
        if self.info.form in ("batch", "group"):
            self._instance  # noqa: B018  bad settings fail here, not in the first training step

    @property
    def info(self) -> RewardInfo:
        """The record of the reward, resolved for its settings."""
        return info_of(self.function, self.registered).resolved(self.settings)

    @cached_property
    def _instance(self) -> Any:
        return self.function(**self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "settings": self.settings, "registered": self.registered}

    @property
    def compares_answers(self) -> bool:
        """Whether it scores the answers to one prompt together."""
        return form_of(self.function, self.registered) == "group"

    @cached_property
    def is_async(self) -> bool:
        """Whether its function or method is a coroutine function."""
        form = form_of(self.function, self.registered)
        if form in ("batch", "group"):
            return inspect.iscoroutinefunction(getattr(self.function, f"score_{form}"))
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004
        )

    async def evaluate(self, batch: Batch, name: str) -> Scores:
        """Return one score per row."""
        info = info_of(self.function, self.registered)
        if info.needs_target:
            for row, target in enumerate(batch.targets):
                check_target(target, info.volume, batch.where(name, row))
        if info.form == "function":
            return await self._rows(batch, name)
        if info.form == "trl":
            return await self._many(range(len(batch)), batch, name, self.function, _trl_call(batch))
        if info.form == "batch":
            arguments = {"predictions": batch.predictions, "targets": batch.targets}
            return await self._many(range(len(batch)), batch, name, self._instance.score_batch, arguments)
        scores: Scores = [None] * len(batch)
        for rows in batch.groups():
            arguments = {key: [getattr(batch, key)[row] for row in rows] for key in ("predictions", "targets")}
            found = await self._many(rows, batch, name, self._instance.score_group, arguments)
            for row, score in zip(rows, found, strict=True):
                scores[row] = score
        return scores

    async def _rows(self, batch: Batch, name: str) -> Scores:
        extra = self._filled_in(self.function, batch)
        pairs = list(zip(batch.predictions, batch.targets, strict=True))

        async def one(row: int) -> float | None:
            prediction, target = pairs[row]
            try:
                value = self.function(prediction, target, **self.settings, **extra)
                return _number(await self._awaited(value))
            except Exception as error:  # any failure of a user's code, raised again with its row
                raise _failure(batch.where(name, row), error) from error

        if self.is_async:
            return list(await asyncio.gather(*map(one, range(len(pairs)))))
        return [await one(row) for row in range(len(pairs))]

    async def _many(
        self, rows: Sequence[int], batch: Batch, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Scores:
        """Return the scores of several rows from one call of a TRL function or a method."""
        trl = function is self.function
        given = accepted(function, arguments) if trl else dict(arguments)
        extra = {**self._filled_in(function, batch), **(self.settings if trl else {})}
        where = f"reward {name!r}" + (f", rows {rows[0]} to {rows[-1]}" if len(rows) else "")
        try:
            values = function(**{**given, **extra})
            values = list(await self._awaited(values))
        except Exception as error:  # as above
            raise _failure(where, error) from error
        if len(values) != len(rows):
            raise RewardError(f"{where}: returned {len(values)} scores for {len(rows)} rows; expected one per row")
        scores: Scores = []
        for row, value in zip(rows, values, strict=True):
            try:
                scores.append(_number(value))
            except (TypeError, ValueError) as error:
                raise _failure(batch.where(name, row), error) from error
        return scores

    async def _awaited(self, value: Any) -> Any:
        """Return what a function returned, awaited if the function is async."""
        if not inspect.isawaitable(value):
            return value
        if not self.is_async:  # no event loop runs for it
            if inspect.iscoroutine(value):
                value.close()
            raise TypeError("it returned something to be awaited; declare it with async def")
        return await value

    @staticmethod
    def _filled_in(function: Callable[..., Any], batch: Batch) -> dict[str, Any]:
        return {key: getattr(batch, key) for key in filled_in(function)}


Part = TypeVar("Part", bound=Scorer)


@dataclass(frozen=True)
class Sum(Generic[Part]):
    """A weighted sum of rewards, each with a name of its own.

    A part that does not apply to a row is left out of the sum of that row, as in TRL; the sum is None where no part
    applies.
    """

    parts: tuple[tuple[Part, float], ...]

    async def evaluate(self, batch: Batch, name: str) -> Scores:
        """Return one score per row, and log the mean of every part as `name/part`."""
        columns = await self.components(batch)
        for part, scores in columns.items():
            present = [score for score in scores if score is not None]
            if present:
                batch.log_metric(f"{name}/{part}", sum(present) / len(present))
        return self.total(columns)

    def total(self, columns: Mapping[str, Scores]) -> Scores:
        """Return the weighted sum of the parts' scores for each row."""
        weights = [weight for _, weight in self.parts]
        totals: Scores = []
        for row in zip(*columns.values(), strict=True):
            present = [weight * score for weight, score in zip(weights, row, strict=True) if score is not None]
            totals.append(sum(present) if present else None)
        return totals

    async def components(self, batch: Batch) -> dict[str, Scores]:
        """Return the scores of every part, before weights."""
        found = await asyncio.gather(*(part.evaluate(batch) for part, _ in self.parts)) if self.is_async else [
            await part.evaluate(batch) for part, _ in self.parts
        ]  # fmt: skip
        return {part.name: scores for (part, _), scores in zip(self.parts, found, strict=True)}

    @property
    def compares_answers(self) -> bool:
        """Whether any part does."""
        return any(part.compares_answers for part, _ in self.parts)

    @property
    def is_async(self) -> bool:
        """Whether any part is."""
        return any(part.is_async for part, _ in self.parts)

    @property
    def info(self) -> RewardInfo:
        """The record of the sum, derived from those of its parts."""
        infos = [part.info for part, _ in self.parts]
        invariant = set.intersection(*(set(info.invariant) for info in infos))
        low = high = 0.0  # a part may be left out, so each range is widened to hold 0
        known = all(info.range is not None for info in infos)
        for info, (_, weight) in zip(infos, self.parts, strict=True) if known else ():
            assert not callable(info.range)
            ends = [0.0, *(weight * end for end in info.range or ())]
            low, high = low + min(ends), high + max(ends)
        equation = " + ".join(f"{weight:g} · {part.name}" for part, weight in self.parts)
        return RewardInfo(
            name="sum",
            function=None,
            form="composition",
            range=(low, high) if known else None,
            invariant=tuple(sorted(invariant)),
            equation=equation,
            **merged_needs(infos),
        )


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bytes):
        raise TypeError(f"the score is the text {value!r:.50}; expected a number or None")
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"returned {score}; expected a finite number, or None where it does not apply")
    return score


def _failure(where: str, error: Exception) -> RewardError:
    message = str(error)
    if isinstance(error, ValueError) and message.startswith("returned "):
        return RewardError(f"{where} {message}")
    return RewardError(f"{where}: {type(error).__name__}: {message}")


def _trl_call(batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments of a TRL reward function, also outside of a trainer."""
    if batch.call:
        return {**batch.call, "prediction": batch.predictions, "target": batch.targets}
    columns = (*METADATA_COLUMNS, "mask", "boxes")
    return {
        "prompts": [getattr(target, "query", "") for target in batch.targets],
        "completions": [prediction.text for prediction in batch.predictions],
        "prediction": batch.predictions,
        "target": batch.targets,
        "log_metric": batch.log_metric,
        **{key: [getattr(target, key, None) for target in batch.targets] for key in columns},
        **batch.columns,
    }
