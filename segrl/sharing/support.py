"""Decide whether a model can share a prompt: first by its configuration, then by a trial.

In the trial a model scores two short texts both ways. If its states differ, or its layers never call the shared
attention, it is not supported, whatever its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from segrl.errors import SegRLError
from segrl.models.backbone import backbone_of, base_instance, is_sharded
from segrl.sharing.attention import install
from segrl.sharing.layout import build_layout

__all__ = ["COMPARED", "enable_sharing", "no_mask"]

# Classes whose scores of packed rows with images `tests/test_family_matrix.py` compares with those of rows apart.
COMPARED = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "InternVLForConditionalGeneration",
)

_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def enable_sharing(model: Any) -> str | None:
    """Make `model` (any transformers model, also inside PEFT) take packed rows.

    Every pass without a layout stays the same, bit for bit.

    Returns:
        None, or the reason why this model cannot share prompts; then its hooks do nothing.

    Example:
        >>> from segrl.models import tiny_causal_lm
        >>> model, _ = tiny_causal_lm(layers=1)
        >>> enable_sharing(model)  # None
        >>> model.config.layer_types = ["sliding_attention"]
        >>> enable_sharing(model)
        "Qwen2ForCausalLM has layers of the types ['sliding_attention']; only full_attention can be shared"
    """
    base = base_instance(model)
    reason = _structure(model, base)
    if reason is not None:
        return reason
    backbone, layers = backbone_of(base), _attention_layers(base)
    install(backbone, layers)
    if is_sharded(base):
        return None  # there is nothing to try with
    if getattr(base.get_decoder().layers[0], "_segrl_compiled", None) is not None:
        with torch.compiler.set_stance("force_eager"):  # the trial's hooks would be compiled
            return _trial(base, backbone, layers)
    return _trial(base, backbone, layers)


def _attention_layers(base: Any) -> list[Any]:
    layers = getattr(base.get_decoder(), "layers", None) or []
    return [getattr(layer, "self_attn", None) for layer in layers]


def _structure(model: Any, base: Any) -> str | None:
    """Return a reason against sharing that the configuration shows, or None."""
    name = type(base).__name__
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        return f"{type(adapter).__name__} puts virtual tokens before the prompt"
    backbone = backbone_of(base)
    if not isinstance(backbone, nn.Module) or backbone is base or base.config.is_encoder_decoder:
        return f"{name} has no decoder-only backbone"
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{name} has layers of the types {sorted(kinds)}; only full_attention can be shared"
    if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None) is not None:
        return f"{name} has a sliding window of {text.sliding_window} tokens"
    if getattr(text, "output_router_logits", False):
        return f"{name} has output_router_logits=True, and the loss of the router counts every token"
    implementation = text._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        return f"attention implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}"
    layers = _attention_layers(base)
    if not layers or not all(hasattr(getattr(layer, "config", None), "_attn_implementation") for layer in layers):
        return f"{name} has no decoder layers with a self_attn that looks up its attention function"
    return None


@torch.no_grad()
def _trial(base: Any, backbone: Any, layers: list[Any]) -> str | None:
    """Score a prompt of four tokens with two completions both ways; return a reason if they differ, or None."""
    special = {value for key, value in vars(base.config).items() if key.endswith("_token_id")}
    words = [n for n in range(base.config.get_text_config().vocab_size) if n not in special][:12]
    if len(words) < 12:
        return "the vocabulary is too small to try it"
    prompt, completions = words[:4], [words[4:9], words[9:]]
    device = next(base.parameters()).device
    called: list[Any] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: called.append(module.config)) for layer in layers
    ]
    training = backbone.training
    backbone.eval()
    try:
        apart = [
            backbone(input_ids=torch.tensor([prompt + own], device=device), use_cache=False).last_hidden_state[0, 3:]
            for own in completions
        ]
        called.clear()
        layout = build_layout([[0, 1]], [4, 4], [5, 3], 5, device)
        positions = torch.tensor([[*range(4), *range(4, 9), *range(4, 7)]], device=device)
        together = backbone(
            input_ids=torch.tensor([words], device=device),
            attention_mask=no_mask(device),
            position_ids=positions,
            use_cache=False,
            shared_prompt=layout,
        ).last_hidden_state
    except SegRLError as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        return f"a packed row did not go through {type(base).__name__}: {type(error).__name__}: {error}"
    finally:
        backbone.train(training)
        for handle in handles:
            handle.remove()
    if len(called) != len(layers):
        return f"{type(base).__name__} called {len(called)} of {len(layers)} attention layers"
    tolerance = 1e-3 if apart[0].dtype in (torch.float32, torch.float64) else 0.1
    for row, states in enumerate(apart):
        found = together[row, : len(states)].to(states.device)
        scale = states.abs().max().clamp(min=1e-6)
        error = ((found - states).abs().max() / scale).item()
        if not error < tolerance:
            return f"states of {type(base).__name__} differ by {error:.2g} between a packed row and rows of their own"
    return None


def no_mask(device: torch.device | str) -> torch.Tensor:
    """Return a mask with four dimensions, which transformers passes on unchanged instead of building its own."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
