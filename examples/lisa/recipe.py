"""LISA (arXiv:2308.00692): its presets and its run.

| preset        | hardware       | time        | held-out mDice                                              |
|---------------|----------------|-------------|-------------------------------------------------------------|
| `tiny`        | 1 CPU core     | 6 minutes   | 79 on its synthetic data, one seed (docs/log.md)            |
| `core_seg_3b` | 2 A6000, 48 GB | not run     | CORE-Seg: 22.17 on ComLesion-14K, on this backbone; not run |

The model answers "It is <seg>." without reasoning, and two linear layers take the state of the token to the mask
decoder: supervised fine-tuning alone, on text, cross-entropy and Dice of the masks. Data, flags and what is built are
those of `segrl.scripts.HeadRun`.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from segrl.models import load_vlm
from segrl.predictions import ImagePromptSettings
from segrl.scripts import (
    TINY_IMAGES,
    TINY_ON_DATA,
    TINY_QUICK,
    TINY_SFT,
    HeadRun,
    ImageRecipe,
    sam2_builder,
)
from segrl.segmenters import sam2_config


def build_3b(train: Dataset, path: str | None, **loading: Any) -> tuple[Any, Any]:
    """Qwen2.5-VL-3B, from a path or the hub."""
    return load_vlm(path or "Qwen/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16, **loading)


ANSWER: dict[str, Any] = {"reasoning": False, "answer_form": "mask", "answer_tags": False, "instruction": ""}
DENSE = {"cross_entropy": 2.0, "dice": 0.5}  # beside 1.0 for the text (formulas E)

# masks are all that it learns from, so stage 1 sees all images
EVERY_MASK: dict[str, Any] = TINY_IMAGES | {"synthetic": {**TINY_IMAGES["synthetic"], "sft": 2000}}

RECIPES = {
    "tiny": ImageRecipe(
        **EVERY_MASK,
        prompt=ImagePromptSettings(**ANSWER, frame_kind="resized_px", max_new_tokens=16),
        adapter=("mlp", {}),
        dense=DENSE,
        # nothing but the mask says which lesion is meant, so there is no text to learn first
        sft={**TINY_SFT, "max_steps": 400},
        grpo=None,
        quick={**TINY_QUICK, "text_warmup": None},
        on_data={**TINY_ON_DATA, "sft": {**TINY_SFT, "max_steps": 700}},
    ),
    # formulas E, from LISA's train_ds.py: 10 times 500 steps of 2 x 10 rows per device
    "core_seg_3b": ImageRecipe(
        build=build_3b,
        segmenter=sam2_builder(sam2_config("sam2.1_hiera_tiny", image_size=512), "wanglab/MedSAM2:MedSAM2_latest.pt"),
        prompt=ImagePromptSettings(**ANSWER, max_edge=512, max_new_tokens=32),
        adapter=("mlp", {}),
        dense=DENSE,
        sft={
            "max_steps": 5000,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 10,
            "learning_rate": 3e-4,
            "adam_beta2": 0.95,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "linear",
            "warmup_steps": 100,
            "bf16": True,
            "gradient_checkpointing": True,
            "max_length": None,
            "logging_steps": 10,
            "save_steps": 500,
        },
        grpo=None,
        lora={"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "layers": ["q_proj", "v_proj"]},
        synthetic={"train": 3000, "test": 160, "size": 112},
    ),
}


class LisaRun(HeadRun):
    """A language model whose `<seg>` prompts SAM 2, trained by supervision alone."""

    name = "lisa"
    recipes = RECIPES
