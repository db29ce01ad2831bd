"""`reward_funcs` as the GRPO trainer takes them: names, files, functions and classes beside TRL's own forms."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from segrl.errors import SegRLError, unknown_name
from segrl.predictions.completion_format import CompletionFormat
from segrl.rewards.factory import make_reward
from segrl.rewards.registry import is_reward_form, list_rewards
from segrl.rewards.reward import Reward
from segrl.rewards.serialization import load_reward

__all__ = ["check_groups", "common_format", "resolve_reward_funcs"]

_PATH = re.compile(r"[\w.]+:[\w.]+")  # module:attribute


def resolve_reward_funcs(reward_funcs: Any) -> Any:
    """Registered names, files and reward functions to `Reward` objects; anything else is TRL's business."""
    if reward_funcs is None:
        return None
    single = not isinstance(reward_funcs, list)
    resolved = []
    for item in [reward_funcs] if single else reward_funcs:
        if is_reward_form(item) or (isinstance(item, str) and (item in list_rewards() or _PATH.fullmatch(item))):
            item = make_reward(item)
        elif isinstance(item, str) and item.endswith((".yaml", ".yml")):
            item = load_reward(item)
        elif isinstance(item, str) and "/" not in item and not Path(item).exists():
            raise unknown_name("reward", item, list_rewards())
        resolved.append(item)
    return resolved


def common_format(rewards: list[Reward], require_reasoning: bool, default: CompletionFormat) -> CompletionFormat:
    """How all rewards read completions, apart from the frame, which is the processor's."""
    formats = {replace(reward.completion_format, frame="relative_1000") for reward in rewards} or {default}
    if len(formats) > 1:
        listed = "; ".join(f"{reward.name!r}: {reward.completion_format}" for reward in rewards)
        raise SegRLError(f"rewards read completions in different ways ({listed}); make them with the same settings")
    completion_format = formats.pop()
    return replace(completion_format, require_reasoning=completion_format.require_reasoning and require_reasoning)


def check_groups(rewards: list[Reward], args: Any, answers: int) -> None:
    """A reward that compares the answers to a prompt needs all of them in one process."""
    rows = args.per_device_train_batch_size * args.steps_per_generation
    for reward in rewards:
        if reward.compares_answers and rows % answers:
            raise SegRLError(
                f"reward {reward.name!r} compares the answers to a prompt, and {rows} completions per process are not "
                f"a multiple of num_generations={answers}; change per_device_train_batch_size"
            )
