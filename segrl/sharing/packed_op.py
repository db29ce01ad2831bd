"""Attention over a packed row as one operation of PyTorch, so that a compiled layer around it is one graph.

The layout reaches the operation as a tensor of numbers, which a compiler does not look into: no layout makes it compile
again. The backward pass computes the attention once more and differentiates it.
"""

# H query heads, K key-value heads, D head width, L packed tokens

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from segrl.sharing.group_attention import attend
from segrl.sharing.group_batches import Batches, Group, batch_groups
from segrl.sharing.layout import Layout

__all__ = ["decode_layout", "encode_layout", "packed_attention"]


def encode_layout(layout: Layout) -> Tensor:
    """Return the groups of a layout as an int64 tensor on the CPU.

    Example:
        >>> from segrl.sharing.layout import build_layout
        >>> encode_layout(build_layout([[0, 1]], [3, 3], [2, 1], width=2, device="cpu")).tolist()
        [0, 3, 2, 2, 1]
    """
    numbers = [n for group in layout.groups for n in (group.start, group.prompt, len(group.lengths), *group.lengths)]
    return torch.tensor(numbers, dtype=torch.int64)


@lru_cache(maxsize=64)
def decode_layout(numbers: tuple[int, ...], device: torch.device) -> Batches:
    """Return the groups that `encode_layout` wrote as batches, with index tensors on a device."""
    return batch_groups(list(_groups(numbers)), device)


def _groups(numbers: tuple[int, ...]) -> Iterator[Group]:
    position = 0
    while position < len(numbers):
        start, prompt, count = numbers[position : position + 3]
        yield Group(start, prompt, numbers[position + 3 : position + 3 + count])
        position += 3 + count


@torch.library.custom_op("segrl::packed_attention", mutates_args=())
def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scaling: float) -> Tensor:
    """Compute attention over one packed row.

    Args:
        query: (1, H, L, D).
        key: (1, K, L, D).
        value: (1, K, L, D).
        layout: What `encode_layout` returned.
        scaling: Factor of the scores.

    Returns:
        (1, L, H, D).
    """
    return attend(decode_layout(tuple(layout.tolist()), query.device), query, key, value, 0.0, scaling)


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scaling: float) -> Tensor:
    return query.new_empty(1, query.size(2), query.size(1), value.size(3))


@contextmanager
def _differentiable() -> Iterator[None]:
    """Inside the context autograd works, which PyTorch leaves out of operations that a mode or a compiler calls."""
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


@torch.library.custom_op("segrl::packed_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    batches = decode_layout(tuple(layout.tolist()), query.device)
    with _differentiable():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        output = attend(batches, query, key, value, 0.0, scaling)
        found = torch.autograd.grad(output, (query, key, value), gradient)
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()


@_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, layout, ctx.scaling = inputs
    ctx.save_for_backward(query, key, value, layout)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    query, key, value, layout = ctx.saved_tensors
    return (*_backward(gradient, query, key, value, layout, ctx.scaling), None, None)


packed_attention.register_autograd(_differentiate, setup_context=_keep)
