"""Segmenters by name: `register_segmenter`, and the entry points of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from segrl.registry import Registry

__all__ = ["SEGMENTERS", "register_segmenter"]

Class = TypeVar("Class", bound=type[nn.Module])

SEGMENTERS = Registry("segmenter", "segrl.segmenters", classes=True, preload=("segrl.heads",))


def register_segmenter(name: str) -> Callable[[Class], Class]:
    """Register a class with the members of `segrl.segmenters.Segmenter` under a name.

    `to_config()` returns JSON-ready settings from which `from_config(config, **context)`, or without that method
    `cls(**config)`, builds the same segmenter.

    Raises:
        SegRLError: The name is taken, or it is no class.

    Example:
        >>> from segrl.segmenters import Sam2Segmenter
        >>> SEGMENTERS.get("sam2") is Sam2Segmenter
        True
    """
    return SEGMENTERS.register(name)
