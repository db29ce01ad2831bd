"""Guard against an engine, such as vLLM, that samples from another model than the one that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from segrl.errors import SegRLError

__all__ = ["check_sampling_gap"]

_CAUSES = (
    "likely causes: weights that were not synchronised (sleep level 2 drops them), a server of another model or "
    "adapter, another dtype or quantization than the trainer's, or processed and raw log-probabilities mixed"
)


def check_sampling_gap(trainer: Any, batch: Mapping[str, Any], *, first: bool) -> float | None:
    """Compare log-probabilities of an engine with the trainer's; all processes call this.

    Args:
        trainer: Its `max_sampling_gap` setting is the largest mean difference of a token, in nats; None or a setting of
            TRL's own checks nothing.
        batch: What TRL made of a rollout. Without `sampling_per_token_logps` and `old_per_token_logps` (B, T), which
            are there if `vllm_importance_sampling_correction` is on, nothing is compared.
        first: Whether this is the first rollout, in which a gap is an error; later ones are warned of.

    Returns:
        The mean difference over all processes, or None if nothing was compared.

    Raises:
        SegRLError: The gap of the first rollout is larger than the setting.
    """
    limit = getattr(trainer.args, "max_sampling_gap", None)
    sampled, own = batch.get("sampling_per_token_logps"), batch.get("old_per_token_logps")
    if limit is None or sampled is None or own is None:
        return None
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    difference = (sampled - own).float().abs()
    known = (mask != 0) & ~difference.isnan()  # vLLM says NaN of a token that it cannot score
    totals = torch.stack([difference[known].sum(), known.sum().float()])
    total, count = trainer.accelerator.reduce(totals, reduction="sum").tolist()
    if not count:
        return None
    gap = total / count
    if gap > limit:
        text = (
            f"max_sampling_gap={limit}: log-probabilities of the sampled tokens differ by {gap:.2g} on average from "
            f"the trainer's; {_CAUSES}"
        )
        if first:
            raise SegRLError(f"{text}; set max_sampling_gap=None to train all the same")
        warnings.warn(text, stacklevel=2)
    return gap
