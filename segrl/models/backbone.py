"""The transformers model inside a PEFT model, and its backbone."""

from __future__ import annotations

from typing import Any

__all__ = ["backbone_of", "base_instance", "is_sharded"]


def base_instance(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from segrl.models import tiny_causal_lm
        >>> model, _ = tiny_causal_lm(layers=1)
        >>> base_instance(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model
        True
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(base: Any) -> Any:
    """Return the part of a transformers model that computes hidden states: all but the language-model head.

    Example:
        >>> from segrl.models import tiny_causal_lm
        >>> model, _ = tiny_causal_lm(layers=1)
        >>> backbone_of(model) is model.model
        True
    """
    return getattr(base, getattr(base, "base_model_prefix", "") or "model", None)


def is_sharded(model: Any) -> bool:
    """Return whether an engine keeps weights of a model elsewhere: on other processes, or nowhere yet.

    Example:
        >>> from segrl.models import tiny_causal_lm
        >>> is_sharded(tiny_causal_lm(layers=1)[0])
        False
    """
    return any(hasattr(p, "ds_id") or p.is_meta or not p.numel() for p in model.parameters())
