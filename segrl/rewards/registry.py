"""Rewards by name: register a function, make a `Reward` of it, pass that to a trainer.

A reward is a function ``(prediction, target, **settings) -> float | None``. A float is a score (0.0 means wrong), None
means that the reward does not apply to this row, and an exception means bad data or a bug: it stops the run with a
`RewardError` that names the reward and the row, and is never turned into a score.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import numpy as np

from segrl.errors import FrameError, RewardError, unknown_name
from segrl.frames import Frame, FrameKind
from segrl.parsing import SEG_TOKEN, completion_text, parse_completion
from segrl.prediction import Prediction, Target

__all__ = ["ENTRY_POINT_GROUP", "Reading", "Reward", "list_rewards", "make_reward", "register_reward"]

ENTRY_POINT_GROUP = "segrl.rewards"
RewardFunction = Callable[..., float | None]
_Function = TypeVar("_Function", bound=RewardFunction)
_TEXT_COLUMNS = ("query", "modality", "anatomy", "lesion", "name")
_registered: dict[str, tuple[RewardFunction, bool]] = {}


@dataclass(frozen=True)
class Reading:
    """How a reward reads completions when the trainer does not pass predictions (a plain TRL `GRPOTrainer`).

    Attributes:
        frame: Frame kind in which the model writes boxes, or a function ``(image_size, original_size) -> Frame`` of
            (width, height) pairs, such as ``functools.partial(frame_for, processor)``.
        seg_token: See `segrl.parsing.parse_completion`, as the rest.
        require_seg: Whether a valid text needs the token.
        require_reasoning: Whether a valid text needs a reasoning block.
    """

    frame: FrameKind | Callable[..., Frame] = "relative_1000"
    seg_token: str = SEG_TOKEN
    require_seg: bool = True
    require_reasoning: bool = True


_READING_SETTINGS = frozenset(option.name for option in fields(Reading))


@dataclass(frozen=True)
class Reward:
    """A reward function with its settings; pass it to `reward_funcs` of any TRL GRPO trainer.

    It pickles if its function does, that is, if the function is defined at the top of a module.

    Attributes:
        name: Name used in logs and errors.
        function: ``(prediction, target, **settings) -> float | None``.
        settings: Keyword arguments of the function.
        needs_mask: Whether the function reads `Prediction.mask`.
        reading: How completions are read without a `prediction` column.
    """

    name: str
    function: RewardFunction
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    needs_mask: bool = False
    reading: Reading = Reading()

    @property
    def __name__(self) -> str:  # TRL logs a reward under this
        return self.name

    def score(self, prediction: Prediction, target: Target) -> float | None:
        """Score one prediction.

        Returns:
            A finite score, or None where the reward does not apply.

        Raises:
            RewardError: If the function raises or returns something that is not a finite number or None.
        """
        return self._score(prediction, target, _where(self.name, None, target.name))

    def score_batch(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> list[float | None]:
        """Score aligned predictions and targets, in order; no rows give an empty list.

        Raises:
            RewardError: As `score`, naming the row; also if the lengths differ.
        """
        if len(predictions) != len(targets):
            raise RewardError(
                f"reward {self.name!r}: {len(predictions)} predictions but {len(targets)} targets; "
                "expected one target per prediction"
            )
        return [
            self._score(prediction, target, _where(self.name, row, target.name))
            for row, (prediction, target) in enumerate(zip(predictions, targets, strict=True))
        ]

    def __call__(
        self,
        *,
        prompts: Any = None,
        completions: Sequence[Any],
        completion_ids: Any = None,
        prediction: Sequence[Prediction] | None = None,
        target: Sequence[Target] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score a batch as TRL's trainers ask for it.

        Args:
            prompts: Not read: what stands in the prompt never counts as the model's.
            completions: One per row: a text, or a list of messages.
            completion_ids: Not read.
            prediction: Predictions, if the trainer has parsed them. Otherwise completions are parsed (see `Reading`)
                and the share of valid ones is logged as `valid_completions`.
            target: Targets, if the trainer has them. Otherwise they are built from the columns.
            log_metric: TRL's function to log a number.
            **columns: Data set columns, one value per row. `mask` (PIL image or (H, W) array) is needed without
                `target`; `boxes` (original pixels), `query`, `modality`, `anatomy`, `lesion`, `name` and `image` or
                `images` are read where present, and everything else is left alone.

        Returns:
            One score or None per completion.

        Raises:
            RewardError: If a row cannot be scored; it names the reward and the row.
        """
        if prediction is None and self.needs_mask:
            raise RewardError(
                f"reward {self.name!r} scores masks, and this trainer decodes none; use SegGRPOTrainer with a MaskHead"
            )
        if target is None:
            target = [self._target(columns, row) for row in range(len(completions))]
        if prediction is None:
            self._check_length("target", target, completions)
            prediction = [self._read(text, target[row], columns, row) for row, text in enumerate(completions)]
            if log_metric is not None and prediction:
                log_metric("valid_completions", sum(parsed.valid for parsed in prediction) / len(prediction))
        self._check_length("prediction", prediction, completions)
        return self.score_batch(prediction, target)

    def _score(self, prediction: Prediction, target: Target, where: str) -> float | None:
        try:
            value = self.function(prediction, target, **self.settings)
            score = None if value is None else float(value)
        except Exception as error:  # any failure of foreign code, re-raised with the row it happened in
            raise RewardError(f"{where}: {type(error).__name__}: {error}") from error
        if score is not None and not math.isfinite(score):
            raise RewardError(f"{where} returned {score}; expected a finite number, or None where it does not apply")
        return score

    def _check_length(self, name: str, values: Sequence[Any], completions: Sequence[Any]) -> None:
        if len(values) != len(completions):
            raise RewardError(
                f"reward {self.name!r}: column {name!r} has {len(values)} rows for {len(completions)} completions"
            )

    def _target(self, columns: Mapping[str, Any], row: int) -> Target:
        if columns.get("mask") is None:
            found = ", ".join(sorted(columns)) or "none"
            raise RewardError(f"reward {self.name!r} needs a column 'mask' or 'target'; columns passed: {found}")
        where = _where(self.name, row, "")
        try:
            texts = {name: str(columns[name][row] or "") for name in _TEXT_COLUMNS if columns.get(name) is not None}
            where = _where(self.name, row, texts.get("name", ""))
            target = Target.from_mask(columns["mask"][row], **texts)
            boxes = None if columns.get("boxes") is None else columns["boxes"][row]
            return target if boxes is None else Target(target.mask, np.asarray(boxes, dtype=np.float64), **texts)
        except (ValueError, TypeError, LookupError, OSError) as error:
            raise RewardError(f"{where}: cannot build the target: {error}") from error

    def _read(self, completion: Any, target: Target, columns: Mapping[str, Any], row: int) -> Prediction:
        where = _where(self.name, row, target.name)
        original = (target.width, target.height)
        reading = self.reading
        try:
            if callable(reading.frame):
                frame = reading.frame(_image_size(columns, row) or original, original)
            else:
                frame = Frame(reading.frame, original)
            text = completion_text(completion)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise RewardError(f"{where}: cannot read the completion: {error}") from error
        return parse_completion(
            text,
            frame,
            seg_token=reading.seg_token,
            require_seg=reading.require_seg,
            require_reasoning=reading.require_reasoning,
        )


def register_reward(name: str, *, needs_mask: bool = False) -> Callable[[_Function], _Function]:
    """Register a reward function under a name.

    Args:
        name: Name for `make_reward`, for configuration files and for logs.
        needs_mask: Whether the function reads `Prediction.mask`, so that a trainer without masks refuses it.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        RewardError: If the name is taken, or a parameter of the function has the name of a `Reading` setting.

    Example:
        >>> @register_reward("brevity")
        ... def brevity(prediction, target, *, limit=200):
        ...     return float(len(prediction.text) <= limit)
        >>> make_reward("brevity", limit=10).settings
        {'limit': 10}
    """

    def register(function: _Function) -> _Function:
        if name in _registered and _registered[name][0] is not function:
            raise RewardError(
                f"reward {name!r} is registered already, by {_describe(_registered[name][0])}; choose another name"
            )
        if clash := _READING_SETTINGS & inspect.signature(function).parameters.keys():
            raise RewardError(
                f"reward {name!r} has a parameter {min(clash)!r}, which is a setting of every reward; rename it"
            )
        _registered[name] = (function, needs_mask)
        return function

    return register


def list_rewards() -> list[str]:
    """Return the sorted names of all rewards: built-in, registered, and from installed packages (not yet imported)."""
    return sorted({*_registered, *_plugins()})


def make_reward(name: str, **settings: Any) -> Reward:
    """Make a reward by name.

    Args:
        name: A name from `list_rewards`.
        **settings: Keyword arguments of the reward function, and those of `Reading` (`frame`, `seg_token`,
            `require_seg`, `require_reasoning`).

    Raises:
        UnknownNameError: For a name or a setting that does not exist; it suggests the closest one.
        FrameError: For a frame kind that does not exist, or that needs a processor.
        RewardError: If a setting without a default is missing, or an installed reward cannot be imported.

    Example:
        >>> make_reward("box_f1", min_iou=0.3).name
        'box_f1'
    """
    if name not in _registered:
        plugins = _plugins()
        if name not in plugins:
            raise unknown_name("reward", name, list_rewards())
        _load(name, plugins[name])
    function, needs_mask = _registered[name]
    reading = Reading(**{key: settings.pop(key) for key in _READING_SETTINGS & settings.keys()})
    if reading.frame == "resized_px":
        raise FrameError(
            "frame='resized_px' depends on the processor; pass frame=functools.partial(frame_for, processor)"
        )
    if not callable(reading.frame):
        Frame(reading.frame, (1, 1))  # raises for an unknown kind
    parameters = list(inspect.signature(function).parameters.values())
    own = [option for option in parameters[2:] if option.kind not in (option.VAR_KEYWORD, option.VAR_POSITIONAL)]
    known = {option.name for option in own}
    if not any(option.kind is option.VAR_KEYWORD for option in parameters):
        for key in settings.keys() - known:
            raise unknown_name(f"setting of reward {name!r}", key, known | _READING_SETTINGS)
    for option in own:
        if option.default is option.empty and option.name not in settings:
            raise RewardError(f"reward {name!r} needs the setting {option.name!r}; pass make_reward({name!r}, ...)")
    return Reward(name, function, settings, needs_mask, reading)


def _plugins() -> dict[str, EntryPoint]:
    return {plugin.name: plugin for plugin in entry_points(group=ENTRY_POINT_GROUP)}


def _load(name: str, plugin: EntryPoint) -> None:
    try:
        function = plugin.load()
    except (ImportError, AttributeError) as error:
        raise RewardError(f"reward {name!r} cannot be imported from {plugin.value!r}: {error}") from error
    if name not in _registered:  # the module may have registered it itself while it was imported
        register_reward(name)(function)


def _describe(function: RewardFunction) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def _where(name: str, row: int | None, row_name: str) -> str:
    place = "" if row is None else f", row {row}"
    return f"reward {name!r}{place}" + (f" ({row_name})" if row_name else "")


def _image_size(columns: Mapping[str, Any], row: int) -> tuple[int, int] | None:
    if columns.get("image") is not None:
        return columns["image"][row].size
    return columns["images"][row][0].size if columns.get("images") is not None else None
