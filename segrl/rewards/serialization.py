"""Rewards to YAML and back.

    name: mine                       # optional
    completion_format: {frame: relative_1000}  # optional; see `CompletionFormat`
    rewards:
      - reward: format
      - reward: box_f1               # a registered name, or module:attribute
        name: boxes                  # optional
        weight: 2.0                  # 1.0 if left out
        settings: {min_iou: 0.3}
        steps:
          - gate: {reward: format}
          - clip: [0, 1]
          - schedule: {0: 0, 0.3: 1}

A file may also hold a single reward: its name, or the keys of one item. An item may be a sum of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml

from segrl.errors import RewardError, SegRLError, unknown_name
from segrl.predictions.completion_format import CompletionFormat
from segrl.registry.resolve import path_of, resolve_attribute
from segrl.rewards.nodes import Leaf
from segrl.rewards.registry import FORMAT_SETTINGS, registered_name
from segrl.rewards.reward import Reward, build, resolve_reward, sum_rewards, usual_format
from segrl.rewards.transforms import STEPS, Gate, Schedule, Step

__all__ = ["dump_reward", "from_dict", "is_reward_file", "load_reward", "to_dict"]

KEYS = ("name", "completion_format", "reward", "rewards", "settings", "steps", "weight")


def is_reward_file(value: Any) -> bool:
    """Return whether this is the path of a YAML file, rather than a name."""
    return isinstance(value, Path) or (isinstance(value, str) and value.endswith((".yaml", ".yml")))


def load_reward(path: str | Path, *, allow_imports: bool = True) -> Reward:
    """Read a reward from a YAML file.

    A file that names a reward as `module:attribute` runs code: the module is imported. Pass `allow_imports=False` for
    files of others.

    Args:
        path: The file; the module docstring of `segrl.rewards.serialization` shows its form.
        allow_imports: Whether the file may name rewards as `module:attribute`; False leaves registered names, and
            those of installed packages.

    Raises:
        RewardError: The file is missing, is not YAML, is nested too deep or repeats a key, a value is wrong, or a
            reward is `module:attribute` without `allow_imports`; the message names the location in the file.
        UnknownNameError: For a reward, setting, step or key that does not exist; it suggests the closest one.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "mine.yaml")
        ...     _ = file.write_text("reward: box_f1\\nsteps: [{scale: 2}]")
        ...     load_reward(file).range
        (0.0, 2.0)
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path}: cannot be read: {error}") from error
    try:
        return from_dict(yaml.load(text, Loader=_Loader), str(path), allow_imports=allow_imports)
    except yaml.YAMLError as error:
        raise RewardError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise RewardError(f"{path}: nested too deep; expected a sum of rewards, or of a few sums") from None


def dump_reward(reward: Reward, path: str | Path | None = None) -> str:
    """Return the YAML text that `load_reward` reads, and write it to a file if a path is given.

    Args:
        reward: The reward.
        path: The file to write.

    Raises:
        RewardError: A function can be found neither by its registered name nor by its module, or a setting is no
            plain value.

    Example:
        >>> from segrl.rewards import make_reward
        >>> print(dump_reward(make_reward("box_f1", min_iou=0.3).clip(0, 0.5)))
        reward: box_f1
        settings:
          min_iou: 0.3
        steps:
        - clip:
            low: 0
            high: 0.5
        <BLANKLINE>
    """
    try:
        text = yaml.safe_dump(to_dict(reward), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise RewardError(f"reward {reward.name!r} cannot be written: a setting is no plain value: {error}") from error
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def from_dict(data: Any, where: str = "reward", *, allow_imports: bool = True) -> Reward:
    """Build a reward from plain values; `where` is their location in errors, the rest as in `load_reward`."""
    if isinstance(data, str):
        return _located(where, _named, data, {}, allow_imports)
    if not isinstance(data, Mapping):
        raise RewardError(f"{where}: expected a mapping with 'reward' or 'rewards', got {data!r:.100}")
    for key in data:
        if key not in KEYS:
            raise unknown_name(f"key in {where}", str(key), KEYS)
    if ("reward" in data) == ("rewards" in data):
        raise RewardError(f"{where}: expected one of 'reward' (a name) and 'rewards' (a list), got {sorted(data)}")
    given = _mapping(data.get("completion_format"), f"{where}.completion_format")
    for key in given:
        if key not in FORMAT_SETTINGS:
            raise unknown_name(f"key in {where}.completion_format", str(key), FORMAT_SETTINGS)
    if "reward" in data:
        if not isinstance(data["reward"], str):
            raise RewardError(f"{where}.reward: {data['reward']!r:.100}; expected the name of a reward")
        settings = _mapping(data.get("settings"), f"{where}.settings")
        reward = _located(where, _named, data["reward"], settings, allow_imports)
    else:
        if "settings" in data:
            raise RewardError(f"{where}: a sum has no 'settings'; give them to its rewards")
        parts = []
        for n, item in enumerate(_list(data["rewards"], f"{where}.rewards")):
            weight = item.get("weight", 1.0) if isinstance(item, Mapping) else 1.0
            parts.append((from_dict(item, f"{where}.rewards[{n}]", allow_imports=allow_imports), weight))
        # The completion format of a sum is decided below, where all that is given is known.
        reward = _located(where, sum_rewards, parts, "total", CompletionFormat() if given else None)
    steps = tuple(
        _step(item, f"{where}.steps[{n}]", allow_imports)
        for n, item in enumerate(_list(data.get("steps"), f"{where}.steps"))
    )
    steps = (*reward.steps, *steps)
    of_preset = "reward" in data and reward.completion_format != usual_format(reward.source, reward.steps)
    completion_format = reward.completion_format if of_preset else None
    if given:
        completion_format = completion_format or usual_format(reward.source, steps) or CompletionFormat()
        completion_format = _located(f"{where}.completion_format", replace, completion_format, **given)
    name = data.get("name", reward.name)
    if not isinstance(name, str) or not name:
        raise RewardError(f"{where}.name: {name!r}; expected a text")
    return _located(where, build, name, reward.source, steps, completion_format)


def to_dict(reward: Reward) -> dict[str, Any]:
    """Return plain values from which `from_dict` builds an equal reward."""
    data: dict[str, Any] = {}
    if isinstance(reward.source, Leaf):
        reference = _reference(reward.source, reward.name)
        data["reward"] = reference
        if reward.name != reference.rpartition(":")[2]:
            data["name"] = reward.name
        if reward.source.settings:
            data["settings"] = {key: _thawed(value) for key, value in reward.source.settings.items()}
    else:
        data["name"] = reward.name
        data["rewards"] = [
            {**to_dict(part), **({} if weight == 1.0 else {"weight": weight})} for part, weight in reward.source.parts
        ]
    if reward.steps:
        data["steps"] = [{step.key: _step_values(step)} for step in reward.steps]
    usual = usual_format(reward.source, reward.steps)
    changed = {
        option.name: _thawed(getattr(reward.completion_format, option.name))
        for option in fields(CompletionFormat)
        if usual is None or getattr(reward.completion_format, option.name) != getattr(usual, option.name)
    }
    if callable(changed.get("frame")):
        raise RewardError(
            f"reward {reward.name!r}: a frame that is a function cannot be written; expected a frame kind"
        )
    if changed:
        data["completion_format"] = changed
    return data


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key in a mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # pyright: ignore
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.YAMLError(f"the key {twice!r} is there twice{node.start_mark}")
        return mapping


def _named(reference: str, settings: Mapping[str, Any], allow_imports: bool) -> Reward:
    if ":" in reference and not allow_imports:
        raise RewardError(
            f"{reference!r} would import code, and allow_imports=False; expected the name of a registered reward"
        )
    return resolve_reward(reference, settings)


def _step(item: Any, where: str, allow_imports: bool) -> Step:
    if not isinstance(item, Mapping) or len(item) != 1:
        raise RewardError(f"{where}: expected one step, such as clip: [0, 1], got {item!r:.100}")
    ((key, values),) = item.items()
    if key not in STEPS:
        raise unknown_name(f"step in {where}", str(key), STEPS)
    step = STEPS[key]
    known = [option.name for option in fields(step)]  # pyright: ignore[reportArgumentType]
    if step is Schedule and isinstance(values, Mapping) and "points" not in values and not _texts(values):
        values = {"points": values}
    if not isinstance(values, Mapping):
        listed = values if isinstance(values, list) else [values]
        if step is Schedule:
            listed = [values]
        if len(listed) > len(known):
            raise RewardError(f"{where}.{key}: {values!r}; expected at most {len(known)} values ({', '.join(known)})")
        values = dict(zip(known, listed, strict=False))
    for name in values:
        if name not in known:
            raise unknown_name(f"setting in {where}.{key}", str(name), known)
    for option in fields(step):  # pyright: ignore[reportArgumentType]
        if option.default is MISSING and option.name not in values:
            raise RewardError(f"{where}.{key}: needs the setting {option.name!r}")
    given = dict(values)
    if step is Gate:
        given["reward"] = from_dict(given["reward"], f"{where}.gate.reward", allow_imports=allow_imports)
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in ("low", "high", "factor", "offset", "above") and not number:
            raise RewardError(f"{where}.{key}.{name}: {value!r}; expected a number")
    return _located(f"{where}.{key}", step, **given)


def _step_values(step: Step) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in fields(step):  # pyright: ignore[reportArgumentType]
        value = getattr(step, option.name)
        if isinstance(value, Reward):
            value = to_dict(value)
        elif isinstance(step, Schedule):
            value = dict(value)
        if option.default is MISSING or value != option.default:
            values[option.name] = value
    return values


def _reference(leaf: Leaf, name: str) -> str:
    """Return the text by which `make_reward` finds the function again."""
    if known := registered_name(leaf.function):
        return known
    path = path_of(leaf.function)
    if path is None or not _leads_to(path, leaf.function):
        raise RewardError(
            f"reward {name!r} cannot be written: its function is neither registered nor at the top of a module; "
            "decorate it with @register_reward"
        )
    return path


def _leads_to(path: str, function: Any) -> bool:
    try:
        return resolve_attribute(path) is function
    except SegRLError:
        return False


def _located(where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function; its errors name the location in the file."""
    try:
        return function(*args, **kwargs)
    except SegRLError as error:
        message = str(error)
        raise (error if message.startswith(where) else type(error)(f"{where}: {message}")) from error
    except TypeError as error:
        raise RewardError(f"{where}: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RewardError(f"{where}: expected a mapping of names to values, got {value!r:.100}")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise RewardError(f"{where}: expected a list, got {value!r:.100}")
    return list(value)


def _texts(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) for key in values)


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value
