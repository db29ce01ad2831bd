"""Parts of a transformers model, through PEFT: the model itself and its backbone."""

from __future__ import annotations

from typing import Any

__all__ = ["backbone_of", "base_instance"]


def base_instance(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(base: Any) -> Any:
    """The part of a transformers model that makes hidden states: everything but the language-model head."""
    return getattr(base, getattr(base, "base_model_prefix", "") or "model", None)
