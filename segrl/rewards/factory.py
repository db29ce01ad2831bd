"""`make_reward` and `weighted_sum`: rewards from names, files, functions and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segrl.predictions.completion_format import CompletionFormat
from segrl.rewards.forms import can_be_reward
from segrl.rewards.registry import list_rewards, registered_name
from segrl.rewards.reward import AnyReward, Reward, resolve_reward, sum_rewards
from segrl.rewards.serialization import is_reward_file, load_reward

__all__ = ["is_reward", "make_reward", "weighted_sum"]


def make_reward(reward: AnyReward, **settings: Any) -> Reward:
    """Make a reward.

    Args:
        reward: A name from `list_rewards`, "module:attribute", the path of a YAML file, a function or class in one of
            the forms of `segrl.rewards.forms`, or a `Reward`.
        **settings: Keyword arguments of the function, and those of `CompletionFormat` (`frame`, `seg_token`,
            `require_seg`, `require_reasoning`, `answer_format`). Lists become tuples. A file and a `Reward` take
            only the latter.

    Raises:
        UnknownNameError: For a name or a setting that does not exist; it suggests the closest one.
        FrameError: For a frame kind that does not exist, or that needs a processor.
        RewardError: If a setting is missing or of the wrong type, a file has an error, or the reward cannot be
            imported.

    Example:
        >>> make_reward("box_f1", min_iou=0.3).name
        'box_f1'
    """
    return resolve_reward(load_reward(str(reward)) if is_reward_file(reward) else reward, settings)


def weighted_sum(
    parts: Mapping[Any, float] | Sequence[tuple[AnyReward, float]],
    name: str = "total",
    *,
    completion_format: CompletionFormat | None = None,
) -> Reward:
    """Add rewards up. In training the mean of every part is logged as `name/part`.

    Args:
        parts: Whatever `make_reward` takes, with weights.
        name: Name of the sum.
        completion_format: How completions are parsed; by default as by those parts that differ from
            `CompletionFormat()`.

    Returns:
        The sum. A part that does not apply to a row (None) is left out there.

    Raises:
        RewardError: No parts, two parts with one name, a part named "total", a weight that is not finite, or parts
            that read completions in different ways.

    Example:
        >>> weighted_sum({"format": 1.0, "box_f1": 2.0}).range
        (0.0, 3.0)
    """
    pairs = parts.items() if isinstance(parts, Mapping) else parts
    return sum_rewards([(make_reward(part), weight) for part, weight in pairs], name, completion_format)


def is_reward(value: Any) -> bool:
    """Return whether `make_reward` is to make a reward of this; if not, it is TRL's: its own form, or a model.

    A text is the name of a model on the hub ("owner/model") or of a local folder unless it can be a reward only: a
    registered name, "module:attribute" or a YAML file.
    """
    if isinstance(value, str | Path):
        text = str(value)
        return is_reward_file(value) or text in list_rewards() or not ("/" in text or Path(text).exists())
    return isinstance(value, Reward) or can_be_reward(value) or registered_name(value) is not None
