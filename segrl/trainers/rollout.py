"""What one rollout collects between generation and the rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from segrl.heads.mask_head import SegInput

__all__ = []


@dataclass(eq=False)
class _Rollout:
    """What one call of `_generate_and_score_completions` collects.

    Attributes:
        generated: prompt and completion ids of the first generation, whose states were recorded.
        prompt_ids: the prompts as TRL scores them.
        states: backbone states of the completion tokens, "B T D".
        own: per completion and token, 1 where the model wrote it and 0 for what tools or environments said.
        foreign: completion tokens "B T" that the model did not write (tools') or whose states are not to be used.
        inputs: the segmenter's input of each row.
    """

    generated: tuple[list, list] | None = None
    prompt_ids: list[list[int]] | None = None
    states: Tensor | None = None
    own: list[list[int]] | None = None
    foreign: Tensor | None = None
    inputs: list[SegInput] = field(default_factory=list)


def _last_run(ids: list[int], own: list[int]) -> list[int]:
    """The last tokens in a row for which `own` is 1."""
    end = next((n + 1 for n in reversed(range(len(ids))) if own[n]), 0)
    start = next((n + 1 for n in reversed(range(end)) if not own[n]), 0)
    return ids[start:end]


def _wide(mask: Tensor, width: int) -> Tensor:
    """A mask "B T" with exactly `width` columns: cut, or filled with False."""
    return torch.nn.functional.pad(mask, (0, width - mask.size(1)))


def _is_policy(model: Any) -> bool:
    """False while PEFT's adapters are off or swapped for the reference's: those states are another model's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            return not module.disable_adapters and "ref" not in module.active_adapters
    return True
