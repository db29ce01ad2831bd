"""`Rollout`: tokens, states and segmenter inputs between generation and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from segrl.heads.decoding import Completions, generation_states
from segrl.heads.requests import Recording, SegInput

__all__ = ["Rollout", "is_policy", "tensors_of_prompts"]


@dataclass(eq=False)
class Rollout:
    """Tokens, states and segmenter inputs of one call of `_generate_and_score_completions`.

    Attributes:
        prompt_ids: The prompts as TRL scores them.
        completions: Tokens of the answers and the backbone's states at them.
        inputs: What the head's segmenter sees for each answer.
    """

    prompt_ids: list[list[int]] | None = None
    completions: Completions | None = None
    inputs: list[SegInput | None] = field(default_factory=list)
    _recorded: tuple[list[list[int]], list[list[int]], Tensor | None] | None = None

    @property
    def recorded(self) -> bool:
        """Whether a generation was recorded."""
        return self._recorded is not None

    @property
    def needs_states(self) -> bool:
        """Whether the states of the completions are still missing."""
        return self.completions is not None and self.completions.states is None

    def record(
        self, prompt_ids: Sequence[Any], completion_ids: Sequence[Any], recording: Recording, synced: bool = False
    ) -> None:
        """Keep the states of a generation; `synced` as in `generation_states`."""
        states = generation_states(recording, completion_ids, synced)
        self._recorded = _lists(prompt_ids), _lists(completion_ids), states

    def finish(
        self,
        prompt_ids: Sequence[Any],
        completion_ids: Sequence[Any],
        own: Sequence[Any] | None,
        device: torch.device,
        queries: tuple[int, int] | None = None,
    ) -> None:
        """Take the prompts and completions that TRL goes on with.

        Tools, environments and rollout functions put text of others between or around the generated tokens: then the
        recorded states are not those of the completions, which get theirs from a scoring pass; nor do `queries`, token
        and number of those that a probe wants behind each completion, have any.
        """
        self.prompt_ids, ids = _lists(prompt_ids), _lists(completion_ids)
        self.completions = Completions.of(ids, device, own, queries)
        if queries is None and self._recorded is not None and self._recorded[:2] == (self.prompt_ids, ids):
            self.completions.states = self._recorded[2]
        self._recorded = None

    def take_states(self, recording: Recording, attention_mask: Tensor) -> None:
        """Take the states of the completions from a scoring pass.

        Args:
            recording: Of the pass.
            attention_mask: (B, T) of the completions in it: `mask_truncated_completions` hides a whole one from
                attention, and then its states mean nothing.
        """
        assert self.completions is not None
        keep = self.completions.ids.size(1)
        self.completions.states = torch.cat([states[:, -keep:] for states in recording.calls])
        visible = (attention_mask != 0).any(1, keepdim=True)
        self.completions.known = visible.expand_as(self.completions.exists)


def tensors_of_prompts(
    prompt_ids: Sequence[Sequence[int]], completions: Completions, pad: int, multimodal: dict[str, Any], images: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Prompts and completions as a batch for a scoring pass, as TRL pads it: prompts left, completions right.

    Args:
        prompt_ids: The prompts.
        completions: Their completions.
        pad: Id that fills the gaps.
        multimodal: What TRL's `_tokenize_prompts` returned beside the ids.
        images: Images of each prompt, or None.

    Returns:
        (B, P + T) input ids and attention mask, and the other inputs of the model.
    """
    device = completions.ids.device
    longest = max(len(ids) for ids in prompt_ids)

    def left(values: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[filler] * (longest - len(v)) + list(v) for v in values], device=device)

    written = completions.exists
    input_ids = torch.cat([left(prompt_ids, pad), completions.ids.masked_fill(~written, pad)], dim=1)
    attention_mask = torch.cat([left([[1] * len(v) for v in prompt_ids], 0), written.long()], dim=1)
    extra: dict[str, Any] = {}
    for name, value in multimodal.items():
        if name in ("token_type_ids", "mm_token_type_ids"):
            types = left([list(map(int, v)) for v in value], 0)
            extra[name] = torch.cat([types, torch.zeros_like(completions.ids)], dim=1)
        elif torch.is_tensor(value):
            extra[name] = value.to(device)
    if images is not None:
        extra["num_images"] = [len(group) if group else 0 for group in images]
    return input_ids, attention_mask, extra


def is_policy(model: Any) -> bool:
    """Return False while PEFT's adapters are off or swapped for the reference's: those states are another model's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            return not module.disable_adapters and "ref" not in module.active_adapters
    return True


def _lists(rows: Sequence[Any]) -> list[list[int]]:
    return [list(map(int, row)) for row in rows]
