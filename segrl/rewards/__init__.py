"""Rewards: `make_reward("box_f1")`, or your own function under `@register_reward("name")`."""

from segrl.rewards.core_seg import box_f1, dual_granularity_mask, format_reward
from segrl.rewards.files import load_reward
from segrl.rewards.making import make_reward, weighted_sum
from segrl.rewards.reading import Reading
from segrl.rewards.registry import RewardInfo, list_rewards, register_preset, register_reward, reward_info
from segrl.rewards.reward import Reward

__all__ = [
    "Reading",
    "Reward",
    "RewardInfo",
    "box_f1",
    "dual_granularity_mask",
    "format_reward",
    "list_rewards",
    "load_reward",
    "make_reward",
    "register_preset",
    "register_reward",
    "reward_info",
    "weighted_sum",
]
