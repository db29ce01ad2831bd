"""Everything that is known about a reward, as plain values; `segrl rewards describe` prints them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from segrl.errors import RewardError
from segrl.rewards.factory import make_reward
from segrl.rewards.registry import RewardInfo, reward_info
from segrl.rewards.reward import Reward

__all__ = ["describe_info", "describe_reward"]


def describe_reward(reward: str | Reward) -> dict[str, Any]:
    """Describe a reward.

    Args:
        reward: A name from `list_rewards`, "module:attribute", or a reward.

    Returns:
        Plain values: `name`, `form`, `summary`, `equation`, `settings` (name, default, whether it is required, doc),
        `range`, `empty`, `invariant`, `monotone`, `needs`, `source`, `origin`; and for a preset or another composition
        `yaml`, its parts as `segrl.rewards.load_reward` reads them. `range` and `empty` hold for the default settings;
        an end of the range is None where there is no limit.

    Raises:
        UnknownNameError: For a name that does not exist.
        RewardError: If an installed reward cannot be used.

    Example:
        >>> describe_reward("box_f1").get("form")
        'function'
    """
    if isinstance(reward, Reward):
        return {**describe_info(reward.info), "yaml": reward.to_yaml()}
    info = reward_info(reward)
    described = describe_info(info)
    if described["broken"]:
        raise RewardError(f"reward {info.name!r} ({info.origin}) {described['broken']}")
    if info.form == "preset" and not any(setting["required"] for setting in described["settings"]):
        described["yaml"] = make_reward(reward).to_yaml()
    return described


def describe_info(info: RewardInfo) -> dict[str, Any]:
    """The fields of a record as plain values; a preset has the range, invariances and needs of what it makes."""
    claims, broken = info, info.broken
    if info.form == "preset" and broken is None and inspect.Parameter.empty not in info.settings.values():
        try:
            claims = make_reward(info.name).info
        except Exception as error:  # of a package's factory: the other rewards must still be listed
            broken = f"cannot be made: {type(error).__name__}: {error}"
    try:
        claims = claims.resolved({})
    except Exception:  # a function of settings that have no default, or one that a package got wrong
        claims = replace(claims, range=None, empty=None, monotone=())
    bounds, empty, monotone = claims.range, claims.empty, claims.monotone
    assert not callable(bounds)
    assert not callable(empty)
    assert not callable(monotone)
    needs = {"mask": claims.needs_mask, "truth": claims.needs_truth, "volume": claims.volume}
    docs = _argument_docs(info.function)
    return {
        "name": info.name,
        "form": info.form,
        "summary": info.summary if broken is None else f"broken: {broken}",
        "equation": info.equation,
        "settings": [
            {
                "name": name,
                "required": default is inspect.Parameter.empty,
                "default": None if default is inspect.Parameter.empty else _plain(default),
                "doc": docs.get(name, ""),
            }
            for name, default in info.settings.items()
        ],
        "range": None if bounds is None else [float(end) if math.isfinite(end) else None for end in bounds],
        "empty": None if empty is None else dict(empty),
        "invariant": list(claims.invariant),
        "monotone": list(monotone),
        "needs": [need for need, needed in needs.items() if needed],
        "source": info.source,
        "origin": info.origin,
        "broken": broken,
    }


def _argument_docs(function: Callable[..., Any] | None) -> dict[str, str]:
    """The sentences on each argument in a Google-style docstring."""
    docs: dict[str, str] = {}
    for source in (function, getattr(function, "__init__", None) if inspect.isclass(function) else None):
        section = re.search(r"^Args:\n((?:(?:[ \t]+.*)?\n?)*)", inspect.getdoc(source) or "", re.MULTILINE)
        lines = [] if section is None else inspect.cleandoc("\n" + section[1]).splitlines()
        name = ""
        for line in lines:
            head = re.match(r"\*{0,2}(\w+)(?: \([^)]*\))?: ?(.*)", line)
            if head is not None:
                name = head[1]
                docs[name] = head[2]
            elif line.strip() and name:
                docs[name] += " " + line.strip()
    return docs


def _plain(value: Any) -> Any:
    """`value` if JSON can hold it, else how Python shows it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return repr(value)
