"""Attention of the groups of a packed row.

Every prompt attends to itself once, causally. The completions of a prompt attend to the prompt's keys and to
themselves. The work is P*P/2 + G*T*(P + T/2) instead of G*(P + T)*(P + T)/2 for G separate rows, and no mask over the
whole row is built. Groups of similar shape are one batch.
"""

# U groups of a batch, G completions of a prompt, P prompt tokens, T completion tokens with padding, L packed tokens
# S places of all batches; H query heads, K key-value heads, D head width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.sharing.group_batches import Batch, Batches

__all__ = ["attend"]


def attend(
    batches: Batches, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Compute the output (1, L, H, D) of the groups of a packed row; shapes as in `shared_attention`."""
    settings = {"dropout_p": dropout, "scale": scaling}
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if batches.index is not None:
        tensors = [tensor.index_select(1, batches.index) for tensor in tensors]
    if len(batches.parts) == 1:
        output = _attend_batch(batches.parts[0], tensors, settings)
    else:
        sizes = [len(batch.prompts) * batch.width for batch in batches.parts]
        pieces = zip(batches.parts, *(tensor.split(sizes, dim=1) for tensor in tensors), strict=True)
        output = torch.cat([_attend_batch(batch, piece, settings) for batch, *piece in pieces], dim=1)
    return output.contiguous() if batches.places is None else output.index_select(1, batches.places)


def _attend_batch(batch: Batch, tensors: Sequence[Tensor], settings: dict[str, Any]) -> Tensor:
    """Compute the output (1, U*(P+G*T), H, D) of a batch from its query, key and value (1, U*(P+G*T), heads, D)."""
    prompt, rows = batch.prompt, len(batch.prompts)
    if rows > 1:
        tensors = [tensor.unflatten(1, (rows, -1)).squeeze(0) for tensor in tensors]
    query, key, value = tensors
    shared_key, shared_value = key[:, :prompt], value[:, :prompt]
    output = _sdpa(query[:, :prompt], shared_key, shared_value, is_causal=prompt > 1, **settings)
    if batch.longest:
        size = batch.completions, batch.longest
        queries = query[:, prompt:].reshape(-1, batch.longest, *query.shape[2:])  # (U*G, T, H, D)
        keys, values = (
            torch.cat(
                [own[:, None].expand(-1, size[0], -1, -1, -1), whole[:, prompt:].unflatten(1, size)], dim=2
            ).flatten(0, 1)  # (U*G, P+T, K, D)
            for own, whole in ((shared_key, key), (shared_value, value))
        )
        written = _sdpa(queries, keys, values, batch=batch, **settings)
        output = torch.cat([output, written.reshape(rows, -1, *written.shape[2:])], dim=1)
    return output.flatten(0, 1).unsqueeze(0) if rows > 1 else output


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, batch: Batch | None = None, **settings: Any) -> Tensor:
    """Compute attention of rows (B, N, heads, D) with grouped key-value heads. With `batch`, completion tokens see what
    it says."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask: Any = None
    if batch is not None:
        half = query.dtype in (torch.float16, torch.bfloat16)
        if query.is_cuda and half and query.size(-1) % 8 == 0 and not batch.ragged:
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(query.size(2), key.size(2))  # flash attention computes it without one in memory
        else:
            mask = batch.visible
    repeats = query.size(1) // key.size(1)
    if repeats > 1 and query.is_cuda and mask is not None:  # CUDA's fast kernels take no mask with grouped heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        repeats = 1
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=repeats > 1, **settings)
    return output.transpose(1, 2)
