"""Attention over a packed row, and the hooks that put it into a transformers model.

Every prompt attends to itself once, causally. The completions of a prompt attend, as one batch, to the prompt's keys
and to themselves. The work is P*P/2 + G*T*(P + T/2) instead of G*(P + T)*(P + T)/2 for G separate rows, and no mask
over the whole row is built.

The layout is passed through the model's keyword arguments, not through a global: with activation checkpointing a layer
runs again during backward, and must see the same layout then.
"""

# G completions of a prompt, P prompt tokens, T completion tokens with padding, S without, L packed tokens
# H query heads, K key-value heads, D head width; shapes as "1 H L D"

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from segrl.errors import SegRLError
from segrl.sharing.layout import Group, Layout

__all__ = ["LAYOUT_KEYWORD", "install", "shared_attention"]

LAYOUT_KEYWORD = "shared_prompt"
_NAME = "segrl_shared_prompt"
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias")  # arguments that this attention does not implement


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prompt: Layout | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Compute attention over one packed row; an attention function of transformers.

    Args:
        module: The attention layer.
        query: (1, H, L, D).
        key: (1, K, L, D) with K key-value heads, a divisor of H.
        value: (1, K, L, D).
        attention_mask: Ignored; the layout replaces it.
        dropout: Dropout probability.
        scaling: Factor of the scores; 1 / sqrt(D) by default.
        shared_prompt: The layout.
        **extra: Other arguments of the layer.

    Returns:
        The output (1, L, H, D), and None for the weights.

    Raises:
        SegRLError: The layer uses a feature that is not implemented here (a sliding window, soft capping, sinks).
    """
    if shared_prompt is None or len(query) != 1 or query.size(2) != shared_prompt.tokens:
        raise SegRLError(f"shared-prompt attention got queries of shape {tuple(query.shape)} and {shared_prompt}")
    for name in _REFUSED:
        if extra.get(name) is not None:
            given = "" if isinstance(extra[name], Tensor) else f"={extra[name]}"
            raise SegRLError(f"its attention layers use {name}{given}")
    outputs = []
    for group in shared_prompt.groups:
        middle = group.start + group.prompt
        own_key, own_value = key[:, :, group.start : middle], value[:, :, group.start : middle]
        own_query = query[:, :, group.start : middle]
        settings = {"dropout": dropout, "scale": scaling}
        outputs.append(_sdpa(own_query, own_key, own_value, is_causal=group.prompt > 1, **settings))
        if group.longest:
            outputs.append(_completions(group, query, own_key, own_value, key, value, settings))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


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


class _Switch:
    """Hooks of an attention layer that put this attention into its config while it is called with a layout.

    The layer gets a copy of the config; that of the model never changes, so every other pass is untouched.
    """

    def __init__(self, config: Any) -> None:
        self.own, self.shared = config, copy.copy(config)
        self.shared._attn_implementation_internal = _NAME

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get(LAYOUT_KEYWORD) is not None:
            module.config = self.shared

    def after(self, module: Any, args: Any, output: Any) -> None:
        module.config = self.own


def _unpack(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Turn the backbone's last hidden states (1, L, D) into one row per completion, (B, T+1, D); a hook."""
    layout = kwargs.get(LAYOUT_KEYWORD)
    if layout is None:
        return None
    states = output[0] if isinstance(output, tuple) else output.last_hidden_state
    unpacked = states[0][layout.rows]
    if isinstance(output, tuple):
        return (unpacked, *output[1:])
    output["last_hidden_state"] = unpacked
    return output


def install(backbone: nn.Module, layers: list[Any]) -> None:
    """Make a backbone with these attention layers take the keyword `shared_prompt`. A second call does nothing."""
    if getattr(backbone, "_segrl_shares", False):
        return
    backbone.register_forward_hook(_unpack, with_kwargs=True, prepend=True)  # before a mask head listens
    switches: dict[int, _Switch] = {}
    for layer in layers:
        switch = switches.setdefault(id(layer.config), _Switch(layer.config))
        layer.register_forward_pre_hook(switch.before, with_kwargs=True)
        layer.register_forward_hook(switch.after, always_call=True)
    backbone._segrl_shares = True  # type: ignore[assignment]


ALL_ATTENTION_FUNCTIONS.register(_NAME, shared_attention)
