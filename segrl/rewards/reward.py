"""`Reward`: one reward or a sum of several, with its steps; callable by any TRL GRPO trainer.

A float is a score (0.0 means wrong). None means that the reward does not apply to a row. An exception means bad data or
a bug: it stops the run with a `RewardError` that names the reward and the row, and never becomes a score.
"""

# n rows, G answers to one prompt

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segrl.errors import RewardError, SegRLError
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.prediction import Prediction
from segrl.rewards.base import Batch, Scores, ignore_metric, progress_of, run
from segrl.rewards.columns import AnyTarget, read_rows
from segrl.rewards.example import example_pair
from segrl.rewards.nodes import Leaf, Sum
from segrl.rewards.registry import FORMAT_SETTINGS, RewardInfo, info_of, merged_needs, registered_name, reward_info
from segrl.rewards.settings import check_settings
from segrl.rewards.transforms import Clip, Gate, GroupMode, GroupRelative, Scale, Schedule, Step

__all__ = [
    "AnyReward",
    "AsyncReward",
    "Reward",
    "build",
    "resolve_reward",
    "sum_rewards",
    "usual_format",
]


@dataclass(frozen=True)
class Reward:
    """A reward, made by `make_reward` or `weighted_sum`, for `reward_funcs` of any TRL GRPO trainer.

    It can be pickled if its functions are defined at the top of a module.

    Attributes:
        name: Name in logs and errors.
        source: A function with its settings, or a sum.
        steps: Transforms of the scores, in order.
        completion_format: How completions are parsed without a `prediction` column.

    Example:
        >>> from segrl.rewards import make_reward
        >>> reward = make_reward("format").scale(2.0).named("grammar")
        >>> reward.name, reward.range
        ('grammar', (0.0, 2.0))
        >>> reward(completions=["no tags", "<think>Clear.</think><answer>No lesion is visible.<seg></answer>"])
        [0.0, 2.0]
    """

    name: str
    source: Leaf | Sum[Reward]
    steps: tuple[Step, ...] = ()
    completion_format: CompletionFormat = field(default_factory=CompletionFormat)

    @property
    def __name__(self) -> str:  # TRL logs a reward under this
        return self.name

    # --- declarations

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the function; none for a sum."""
        return self.source.settings if isinstance(self.source, Leaf) else {}

    @property
    def parts(self) -> tuple[tuple[Reward, float], ...]:
        """The parts of a sum with their weights; a reward that is no sum, or has steps, is its own only part."""
        return self.source.parts if isinstance(self.source, Sum) and not self.steps else ((self, 1.0),)

    @property
    def inner(self) -> list[Reward]:
        """The rewards that it evaluates: the parts of a sum, and its gates."""
        parts = [part for part, _ in self.source.parts] if isinstance(self.source, Sum) else []
        return parts + [other for step in self.steps for other in step.others if isinstance(other, Reward)]

    @property
    def info(self) -> RewardInfo:
        """The record of the reward; steps change its range and drop the claims that no longer hold."""
        info = replace(self.source.info, name=self.name)
        if not self.steps:
            return info
        bounds = info.range
        assert not callable(bounds)
        for step in self.steps:
            bounds = step.bounds(bounds)
        asked = [info, *(other.info for step in self.steps for other in step.others)]
        return replace(
            info,
            form="composition",
            range=bounds,
            empty=None,
            invariant=tuple(sorted(set.intersection(*(set(one.invariant) for one in asked)))),
            monotone=(),
            **merged_needs(asked),
        )

    @property
    def needs_mask(self) -> bool:
        """Whether it reads `Prediction.mask`."""
        return self.info.needs_mask

    @property
    def needs_target(self) -> bool:
        """Whether it reads the ground truth."""
        return self.info.needs_target

    @property
    def volume(self) -> bool:
        """Whether its target is a `VolumeTarget`."""
        return self.info.volume

    @property
    def range(self) -> tuple[float, float] | None:
        """(low, high) of the scores, or None if not declared."""
        bounds = self.info.range
        assert not callable(bounds)
        return bounds

    @property
    def compares_answers(self) -> bool:
        """Whether an answer's score depends on the other answers to its prompt."""
        return self.source.compares_answers or any(step.compares_answers for step in self.steps)

    @property
    def is_async(self) -> bool:
        """Whether calling it returns a coroutine."""
        return self.source.is_async or any(other.is_async for step in self.steps for other in step.others)

    # --- scores

    def score(self, prediction: Prediction, target: AnyTarget, *, progress: float = 1.0) -> float | None:
        """Score one prediction.

        Args:
            prediction: The parsed completion, with its mask.
            target: The ground truth; None for a reward of the text alone.
            progress: Training progress in [0, 1], for schedules.

        Returns:
            A finite score, or None if the reward does not apply.

        Raises:
            RewardError: The reward fails, or returns anything but a finite number or None.
        """
        return run(self.evaluate(Batch([prediction], [target], progress=progress)), self.is_async)[0]

    def score_batch(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[AnyTarget],
        *,
        groups: Sequence[Hashable] | None = None,
        progress: float = 1.0,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[float | None]:
        """Score predictions and their targets in order; an empty list for no rows.

        Args:
            predictions: n predictions.
            targets: n targets.
            groups: n ids, equal for the answers to one prompt. By default consecutive rows with the same ground truth.
            progress: Training progress in [0, 1], for schedules.
            columns: Columns of the data set that a TRL function reads, n values each.

        Raises:
            RewardError: As in `score`, naming the row; also if the lengths differ.
        """
        batch = Batch(predictions, targets, groups, progress, columns=columns or {}).checked(self.name)
        return run(self.evaluate(batch), self.is_async)

    def components(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[AnyTarget],
        *,
        groups: Sequence[Hashable] | None = None,
        progress: float = 1.0,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, list[float | None]]:
        """Return the scores by name: of a sum those of its parts before their weights, and always "total".

        Args:
            predictions: n predictions; this and the others as in `score_batch`.
            targets: n targets.
            groups: n ids.
            progress: Training progress.
            columns: Columns of the data set.
        """
        batch = Batch(predictions, targets, groups, progress, columns=columns or {}).checked(self.name)
        parts = run(self.source.components(batch), self.is_async) if isinstance(self.source, Sum) else {}
        return {**parts, "total": run(self.evaluate(batch, parts), self.is_async)}

    async def evaluate(self, batch: Batch, parts: Mapping[str, Scores] | None = None) -> Scores:
        """Score a batch; every other method calls this.

        Args:
            batch: The rows.
            parts: The components of a sum, if they are known.
        """
        if isinstance(self.source, Sum) and parts:
            scores = self.source.total(parts)
        else:
            scores = await self.source.evaluate(batch, self.name)
        bounds = self.source.info.range if self.steps else None
        for step in self.steps:
            assert not callable(bounds)
            scores = await step.apply(scores, batch, bounds)
            bounds = step.bounds(bounds)
        for row, score in enumerate(scores):  # a sum or step of finite numbers may overflow
            if score is not None and not math.isfinite(score):
                after = " after its steps" if self.steps else ""
                raise RewardError(f"{batch.where(self.name, row)} returned {score}{after}; expected a finite number")
        return scores

    def __call__(
        self,
        *,
        prompts: Any = None,
        completions: Sequence[Any],
        completion_ids: Any = None,
        prediction: Sequence[Prediction] | None = None,
        target: Sequence[AnyTarget] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score a batch as TRL's trainers ask for it.

        Args:
            prompts: n prompts; they tell groups apart and are never parsed.
            completions: n texts, or lists of messages.
            completion_ids: Passed on to TRL reward functions.
            prediction: n predictions, if the trainer has parsed them. Otherwise completions are parsed (see
                `CompletionFormat`) and the share of valid ones is logged as `valid_completions`.
            target: n targets, if the trainer has them. Otherwise they are built from the columns.
            log_metric: TRL's function to log a number.
            trainer_state: The trainer's state, for schedules; without one the progress is 1.
            **columns: Data set columns, n values each. Without `target`, `mask` (PIL image or (H, W) array) is needed,
                or `volume` ((D, H, W) array) for rewards of volumes. Also read, if present: `boxes` (original pixels),
                `query`, `modality`, `anatomy`, `lesion`, `name`, `spacing_mm`, and `image` or `images`.

        Returns:
            One score or None per completion.

        Raises:
            RewardError: A row cannot be scored; the message names the reward, the row and the column.
        """
        call = {
            "prompts": prompts, "completions": completions, "completion_ids": completion_ids,
            "prediction": prediction, "target": target, "log_metric": log_metric, "trainer_state": trainer_state,
            **columns,
        }  # fmt: skip
        return run(self.evaluate(self._called(call)), self.is_async)

    def _called(self, call: dict[str, Any]) -> Batch:
        """Return the batch of a trainer's call."""
        info, log = self.info, call["log_metric"]
        if call["prediction"] is None and info.needs_mask:
            maker = "a VolumePropagator" if info.volume else "a MaskHead"
            raise RewardError(
                f"reward {self.name!r} scores masks, and this trainer decodes none; use SegGRPOTrainer with {maker}"
            )
        own = info.form == "trl"  # it reads the columns itself
        reads_target = info.needs_target or (
            not own and (call.get("mask") is not None or call.get("volume") is not None)
        )
        predictions, targets = read_rows(call, self.completion_format, self.name, reads_target)
        if call["prediction"] is None and log is not None and predictions and not own:
            log("valid_completions", sum(parsed.valid for parsed in predictions) / len(predictions))
        call = {key: value for key, value in call.items() if value is not None or key == "completion_ids"}
        return Batch(predictions, targets, None, progress_of(call.get("trainer_state")), log or ignore_metric, call)

    # --- composition

    def named(self, name: str) -> Reward:
        """Return the same reward under another name, for logs and sums."""
        return replace(self, name=name)

    def clip(self, low: float, high: float) -> Reward:
        """Limit the scores to [low, high]."""
        return self._then(Clip(low, high))

    def scale(self, factor: float, offset: float = 0.0) -> Reward:
        """Map the scores to `factor * score + offset`."""
        return self._then(Scale(factor, offset))

    def schedule(self, points: Mapping[float, float]) -> Reward:
        """Multiply the scores by a factor that depends on the progress; see `segrl.rewards.transforms.Schedule`."""
        return self._then(Schedule(points))  # pyright: ignore[reportArgumentType]

    def gate(self, other: AnyReward, above: float = 0.0, otherwise: float | None = None) -> Reward:
        """Keep the scores only where another reward exceeds `above`; see `segrl.rewards.transforms.Gate`.

        Args:
            other: A reward, a name, "module:attribute", a function or a class.
            above: What its score must exceed.
            otherwise: Score behind a closed gate; by default the lowest score of this reward, at most 0.
        """
        return self._then(Gate(resolve_reward(other), above, otherwise))

    def group_relative(self, mode: GroupMode = "rank", group_size: int | None = None) -> Reward:
        """Score each answer relative to the others to the same prompt; see `segrl.rewards.transforms.GroupRelative`."""
        return self._then(GroupRelative(mode, group_size))

    def _then(self, step: Step) -> Reward:
        steps = (*self.steps, step)
        explicit = self.completion_format != usual_format(self.source, self.steps)
        return build(self.name, self.source, steps, self.completion_format if explicit else None)


class AsyncReward(Reward):
    """A reward with an async function, such as a judge behind a network; TRL runs it concurrently with others."""

    async def __call__(self, **call: Any) -> list[float | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Score a batch; see `Reward.__call__`."""
        names = ("prompts", "completion_ids", "prediction", "target", "log_metric", "trainer_state")
        return await self.evaluate(self._called({**dict.fromkeys(names), **call}))


AnyReward = str | Path | Callable[..., Any] | Reward


def resolve_reward(reference: AnyReward, settings: Mapping[str, Any] | None = None) -> Reward:
    """Make a reward from a name, "module:attribute", a function, a class or a reward; see `make_reward`."""
    settings = settings or {}
    given = {key: value for key, value in settings.items() if key in FORMAT_SETTINGS}
    settings = {key: value for key, value in settings.items() if key not in FORMAT_SETTINGS}
    if isinstance(reference, Reward):
        if settings:
            raise RewardError(
                f"reward {reference.name!r} is made already; expected no settings but those of its completion format, "
                f"got {sorted(settings)}; pass them where it is made"
            )
        completion_format = replace(reference.completion_format, **given)
        return build(reference.name, reference.source, reference.steps, completion_format) if given else reference
    if isinstance(reference, str | Path):  # `make_reward` has read the files
        info = reward_info(str(reference))
    else:
        name = registered_name(reference) or getattr(reference, "__name__", type(reference).__name__)
        info = info_of(reference, name)
    assert info.function is not None
    settings = check_settings(info, settings)
    if info.form == "preset":
        try:
            made = info.function(**settings)
        except SegRLError as error:
            raise type(error)(f"reward {info.name!r}: {error}") from error
        return resolve_reward(made.named(info.name), given)
    completion_format = CompletionFormat(**{**info.completion_format, **given})
    if info.form == "function" and info.function.__module__.startswith("segrl.rewards.builtin."):
        _check_by_scoring(info, settings, completion_format)
    return build(info.name, Leaf(info.function, settings, info.name), (), completion_format)


def _check_by_scoring(info: RewardInfo, settings: Mapping[str, Any], completion_format: CompletionFormat) -> None:
    """Score a fixed pair: a reward of segrl checks its settings before it scores, and so they fail here."""
    assert info.function is not None
    prediction, target = example_pair(info.volume, completion_format)
    try:
        info.function(prediction, target, **settings)
    except RewardError as error:
        raise RewardError(f"reward {info.name!r}: {error}") from error


def sum_rewards(
    parts: Sequence[tuple[Reward, float]], name: str, completion_format: CompletionFormat | None = None
) -> Reward:
    """Add rewards up; see `weighted_sum`."""
    if not parts:
        raise RewardError(f"reward {name!r}: a sum of no parts; expected at least one")
    names = [part.name for part, _ in parts]
    for part, weight in parts:
        if part.name == "total":
            raise RewardError(f"reward {name!r}: a part is named 'total', as the sum is; rename it with .named('...')")
        if names.count(part.name) > 1:
            raise RewardError(f"reward {name!r}: two parts are named {part.name!r}; rename one with .named('...')")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RewardError(f"reward {name!r}: weight of {part.name!r} is {weight!r}; expected a finite number")
    return build(name, Sum(tuple((part, float(weight)) for part, weight in parts)), (), completion_format)


def build(
    name: str,
    source: Leaf | Sum[Reward],
    steps: tuple[Step, ...] = (),
    completion_format: CompletionFormat | None = None,
) -> Reward:
    """Build a `Reward`, or an `AsyncReward` if a part of it is async.

    Without a `completion_format` it takes the usual one, see `usual_format`.

    Raises:
        RewardError: Its parts and gates read completions in different ways.
    """
    if completion_format is None:
        completion_format = usual_format(source, steps)
    if completion_format is None:
        raise RewardError(
            f"reward {name!r}: its parts read completions in different ways; pass these settings to the whole only"
        )
    reward = Reward(name, source, steps, completion_format)
    return AsyncReward(name, source, steps, completion_format) if reward.is_async else reward


def usual_format(source: Leaf | Sum[Reward], steps: tuple[Step, ...] = ()) -> CompletionFormat | None:
    """Return the completion format of a reward that is not given one.

    That is the one it declares, or the one of its parts and gates that differs from the default; None if several do,
    and differ from one another.
    """
    formats = {other.completion_format for step in steps for other in step.others}
    if isinstance(source, Sum):
        formats |= {part.completion_format for part, _ in source.parts}
    else:
        formats.add(CompletionFormat(**source.info.completion_format))
    special = formats - {CompletionFormat()}
    return None if len(special) > 1 else special.pop() if special else CompletionFormat()
