"""`--load_in_4bit`: the base model in 4 bit (NF4 of bitsandbytes) under LoRA; the mask head stays as it is."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig

from segrl.errors import SegRLError

__all__ = ["check_four_bit", "four_bit_loading"]


def check_four_bit(recipe: Any, preset: str) -> None:
    """Refuse `--load_in_4bit` where nothing could be loaded so.

    Args:
        recipe: The preset.
        preset: Its name.

    Raises:
        SegRLError: bitsandbytes is not installed, the preset trains all weights, or it builds a model of its own.

    Example:
        >>> from types import SimpleNamespace
        >>> check_four_bit(SimpleNamespace(lora=None), "tiny")
        Traceback (most recent call last):
        segrl.errors.SegRLError: --load_in_4bit: preset tiny trains all weights, and those in 4 bit cannot be ...
    """
    if not recipe.lora:
        raise SegRLError(
            f"--load_in_4bit: preset {preset} trains all weights, and those in 4 bit cannot be trained; pass a preset "
            "with LoRA, or drop the flag"
        )
    if "loading" not in inspect.signature(recipe.build).parameters:
        raise SegRLError(
            f"--load_in_4bit: `build` of preset {preset} takes no **loading, which it should give to load_vlm; drop "
            "the flag"
        )
    if find_spec("bitsandbytes") is None:
        raise SegRLError("--load_in_4bit: bitsandbytes is not installed; pip install 'segrl[quantization]'")


def four_bit_loading(config: Any) -> dict[str, Any]:
    """Return the arguments with which `load_vlm` loads a model in 4 bit, on the device of this process.

    Args:
        config: Settings of the trainer, whose `bf16` and `fp16` decide the precision of products.

    Example:
        >>> from types import SimpleNamespace
        >>> settings = four_bit_loading(SimpleNamespace(bf16=True, fp16=False))
        >>> settings["quantization_config"].bnb_4bit_compute_dtype, sorted(settings)
        (torch.bfloat16, ['device_map', 'quantization_config'])
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": PartialState().device}}
