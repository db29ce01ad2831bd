"""Attention of the groups of a packed row.

Every prompt attends to itself once, causally. The completions of a prompt attend, as one batch, to the prompt's keys
and to themselves. The work is P*P/2 + G*T*(P + T/2) instead of G*(P + T)*(P + T)/2 for G separate rows, and no mask
over the whole row is built.
"""

# G completions of a prompt, P prompt tokens, T completion tokens with padding, S without, L packed tokens
# H query heads, K key-value heads, D head width; shapes as "1 H L D"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.sharing.layout import Group

__all__ = ["attend"]


def attend(
    groups: Sequence[Group], query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Compute the output (1, L, H, D) of the groups of a packed row; shapes as in `shared_attention`."""
    outputs = []
    for group in groups:
        middle = group.start + group.prompt
        own_key, own_value = key[:, :, group.start : middle], value[:, :, group.start : middle]
        own_query = query[:, :, group.start : middle]
        settings = {"dropout": dropout, "scale": scaling}
        outputs.append(_sdpa(own_query, own_key, own_value, is_causal=group.prompt > 1, **settings))
        if group.longest:
            outputs.append(_completions(group, query, own_key, own_value, key, value, settings))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _completions(
    group: Group,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    key: Tensor,
    value: Tensor,
    settings: dict[str, Any],
) -> Tensor:
    """Compute the output (1, H, S, D) of a group's completion tokens, with the completions as a batch of G."""
    first = group.start + group.prompt
    rows, longest = len(group.lengths), group.longest

    def batched(tensor: Tensor) -> Tensor:  # "1 H L D" -> "G H T D"
        own = tensor[0, :, first : group.end]
        if group.gather is not None:
            own = own[:, group.gather.flatten()]
        return own.unflatten(1, (rows, longest)).transpose(0, 1)

    keys = torch.cat([prompt_key.expand(rows, -1, -1, -1), batched(key)], dim=2)
    values = torch.cat([prompt_value.expand(rows, -1, -1, -1), batched(value)], dim=2)
    output = _sdpa(batched(query), keys, values, prompt=group.prompt, **settings)
    flat = output.transpose(0, 1).flatten(1, 2)  # "H G*T D"
    return (flat if group.scatter is None else flat[:, group.scatter]).unsqueeze(0)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, prompt: int | None = None, **settings: Any) -> Tensor:
    """Compute attention with grouped key-value heads. With `prompt`, this number of keys is visible to all queries, and
    the keys after them are causal."""
    mask: Any = None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if prompt is not None:
        shape = query.size(2), key.size(2)
        if query.is_cuda and half and query.size(-1) % 8 == 0:
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(*shape)  # flash attention computes it without a mask in memory
        else:
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(prompt)
    repeats = query.size(1) // key.size(1)
    if repeats > 1 and query.is_cuda and mask is not None:  # CUDA's fast kernels take no mask with grouped heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        repeats = 1
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=settings["dropout"],
        scale=settings["scale"],
        is_causal=settings.get("is_causal", False),
        enable_gqa=repeats > 1,
    )
