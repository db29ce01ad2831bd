"""Score a made-up answer with a reward, so that it fails before training rather than in it."""

from __future__ import annotations

import inspect

from segrl.errors import RewardError
from segrl.rewards.example import example_pair
from segrl.rewards.nodes import TRL_COLUMNS, Leaf
from segrl.rewards.reward import Reward

__all__ = ["try_reward"]


def try_reward(reward: Reward) -> None:
    """Score one made-up answer: an image with one lesion, or a volume, each with its mask, answered rightly.

    A TRL reward function that needs other columns of the data set, and a sum with one, is left out.

    Args:
        reward: The reward.

    Raises:
        RewardError: The reward fails, or returns anything but a finite number or None.

    Example:
        >>> from segrl.rewards import make_reward
        >>> def broken(prediction, target, *, weight=1.0):
        ...     return weight / 0
        >>> try_reward(make_reward("box_f1"))
        >>> try_reward(make_reward(broken))
        Traceback (most recent call last):
        segrl.errors.RewardError: a first try on a made-up answer failed: reward 'broken' (example): ...
    """
    if _needs_more_columns(reward):
        return
    prediction, target = example_pair(reward.volume, reward.completion_format)
    try:
        reward.score(prediction, target)
    except RewardError as error:
        raise RewardError(f"a first try on a made-up answer failed: {error}") from error


def _needs_more_columns(reward: Reward) -> bool:
    if isinstance(reward.source, Leaf) and reward.source.info.form == "trl":
        parameters = inspect.signature(reward.source.function).parameters.values()
        needed = {
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        return not needed <= TRL_COLUMNS
    return any(map(_needs_more_columns, reward.inner))
