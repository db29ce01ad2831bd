"""Attention over a packed row, and the hooks that put it into a transformers model.

The layout is passed through the model's keyword arguments, not through a global: with activation checkpointing a layer
runs again during backward, and must see the same layout then.
"""

# G completions of a prompt, P prompt tokens, T completion tokens with padding, S without, L packed tokens
# H query heads, K key-value heads, D head width; shapes as "1 H L D"

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from segrl.errors import SegRLError
from segrl.sharing.group_attention import attend
from segrl.sharing.layout import Layout
from segrl.sharing.packed_op import packed_attention

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
    shared_prompt: Layout | Tensor | None = None,
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
        shared_prompt: The layout; in compiled layers as a tensor (`segrl.sharing.packed_op`).
        **extra: Other arguments of the layer.

    Returns:
        The output (1, L, H, D), and None for the weights.

    Raises:
        SegRLError: The layer uses a feature that is not implemented here (a sliding window, soft capping, sinks).
    """
    known = isinstance(shared_prompt, Tensor) or (shared_prompt is not None and query.size(2) == shared_prompt.tokens)
    if shared_prompt is None or len(query) != 1 or not known:
        raise SegRLError(f"shared-prompt attention got queries of shape {tuple(query.shape)} and {shared_prompt}")
    for name in _REFUSED:
        if extra.get(name) is not None:
            given = "" if isinstance(extra[name], Tensor) else f"={extra[name]}"
            raise SegRLError(f"its attention layers use {name}{given}")
    if isinstance(shared_prompt, Tensor):
        scaling = query.size(-1) ** -0.5 if scaling is None else scaling
        return packed_attention(query, key, value, shared_prompt, scaling), None
    return attend(shared_prompt.batches, query, key, value, dropout, scaling), None


class _Switch:
    """Hooks of an attention layer that put this attention into its config while it is called with a layout.

    The layer gets a copy of the config; that of the model never changes, so every other pass is untouched.
    """

    def __init__(self, config: Any) -> None:
        self.own, self.shared = config, copy.copy(config)
        self.shared._attn_implementation_internal = _NAME
        self.handles: list[Any] = []

    def attach(self, layer: nn.Module) -> None:
        """Listen to an attention layer."""
        layer._segrl_switch = self  # type: ignore[assignment]
        self.handles = [
            layer.register_forward_pre_hook(self.before, with_kwargs=True),
            layer.register_forward_hook(self.after, always_call=True),
        ]

    def detach(self) -> None:
        """Stop listening; who calls the layer then calls `before` and `after`."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

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
    shared: dict[int, Any] = {}
    for layer in layers:
        switch = _Switch(layer.config)
        switch.shared = shared.setdefault(id(layer.config), switch.shared)
        switch.attach(layer)
    backbone._segrl_shares = True  # type: ignore[assignment]


ALL_ATTENTION_FUNCTIONS.register(_NAME, shared_attention)
