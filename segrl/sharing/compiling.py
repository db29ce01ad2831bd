"""Compile the decoder layers of a model, one by one and never the model: `compile_layers`.

A layer gets a class of its own, a child of its class with the same name whose `forward` is compiled. Hooks, checkpoints
and sharding stay around it, where they are. A pass with a key-value cache, which grows by a token each time, runs as
ever. With `dynamic=True` the lengths are symbols; the layout of shared prompts is a tensor that no guard reads.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn

from segrl.models.backbone import backbone_of, base_instance, is_sharded
from segrl.sharing.attention import LAYOUT_KEYWORD
from segrl.sharing.layout import Layout
from segrl.sharing.packed_op import encode_layout

__all__ = ["compile_layers"]

_CACHES = ("cache", "past_key_values")  # the name of the key-value cache since transformers 5.24, and before
_TOLERANCE = 1e-3


def compile_layers(model: Any, backend: str = "inductor") -> str | None:
    """Compile the decoder layers of `model` (any transformers model, also inside PEFT), after trying it.

    Args:
        model: The model.
        backend: A backend of `torch.compile`.

    Returns:
        None, or the reason why its layers cannot be compiled; then nothing is changed.

    Example:
        >>> from segrl.models import tiny_causal_lm
        >>> model, _ = tiny_causal_lm(layers=1)
        >>> model.config.layer_types = ["linear_attention"]
        >>> compile_layers(model)
        "Qwen2ForCausalLM has layers of the types ['linear_attention']; only full_attention can be compiled"
    """
    base = base_instance(model)
    name, text = type(base).__name__, base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{name} has layers of the types {sorted(kinds)}; only full_attention can be compiled"
    if getattr(text, "attention_dropout", 0.0):
        return f"attention_dropout={text.attention_dropout} draws other numbers in the second attention of the backward"
    layers = list(getattr(base.get_decoder(), "layers", None) or [])
    if not layers or len({type(layer) for layer in layers}) > 1:
        return f"{name} has no list of decoder layers of one class"
    if is_sharded(base):
        return "the weights are sharded over processes"
    if getattr(layers[0], "_segrl_compiled", None) == backend:
        return None
    kind, compiled = type(layers[0]), _compiled_class(type(layers[0]), backend)
    states = _states(base)
    # Names of hooks differ between layers, and each would be compiled for itself: the new class calls them.
    switches = {layer: switch for layer in layers if (switch := _switch_of(layer)) is not None}
    for layer in layers:
        layer.__class__ = compiled
    for switch in switches.values():
        switch.detach()
    try:
        found = _states(base)
        reason = None
        for one, other in zip(found, states, strict=True):
            error = ((one - other).abs().max() / other.abs().max().clamp(min=1e-6)).item()
            if not error < (_TOLERANCE if other.dtype == torch.float32 else 0.1):
                reason = f"states of {name} differ by {error:.2g} when its layers are compiled"
    except Exception as error:  # a compiler and its backends raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if reason is not None:
        for layer in layers:
            layer.__class__ = kind
        for layer, switch in switches.items():
            switch.attach(layer.self_attn)
    return reason


def _switch_of(layer: Any) -> Any:
    return getattr(getattr(layer, "self_attn", None), "_segrl_switch", None)


@cache
def _compiled_class(kind: type[nn.Module], backend: str) -> type[nn.Module]:
    """The class of a compiled layer: one function for all layers, so that a graph serves all of them."""
    plain: Any = inspect.unwrap(kind.forward)  # without the checkpoint, which the new class gets again
    # gradients or none, shared prompts or none, one row or several, adapters on or off: more than torch allows for
    limit: dict[str, Any] = {"recompile_limit": 64}
    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    compiled = torch.compile(plain, dynamic=True, backend=backend, **(limit if known else {}))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in _CACHES):
            return plain(self, *args, **kwargs)
        layout, switch = kwargs.get(LAYOUT_KEYWORD), _switch_of(self)
        if not isinstance(layout, Layout) or switch is None:
            return compiled(self, *args, **kwargs)
        switch.before(self.self_attn, (), kwargs)
        try:
            return compiled(self, *args, **{**kwargs, LAYOUT_KEYWORD: encode_layout(layout)})
        finally:
            switch.after(self.self_attn, (), None)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "_segrl_compiled": backend})


@torch.no_grad()
def _states(base: Any) -> list[torch.Tensor]:
    """Last states of two short texts of different lengths."""
    backbone, device = backbone_of(base), next(base.parameters()).device
    training = backbone.training
    backbone.eval()
    try:
        words = [torch.arange(1, length + 1, device=device).unsqueeze(0) for length in (5, 9)]
        return [backbone(input_ids=ids, use_cache=False).last_hidden_state for ids in words]
    finally:
        backbone.train(training)
