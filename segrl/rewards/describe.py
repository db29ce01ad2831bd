"""Everything that is known about a reward, as plain values; `segrl rewards describe` prints them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from segrl.errors import RewardError
from segrl.registry.plugins import find_plugins, inspect_plugins, plugin_origin
from segrl.registry.resolve import argument_docs
from segrl.rewards.factory import make_reward
from segrl.rewards.registry import ENTRY_POINT_GROUP, RewardInfo, adopt, registered_infos, reward_info
from segrl.rewards.reward import Reward
from segrl.rewards.serialization import dump_reward, is_reward_file

__all__ = ["describe_all", "describe_info", "describe_plugin", "describe_reward"]


def describe_reward(reward: str | Reward) -> dict[str, Any]:
    """Describe a reward.

    Args:
        reward: A name from `list_rewards`, "module:attribute", the path of a YAML file, or a reward.

    Returns:
        Plain values: `name`, `form`, `summary`, `equation`, `settings` (name, default, whether it is required, doc),
        `range`, `empty`, `invariant`, `monotone`, `needs`, `source`, `origin`; and for a preset or another composition
        `yaml`, its parts as `segrl.rewards.load_reward` reads them. `range` and `empty` hold for the default settings;
        an end of the range is None where there is no limit.

    Raises:
        UnknownNameError: For a name that does not exist.
        RewardError: If an installed reward cannot be used.

    Example:
        >>> described = describe_reward("box_f1")
        >>> described["range"], described["settings"][0]["name"], described["settings"][0]["default"]
        ([0.0, 1.0], 'min_iou', 0.5)
    """
    if isinstance(reward, Reward) or is_reward_file(reward):
        made = make_reward(reward)
        return {**describe_info(made.info), "yaml": dump_reward(made)}
    info = reward_info(reward)
    described = describe_info(info)
    if described["broken"]:
        raise RewardError(f"reward {info.name!r} ({info.origin}) {described['broken']}")
    if info.form == "preset" and not any(setting["required"] for setting in described["settings"]):
        described["yaml"] = dump_reward(make_reward(reward))
    return described


def describe_all(timeout: float = 10.0) -> list[dict[str, Any]]:
    """Describe every reward, sorted by name, in the form of `describe_reward` without `yaml`.

    Installed packages are imported in child processes; one that cannot be used has `broken` set to the reason, as has
    one whose name is taken.

    Args:
        timeout: Seconds that the import of one package may take.
    """
    known = {info.name: info for info in registered_infos()}
    rows = [describe_info(info) for info in known.values()]
    plugins = find_plugins(ENTRY_POINT_GROUP)
    if plugins.keys() - known.keys():
        reports = inspect_plugins(
            ENTRY_POINT_GROUP, timeout, preload=[__name__], describe=f"{__name__}:describe_plugin"
        )
        rows += [
            _broken(name, report.origin, report.broken) if report.broken else dict(report.details)
            for name, report in reports.items()
            if name not in known
        ]
    for name, info in known.items():
        for plugin in plugins.get(name, ()):
            if plugin_origin(plugin) != info.origin:
                taken = f"the name is taken by {info.origin}; use {plugin.value!r}"
                rows.append(_broken(name, plugin_origin(plugin), taken))
    return sorted(rows, key=lambda row: row["name"])


def describe_plugin(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Describe what an entry point has brought; run in the child process that imported it."""
    return describe_info(adopt(name, function))


def describe_info(info: RewardInfo, broken: str | None = None) -> dict[str, Any]:
    """Return the fields of a record as plain values; a preset has the range, invariances and needs of what it makes."""
    claims = info
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
    needs = {"mask": claims.needs_mask, "target": claims.needs_target, "volume": claims.volume}
    docs = {} if info.function is None else argument_docs(info.function)
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


def _broken(name: str, origin: str, reason: str) -> dict[str, Any]:
    return describe_info(RewardInfo(name, None, needs_target=False, origin=origin), reason)


def _plain(value: Any) -> Any:
    """`value` if JSON can hold it, else how Python shows it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return repr(value)
