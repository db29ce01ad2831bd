"""Settings that are passed to a reward, checked against its signature."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import Parameter
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from segrl.errors import RewardError, unknown_name
from segrl.rewards.forms import takes_any_setting
from segrl.rewards.registry import FORMAT_SETTINGS, RewardInfo

__all__ = ["check_settings"]


def check_settings(info: RewardInfo, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with lists as tuples, so that a reward can be hashed and compared.

    Raises:
        UnknownNameError: For a setting that the function does not have; it suggests the closest one.
        RewardError: A setting is missing, or of another type than its annotation.
    """
    function, known = info.function, info.settings
    assert function is not None
    frozen = {key: _frozen(value) for key, value in settings.items()}
    for key in frozen.keys() - known.keys():
        if not takes_any_setting(function, info.form):
            raise unknown_name(f"setting of reward {info.name!r}", key, {*known, *FORMAT_SETTINGS})
    for key, default in known.items():
        if default is Parameter.empty and key not in frozen:
            raise RewardError(f"reward {info.name!r} needs the setting {key!r}; pass make_reward({info.name!r}, ...)")
    hints = _hints(function)
    for key, value in frozen.items():
        if key in hints and not _fits(value, hints[key]):
            hint = hints[key]
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            number = " (in YAML write 1.0e-3, not 1e-3)" if isinstance(value, str) and _is_number(value) else ""
            raise RewardError(f"reward {info.name!r}: setting {key}={value!r}; expected {expected}{number}")
    return frozen


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function.__init__ if isinstance(function, type) else function)
    except (NameError, TypeError, AttributeError):  # annotations that exist for the type checker only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a simple annotated type; other annotations are the function's own business."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
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
