"""Rewards: `make_reward("box_f1")`, or your own function under `@register_reward("name")`."""

from segrl.rewards.core_seg import box_f1, dual_granularity_mask, format_reward
from segrl.rewards.registry import Reading, Reward, list_rewards, make_reward, register_reward

__all__ = [
    "Reading",
    "Reward",
    "box_f1",
    "dual_granularity_mask",
    "format_reward",
    "list_rewards",
    "make_reward",
    "register_reward",
]
