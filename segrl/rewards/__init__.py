"""Rewards: `make_reward("box_f1")`, or your own function under `@register_reward("name")`.

The built-in ones are in `core_seg`, `mask`, `boxes`, `points`, `text` and `medvol_r1`, and `presets` adds them up as
published systems do; importing these modules registers them. What makes a reward of a function is in `registry` (names
and claims), `making`, `reward` and `sources` (scores), `steps` (composition), `reading` (columns) and `files` (YAML).
"""

from segrl.predictions.completion_format import CompletionFormat
from segrl.rewards import builtin  # noqa: F401  registers them
from segrl.rewards.factory import make_reward, weighted_sum
from segrl.rewards.frameworks import (
    SwiftORM,
    VerlBatchScore,
    VerlScore,
    easyr1_compute_score,
    swift_orm,
    verl_compute_score,
)
from segrl.rewards.registry import RewardInfo, list_rewards, register_preset, register_reward, reward_info
from segrl.rewards.reward import Reward
from segrl.rewards.serialization import load_reward

__all__ = [
    "CompletionFormat",
    "Reward",
    "RewardInfo",
    "SwiftORM",
    "VerlBatchScore",
    "VerlScore",
    "easyr1_compute_score",
    "list_rewards",
    "load_reward",
    "make_reward",
    "register_preset",
    "register_reward",
    "reward_info",
    "swift_orm",
    "verl_compute_score",
    "weighted_sum",
]
