"""`reward_funcs` as the GRPO trainer takes them: names, files, functions and classes beside TRL's own forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from segrl.errors import SegRLError
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.prompt_settings import PromptSettings
from segrl.rewards.factory import is_reward, make_reward
from segrl.rewards.reward import Reward

__all__ = ["check_groups", "common_format", "resolve_reward_funcs"]


def resolve_reward_funcs(reward_funcs: Any) -> Any:
    """Return `reward_funcs` with names, files and reward functions as `Reward` objects; TRL's own forms stay."""
    if reward_funcs is None:
        return None
    given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    return [make_reward(item) if is_reward(item) else item for item in given]


def common_format(rewards: list[Reward], settings: PromptSettings) -> CompletionFormat:
    """Return the completion format that all rewards share, apart from the frame, which is the processor's.

    Args:
        rewards: The rewards; without one the settings decide.
        settings: How the model is asked: without `reasoning` no answer needs a block of it.

    Raises:
        SegRLError: Two rewards read completions in different ways.
    """
    formats = {replace(reward.completion_format, frame="relative_1000") for reward in rewards} or {
        settings.completion_format
    }
    if len(formats) > 1:
        listed = "; ".join(f"{reward.name!r}: {reward.completion_format}" for reward in rewards)
        raise SegRLError(f"rewards read completions in different ways ({listed}); make them with the same settings")
    found = formats.pop()
    return replace(found, require_reasoning=found.require_reasoning and settings.reasoning)


def check_groups(rewards: list[Reward], args: Any, answers: int) -> None:
    """Raise if a reward compares the answers to a prompt and a process does not have all of them."""
    rows = args.per_device_train_batch_size * args.steps_per_generation
    for reward in rewards:
        if reward.compares_answers and rows % answers:
            raise SegRLError(
                f"reward {reward.name!r} compares the answers to a prompt, and {rows} completions per process are not "
                f"a multiple of num_generations={answers}; change per_device_train_batch_size"
            )
