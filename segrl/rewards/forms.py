"""Forms of reward functions, read from their signatures.

- a function ``(prediction, target, **settings) -> float | None``,
- a class with ``score_batch(predictions, targets)``, or with ``score_group(predictions, targets)`` for the answers to
  one prompt; its settings are the arguments of its constructor,
- a TRL reward function ``(completions, ..., **columns) -> list``; recognised by its parameter `completions`.

Each may be `async`. In functions, a parameter named `log_metric` or `progress` is filled in and is not a setting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

from segrl.errors import RewardError

__all__ = ["Form", "accepted", "can_be_reward", "filled_in", "form_of", "full_name", "settings_of", "takes_any_setting"]

Form = Literal["function", "batch", "group", "trl", "preset", "composition"]
_FILLED_IN = frozenset({"log_metric", "progress"})


@cache
def form_of(function: Callable[..., Any], name: str) -> Form:
    """Return the form of a function or class.

    Raises:
        RewardError: It has none of the forms.
    """
    if inspect.isclass(function):
        methods = [method for method in ("score_batch", "score_group") if callable(getattr(function, method, None))]
        if len(methods) == 1:
            return "batch" if methods == ["score_batch"] else "group"
        raise RewardError(
            f"reward {name!r}: class {function.__name__} has {' and '.join(methods) or 'neither'} of score_batch and "
            "score_group; expected exactly one"
        )
    if not callable(function):
        raise RewardError(f"reward {name!r} is a {type(function).__name__}; expected a function or a class")
    parameters = _parameters(function)
    if "completions" in parameters:
        return "trl"
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise RewardError(
            f"reward {name!r}: {full_name(function)}({', '.join(parameters)}) takes neither (prediction, target) nor "
            "completions; expected def reward(prediction, target, *, setting=...) or a TRL reward function"
        )
    return "function"


def full_name(function: Any) -> str:
    """Return module and name of a function or class, for an error."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


@cache
def settings_of(function: Callable[..., Any], form: Form) -> dict[str, Any]:
    """Return the settings of a function or class with their defaults; `inspect.Parameter.empty` where there is none."""
    parameters = list(_parameters(function).values())
    if form == "function":
        parameters = parameters[2:]
    elif form == "trl":  # what has no default is a column
        parameters = [p for p in parameters if p.default is not p.empty]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: p.default for p in named if p.name not in _FILLED_IN}


def can_be_reward(function: Any) -> bool:
    """Return whether a class or function has one of segrl's own forms, which TRL could not call."""
    if inspect.isclass(function):
        return hasattr(function, "score_batch") or hasattr(function, "score_group")
    if not inspect.isroutine(function):
        return False
    parameters = _parameters(function)
    return "completions" not in parameters and not _takes_keywords(parameters)


def takes_any_setting(function: Callable[..., Any], form: Form) -> bool:
    """Return whether unknown settings reach the function in its `**settings`."""
    return form != "trl" and _takes_keywords(_parameters(function))


def accepted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the keyword arguments that a function takes."""
    parameters = _parameters(function)
    return {key: value for key, value in values.items() if key in parameters or _takes_keywords(parameters)}


def filled_in(function: Callable[..., Any]) -> frozenset[str]:
    """Return which of `log_metric` and `progress` a function takes."""
    return _FILLED_IN & _parameters(function).keys()


def _takes_keywords(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    if inspect.isclass(function) and function.__init__ is object.__init__:
        return {}
    return inspect.signature(function).parameters
