"""Rewards: `make_reward("box_f1")`, or your own function under `@register_reward("name")`.

The built-in ones are in `core_seg`, `mask`, `boxes`, `points`, `text` and `medvol_r1`, and `presets` adds them up as
published systems do; importing these modules registers them. What makes a reward of a function is in `registry` (names
and claims), `making`, `reward` and `sources` (scores), `steps` (composition), `reading` (columns) and `files` (YAML).
"""

from segrl.rewards import boxes, core_seg, mask, medvol_r1, points, presets, text  # noqa: F401  registers them
from segrl.rewards.files import load_reward
from segrl.rewards.making import make_reward, weighted_sum
from segrl.rewards.reading import Reading
from segrl.rewards.registry import RewardInfo, list_rewards, register_preset, register_reward, reward_info
from segrl.rewards.reward import Reward

__all__ = [
    "Reading",
    "Reward",
    "RewardInfo",
    "list_rewards",
    "load_reward",
    "make_reward",
    "register_preset",
    "register_reward",
    "reward_info",
    "weighted_sum",
]
