"""CORE-Seg: its presets and its run.

| preset         | hardware       | time                          | held-out mDice                                     |
|----------------|----------------|-------------------------------|----------------------------------------------------|
| `tiny`         | 1 CPU core     | 10 minutes (docs/log.md)      | 78 on its synthetic data (docs/log.md)             |
| `core_seg_3b`  | 2 A6000, 48 GB | not run by us                 | published: 37.06 on ComLesion-14K; not run by us   |

Data, flags and what is built are those of `segrl.scripts.HeadRun`, a run on images with a mask head.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from segrl.models import load_vlm
from segrl.predictions import ImagePromptSettings
from segrl.scripts import (
    ON_A_CPU,
    TINY_IMAGES,
    TINY_ON_DATA,
    TINY_QUICK,
    TINY_SFT,
    TINY_TEXT,
    HeadRun,
    ImageRecipe,
    sam2_builder,
)
from segrl.segmenters import sam2_config


def build_3b(train: Dataset, path: str | None, **loading: Any) -> tuple[Any, Any]:
    """Qwen2.5-VL-3B, from a path or the hub."""
    return load_vlm(path or "Qwen/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16, **loading)


# GRPO as published (formulas C): mean over the tokens of an answer, then over answers; KL without bias correction; a
# ratio for each token. TRL's own defaults for the first two differ.
AS_PUBLISHED = {"loss_type": "grpo", "use_bias_correction_kl": False, "importance_sampling_level": "token"}
REWARDS = ("format", "box_f1", "dual_granularity_mask")

RECIPES = {
    "tiny": ImageRecipe(
        **TINY_IMAGES,
        prompt=ImagePromptSettings(instruction="", frame_kind="resized_px", max_new_tokens=128),
        sft=TINY_SFT,
        grpo={
            **ON_A_CPU,
            **AS_PUBLISHED,
            "per_device_train_batch_size": 64,
            "num_generations": 4,
            "max_completion_length": 128,
            "learning_rate": 2e-4,
            "head_learning_rate": 3e-4,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 5,
            "max_steps": 100,
            "logging_steps": 5,
            "beta": 0.01,
            "temperature": 1.0,
            "feature_cache_memory": 2**31,
        },
        rewards=REWARDS,
        adapter=("semantic_guided", {"standardise": True}),
        text_warmup=TINY_TEXT,
        quick=TINY_QUICK,
        # A few hundred images do not teach boxes, so masks do not wait for words: a head that finds the lesion by
        # itself survives wrong boxes.
        on_data={**TINY_ON_DATA, "sft": {**TINY_SFT, "max_steps": 700}, "text_warmup": None},
    ),
    "core_seg_3b": ImageRecipe(
        build=build_3b,
        segmenter=sam2_builder(sam2_config("sam2.1_hiera_tiny", image_size=512), "wanglab/MedSAM2:MedSAM2_latest.pt"),
        prompt=ImagePromptSettings(max_edge=512, max_new_tokens=512),
        # formulas A3: 1 epoch, batch 32, learning rate 1e-4; on 2 GPUs there, here on any number that divides it
        sft={
            "num_train_epochs": 1,
            "global_batch_size": 32,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-4,
            "bf16": True,
            "gradient_checkpointing": True,
            "max_length": None,
            "logging_steps": 10,
            "save_steps": 100,
        },
        # formulas A4: 2 epochs, batch 16, G = 4, learning rate 5e-6; beta is not published, 0.04 is DeepSeekMath's
        grpo={
            **AS_PUBLISHED,
            "num_train_epochs": 2,
            "global_batch_size": 16,
            "batch_unit": "prompts",  # 64 completions; the paper does not say which of the two it counts
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 512,
            "learning_rate": 5e-6,
            "beta": 0.04,
            "bf16": True,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "save_steps": 100,
        },
        rewards=REWARDS,
        lora={"r": 64, "lora_alpha": 128, "lora_dropout": 0.05},
        synthetic={"train": 3000, "test": 160, "size": 112},
    ),
}


class CoreSegRun(HeadRun):
    """A language model whose `<seg>` prompts SAM 2, trained with DiceCE on its masks in both stages."""

    name = "core_seg"
    recipes = RECIPES
