"""Presets of the CORE-Seg example: what is built, and with which settings it is trained.

| preset         | hardware       | time                          | held-out mDice                                     |
|----------------|----------------|-------------------------------|----------------------------------------------------|
| `tiny`         | 1 CPU core     | 7 minutes (docs/log.md)       | 85 to 93 on its synthetic data (docs/log.md)       |
| `core_seg_3b`  | 2 GPUs, 80 GB  | not run by us                 | published: 37.06 on ComLesion-14K; not run by us   |

A preset only holds numbers and builders; every trainer setting in it is a default that a command-line flag overrides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from segrl.data import augment, prepare
from segrl.heads import MaskHead, attach_mask_head
from segrl.models import ensure_seg_token, load_vlm
from segrl.scripts import find_preset
from segrl.segmenters import Sam2Config, Sam2Segmenter
from segrl.segmenters.sam2 import sam2_config


@dataclass(frozen=True)
class Recipe:
    """One preset.

    Attributes:
        build: `build(train_rows, model_path, segmenter_path) -> (model with head, processor)` for stage 1.
        prompt: settings of `segrl.data.prepare`, saved with the model so that inference asks the same way.
        sft, grpo: trainer settings of the two stages.
        rewards: registered names.
        lora: settings of `peft.LoraConfig` for the language model; None trains it whole.
        text_warmup: trainer settings that differ in a first, text-only part of stage 1; None has no such part. It
            stands in for pretraining: a random language model learns masks only after it has learned words, and by
            then the decoder has learned to ignore its prompts.
        augment_to: fill a small training set up to about this many rows with augmented copies (at most 7 of each row,
            scaled to `prompt["max_edge"]`); 0 adds none. Rows with a reasoning of their own are left as they are.
        freeze_encoder: image encoder of the segmenter in stage 1 and stage 2.
        max_new_tokens: of evaluation and inference.
    """

    build: Callable[..., tuple[Any, Any]]
    prompt: dict[str, Any]
    sft: dict[str, Any]
    grpo: dict[str, Any]
    rewards: Sequence[str] = ("format", "box_f1", "dual_granularity_mask")
    lora: dict[str, Any] | None = None
    freeze_encoder: tuple[bool, bool] = (True, True)
    max_new_tokens: int = 512
    brief: bool = False
    max_boxes: int | None = None
    text_warmup: dict[str, Any] | None = None
    augment_to: int = 0
    synthetic: dict[str, int] = field(default_factory=lambda: {"train": 3000, "test": 160, "size": 112})


def rows_for(dataset: Dataset, processor: Any, recipe: Recipe, *, completions: bool, reasoning: bool = True) -> Dataset:
    """The data set with the prompts (and answers) of this recipe."""
    copies = min(7, recipe.augment_to // len(dataset) - 1)
    if copies > 0 and not any("reasoning" in name for name in dataset.column_names):
        dataset = augment(dataset, copies, max_edge=recipe.prompt["max_edge"])
    settings = {key: value for key, value in recipe.prompt.items() if key in ("max_edge", "instruction", "frame_kind")}
    return prepare(
        dataset,
        processor,
        completions=completions,
        reasoning=reasoning,
        brief=recipe.brief,
        max_boxes=recipe.max_boxes,
        **settings,
    )


def _build_tiny(train: Dataset, model_path: str | None, segmenter_path: str | None) -> tuple[Any, Any]:
    """About 1.7 M parameters of Qwen2.5-VL and 2.3 M of SAM 2, random; the tokenizer learns the training texts."""
    from segrl.models import tiny_qwen2_5_vl

    sample = train.select(range(min(400, len(train)))).remove_columns("image")
    corpus = [str(dict(row)[column]) for row in sample for column in ("query", "lesion", "anatomy", "modality")]
    model, processor = load_vlm(model_path) if model_path else tiny_qwen2_5_vl(corpus=corpus)
    if segmenter_path:
        segmenter = Sam2Segmenter.from_pretrained(segmenter_path, _TINY_SAM2)
    else:
        segmenter = Sam2Segmenter(_TINY_SAM2)
    head = MaskHead.build(
        model, segmenter, token_id=ensure_seg_token(model, processor), freeze_encoder=False, standardise=True
    )
    return attach_mask_head(model, head), processor


_TINY_SAM2 = Sam2Config(
    image_size=128,
    embed_dim=32,
    stages=(1, 2, 2, 1),
    global_att_blocks=(4,),
    window_spec=(8, 4, 8, 4),
    pos_embed_size=(4, 4),
    hidden_dim=64,
    memory_dim=16,
    memory_layers=1,
    memory_feedforward=128,
)


def _build_3b(train: Dataset, model_path: str | None, segmenter_path: str | None) -> tuple[Any, Any]:
    """Qwen2.5-VL-3B and MedSAM2 (SAM 2.1 hiera-tiny at 512 px), from a path or the hub."""
    import torch

    model, processor = load_vlm(model_path or "Qwen/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16)
    segmenter = Sam2Segmenter.from_pretrained(
        segmenter_path or "wanglab/MedSAM2:MedSAM2_latest.pt", sam2_config("sam2.1_hiera_tiny", image_size=512)
    )
    head = MaskHead.build(model, segmenter, token_id=ensure_seg_token(model, processor), freeze_encoder=True)
    return attach_mask_head(model, head), processor


RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        build=_build_tiny,
        prompt={"instruction": "", "max_edge": 160},
        sft={
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "max_steps": 650,
            "logging_steps": 20,
            "save_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": None,
            "report_to": "none",
        },
        grpo={
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 112,
            "learning_rate": 1e-4,
            "head_learning_rate": 3e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            "max_steps": 80,
            "logging_steps": 5,
            "save_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "beta": 0.0,
            "temperature": 0.7,
            "report_to": "none",
        },
        freeze_encoder=(False, True),
        max_new_tokens=112,
        brief=True,
        max_boxes=4,
        text_warmup={"learning_rate": 2e-3, "lr_scheduler_type": "constant_with_warmup", "max_steps": 150},
        augment_to=3200,
    ),
    "core_seg_3b": Recipe(
        build=_build_3b,
        prompt={"instruction": None, "max_edge": 512},
        # formulas A3: 1 epoch, batch 32 over 2 GPUs, learning rate 1e-4
        sft={
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-4,
            "bf16": True,
            "gradient_checkpointing": True,
            "max_length": None,
            "logging_steps": 10,
            "save_steps": 100,
        },
        # formulas A4: 2 epochs, batch 16, G = 4, learning rate 5e-6; beta is not published, 0.04 is DeepSeekMath's
        grpo={
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "num_generations": 4,
            "max_completion_length": 512,
            "learning_rate": 5e-6,
            "beta": 0.04,
            "bf16": True,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "save_steps": 100,
        },
        lora={"r": 64, "lora_alpha": 128, "lora_dropout": 0.05},
    ),
}


def find_recipe(name: str) -> Recipe:
    """The preset of this name; an unknown one is an error that suggests the closest."""
    return find_preset(name, RECIPES)
