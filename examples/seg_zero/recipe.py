"""Seg-Zero (arXiv:2503.06520): its presets and its run.

| preset        | hardware       | time        | held-out mDice                                              |
|---------------|----------------|-------------|-------------------------------------------------------------|
| `tiny`        | 1 CPU core     | not timed   | not measured yet                                            |
| `core_seg_3b` | 2 A6000, 48 GB | not run     | CORE-Seg: 17.47 on ComLesion-14K, on this backbone; not run |

A chat model writes boxes and points as JSON, trained by GRPO alone; a frozen SAM 2 turns them into masks. Data, flags
and what is built are those of `segrl.scripts.CascadeRun`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from datasets import Dataset

from segrl.models import load_vlm
from segrl.predictions import ImagePromptSettings
from segrl.scripts import (
    ON_A_CPU,
    TINY_IMAGES,
    TINY_ON_DATA,
    TINY_SFT,
    CascadeRun,
    ImageRecipe,
    build_tiny_reader,
    sam2_builder,
)
from segrl.segmenters import sam2_config

PHRASES = ['[{"bbox_2d": [12, 34, 56, 78], "point_2d": [23, 45]}, {"bbox_2d": [', "[]"] * 20


def build_3b(train: Dataset, path: str | None, **loading: Any) -> tuple[Any, Any]:
    """Qwen2.5-VL-3B, from a path or the hub."""
    return load_vlm(path or "Qwen/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16, **loading)


# GRPO as published; both peers of this loss average within an answer, then over answers.
AS_PUBLISHED = {"loss_type": "grpo", "use_bias_correction_kl": False, "importance_sampling_level": "token"}
# A chat model knows how to answer before GRPO; the tiny one learns it in a stage 1 of text alone.
TEXT_SFT = {**TINY_SFT, "learning_rate": 3e-3, "max_steps": 400}

RECIPES = {
    "tiny": ImageRecipe(
        **TINY_IMAGES | {"build": partial(build_tiny_reader, phrases=PHRASES), "max_boxes": 3},
        prompt=ImagePromptSettings(
            instruction="", frame_kind="resized_px", seg_token="", answer_form="json", max_new_tokens=160
        ),
        sft=TEXT_SFT,
        grpo={
            **ON_A_CPU,
            **AS_PUBLISHED,
            "per_device_train_batch_size": 64,
            "num_generations": 8,
            "max_completion_length": 160,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 5,
            "max_steps": 100,
            "logging_steps": 5,
            "beta": 5e-3,
            "temperature": 0.7,
        },
        rewards=("seg_zero",),
        on_data=TINY_ON_DATA,
    ),
    # formulas E, from Seg-Zero's script for the 7B model: n = 8, learning rate 1e-6, KL 5e-3, all weights trained.
    # Images are stretched to 840 x 840 there; here the longest edge is 840 px, and the rewards measure pixels at 840.
    "core_seg_3b": ImageRecipe(
        build=build_3b,
        segmenter=sam2_builder(sam2_config("sam2.1_hiera_tiny", image_size=512), "wanglab/MedSAM2:MedSAM2_latest.pt"),
        prompt=ImagePromptSettings(max_edge=840, seg_token="", answer_form="json", max_new_tokens=512),
        sft=None,
        grpo={
            **AS_PUBLISHED,
            "num_train_epochs": 1,
            "global_batch_size": 16,  # of verl's script: silent for 3B
            "batch_unit": "prompts",
            "per_device_train_batch_size": 8,
            "num_generations": 8,
            "max_completion_length": 512,
            "learning_rate": 1e-6,
            "beta": 5e-3,
            "bf16": True,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "save_steps": 100,
        },
        rewards=("seg_zero",),
        synthetic={"train": 3000, "test": 160, "size": 112},
    ),
}


class SegZeroRun(CascadeRun):
    """A language model that writes boxes and points, and a frozen SAM 2 that they prompt."""

    name = "seg_zero"
    recipes = RECIPES
