"""Parts that the tiny presets of the examples on images share: sizes, settings, and what stands in for pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from segrl.models.loading import load_vlm
from segrl.models.tiny import tiny_qwen3_vl
from segrl.scripts.recipe import sam2_builder
from segrl.segmenters.sam2 import sam2_config

__all__ = ["ON_A_CPU", "TINY_IMAGES", "TINY_ON_DATA", "TINY_QUICK", "TINY_SFT", "TINY_TEXT", "build_tiny_reader"]

SIDE = 96  # of an image as the tiny model sees it, pixels: every coordinate has two digits

ON_A_CPU = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
TINY_SFT = {
    **ON_A_CPU,
    "per_device_train_batch_size": 16,
    "learning_rate": 1.5e-3,
    "head_learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "max_steps": 150,
    "logging_steps": 20,
    "max_length": None,
    "feature_cache_memory": 2**31,
}
TINY_TEXT = {"learning_rate": 3e-3, "lr_scheduler_type": "constant_with_warmup", "max_steps": 500}  # before masks


def build_tiny_reader(train: Dataset, path: str | None, *, phrases: Sequence[str] = ()) -> tuple[Any, Any]:
    """Build about 1.1 M parameters of Qwen3-VL, random; the tokenizer learns the training texts.

    Args:
        train: The training rows.
        path: A model to load in its place, such as `--model`; None builds it.
        phrases: More texts that the tokenizer learns, such as the form of answers.

    Returns:
        Model and processor.

    Example:
        >>> from segrl.data import make_synthetic
        >>> model, processor = build_tiny_reader(make_synthetic(4, size=96), None)
        >>> model.config.model_type, processor.tokenizer.tokenize("cyst 2142")[-4:]
        ('qwen3_vl', ['2', '1', '4', '2'])
    """
    if path:
        return load_vlm(path)
    sample = train.select(range(min(400, len(train)))).remove_columns("image")
    corpus = [str(dict(row)[column]) for row in sample for column in ("query", "lesion", "anatomy", "modality")]
    lists = [f"{lesion} 0123 4567, {lesion} none." for lesion in sorted(set(sample["lesion"]))]
    return tiny_qwen3_vl(
        corpus=[*corpus, *lists, *phrases],
        hidden_size=128,
        layers=3,
        vision_hidden_size=64,
        vision_layers=3,
        patch_size=8,
        merge_size=2,
        rope_theta=1e4,
        position_std=0.5,
        min_pixels=SIDE**2,
        max_pixels=SIDE**2,
    )


# just enough for answers with a mask, which is rough
TINY_QUICK: dict[str, Any] = {
    "pretraining": {
        "scenes": 64,
        "vision": {"steps": 3},
        "captions": {"steps": 3},
        "segmenter": {"encoder_steps": 30, "decoder_steps": 30, "decoder_batch_size": 10, "unprompted": 0.5},
    },
    "text_warmup": {**TINY_TEXT, "max_steps": 100},
    "sft": {**TINY_SFT, "max_steps": 20},
    "fill_to": 0,
}

# fields of an `ImageRecipe`
TINY_IMAGES: dict[str, Any] = {
    "build": build_tiny_reader,
    "segmenter": sam2_builder(sam2_config("tiny", image_size=192)),  # masks of 48 x 48
    "brief": True,
    "max_boxes": 4,
    "demonstration": True,
    "pretraining": {
        "scenes": 3000,
        "vision": {"steps": 350},
        "captions": {"steps": 400},
        "segmenter": {"encoder_steps": 100, "decoder_steps": 250, "decoder_batch_size": 10},
    },
    "fill_to": 3200,
    # reasoning is written for a fifth of the images, masks are there for all: stage 2 learns from what stage 1 cannot
    "synthetic": {"train": 2000, "sft": 400, "test": 240, "size": SIDE},
}
# A few hundred real images, each with lesions of one kind: more views of them, and longer; no names to learn.
TINY_ON_DATA: dict[str, Any] = {
    "pretraining": {
        "vision": {"steps": 400},
        "captions": {"steps": 100},
        "segmenter": {"encoder_steps": 1500, "decoder_steps": 400, "decoder_batch_size": 12, "unprompted": 0.5},
    },
    "fill_to": 4200,
    "noun": "lesion",
}
