"""Compute a prompt that G completions share once: packed rows for scoring, one prefill for generation."""

from segrl.sharing.compiling import compile_layers
from segrl.sharing.generation import prefill_once
from segrl.sharing.images import images_of, preprocess_once
from segrl.sharing.micro_batches import (
    RowGroup,
    consecutive_parts,
    fill_micro_batches,
    fill_padded,
    prompt_groups,
)
from segrl.sharing.packing import Packed, PromptKey, pack_rows, select_rows
from segrl.sharing.support import enable_sharing
from segrl.sharing.vision import VisionOnce, install_vision

__all__ = [
    "Packed",
    "PromptKey",
    "RowGroup",
    "VisionOnce",
    "compile_layers",
    "consecutive_parts",
    "enable_sharing",
    "fill_micro_batches",
    "fill_padded",
    "images_of",
    "install_vision",
    "pack_rows",
    "prefill_once",
    "preprocess_once",
    "prompt_groups",
    "select_rows",
]
