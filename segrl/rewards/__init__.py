"""Rewards: `make_reward("box_f1")`, or your own function under `@register_reward("name")`.

Files import one way: `forms`, `registry`, `settings` (what a reward function declares), `columns`, `base` (the batch),
`transforms`, `nodes`, `reward` (scores and composition), `serialization` (YAML), `factory` (`make_reward`), `describe`
and `frameworks`. The rewards themselves are in `builtin`, which registers them.
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
from segrl.rewards.serialization import dump_reward, load_reward

__all__ = [
    "CompletionFormat",
    "Reward",
    "RewardInfo",
    "SwiftORM",
    "VerlBatchScore",
    "VerlScore",
    "dump_reward",
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
