"""`make_reward` and `weighted_sum`: from names, functions and settings to `Reward` objects."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from inspect import Parameter
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from segrl.errors import RewardError, unknown_name
from segrl.predictions.completion_format import CompletionFormat
from segrl.rewards import registry
from segrl.rewards.nodes import Leaf, Sum
from segrl.rewards.registry import FORMAT_SETTINGS, RewardInfo
from segrl.rewards.reward import Reward, build

__all__ = ["make_reward", "weighted_sum"]


def make_reward(reward: str | Callable[..., Any] | Reward, **settings: Any) -> Reward:
    """Make a reward.

    Args:
        reward: A name from `list_rewards`, "module:attribute", a function or class in one of the three forms (see
            `segrl.rewards.registry`), or a `Reward`.
        **settings: Keyword arguments of the function, and those of `CompletionFormat` (`frame`, `seg_token`,
            `require_seg`, `require_reasoning`, `answer_format`). Lists become tuples.

    Raises:
        UnknownNameError: For a name or a setting that does not exist; it suggests the closest one.
        FrameError: For a frame kind that does not exist, or that needs a processor.
        RewardError: If a setting is missing or of the wrong type, or an installed reward cannot be used.

    Example:
        >>> make_reward("box_f1", min_iou=0.3).name
        'box_f1'
    """
    completion_format = {key: settings.pop(key) for key in FORMAT_SETTINGS & settings.keys()}
    if isinstance(reward, Reward):
        if settings:
            raise RewardError(
                f"reward {reward.name!r} is made already; expected no settings but those of its completion format, got "
                f"{sorted(settings)}; pass them where it is made"
            )
        return build(reward.name, reward.source, reward.steps, replace(reward.completion_format, **completion_format))
    if isinstance(reward, str):
        info = registry.reward_info(reward)
    else:
        name = registry.registered_name(reward) or getattr(reward, "__name__", type(reward).__name__)
        info = registry.info_of(reward, name)
    if info.broken is not None or info.function is None:
        raise RewardError(f"reward {info.name!r} {info.broken}")
    settings = _checked(info, {key: _frozen(value) for key, value in settings.items()})
    if info.form == "preset":
        preset = info.function(**settings)
        return build(info.name, preset.source, preset.steps, replace(preset.completion_format, **completion_format))
    return build(
        info.name,
        Leaf(info.function, settings, info.name),
        (),
        CompletionFormat(**{**info.completion_format, **completion_format}),
    )


def weighted_sum(
    parts: Mapping[Any, float] | Sequence[tuple[str | Reward | Callable[..., Any], float]],
    name: str = "total",
    *,
    completion_format: CompletionFormat | None = None,
) -> Reward:
    """Add rewards up. In training the mean of every part is logged as `name/part`.

    Args:
        parts: Rewards (or their names, functions, classes) with their weights.
        name: Name of the sum.
        completion_format: How completions are read; by default as those parts do that differ from `CompletionFormat()`.

    Returns:
        The sum. A part that does not apply to a row (None) is left out there.

    Raises:
        RewardError: No parts, two parts with one name, a part named "total", a weight that is not finite, or parts
            that read completions in different ways.

    Example:
        >>> weighted_sum({"format": 1.0, "box_f1": 2.0}).range
        (0.0, 3.0)
    """
    pairs = list(parts.items()) if isinstance(parts, Mapping) else list(parts)
    made = [(make_reward(part), weight) for part, weight in pairs]
    if not made:
        raise RewardError(f"reward {name!r}: a sum of no parts; expected at least one")
    names = [part.name for part, _ in made]
    for part, weight in made:
        if part.name == "total":
            raise RewardError(f"reward {name!r}: a part is named 'total', as the sum is; rename it with .named('...')")
        if names.count(part.name) > 1:
            raise RewardError(f"reward {name!r}: two parts are named {part.name!r}; rename one with .named('...')")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RewardError(f"reward {name!r}: weight of {part.name!r} is {weight!r}; expected a finite number")
    return build(name, Sum(tuple((part, float(weight)) for part, weight in made)), (), completion_format)


def _checked(info: RewardInfo, settings: dict[str, Any]) -> dict[str, Any]:
    function, known = info.function, info.settings
    assert function is not None
    for key in settings.keys() - known.keys():
        if not registry.takes_any_setting(function, info.form):
            raise unknown_name(f"setting of reward {info.name!r}", key, {*known, *FORMAT_SETTINGS})
    for key, default in known.items():
        if default is Parameter.empty and key not in settings:
            raise RewardError(f"reward {info.name!r} needs the setting {key!r}; pass make_reward({info.name!r}, ...)")
    hints = _hints(function)
    for key, value in settings.items():
        if key in hints and not _fits(value, hints[key]):
            hint = hints[key]
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            number = " (in YAML write 1.0e-3, not 1e-3)" if isinstance(value, str) and _is_number(value) else ""
            raise RewardError(f"reward {info.name!r}: setting {key}={value!r}; expected {expected}{number}")
    return settings


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function.__init__ if isinstance(function, type) else function)
    except (NameError, TypeError, AttributeError):  # annotations that exist for the type checker only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a simple annotated type; other annotations are the function's own business."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str) else True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
