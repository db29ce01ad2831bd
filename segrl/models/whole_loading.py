"""Load whole models in one process while a trainer in it runs on an engine that shards them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed

__all__ = ["whole_loading"]


@contextmanager
def whole_loading() -> Iterator[None]:
    """Inside the context a process loads models by itself, also while a trainer in it runs on ZeRO-3.

    transformers would share the weights of every model among all processes, as long as the settings of that trainer
    live, and wait for the others.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed._hf_deepspeed_config_weak_ref()  # type: ignore[misc]
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
