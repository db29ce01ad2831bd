"""Small real models and data that several test files build."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from segrl.data import make_synthetic, prepare
from segrl.heads import MaskHead, attach_mask_head
from segrl.models import seg_token_id, tiny_llava, tiny_qwen2_5_vl, tiny_qwen3_vl
from segrl.predictions import ImagePromptSettings, Prediction
from segrl.segmenters import Sam2Config, Sam2Segmenter
from segrl.trainers import SegGRPOConfig, SegSFTConfig

FAMILIES: dict[str, Any] = {"qwen2_5_vl": tiny_qwen2_5_vl, "qwen3_vl": tiny_qwen3_vl, "llava": tiny_llava}


def tiny_sam2_config(**changes: Any) -> Sam2Config:
    """SAM 2 with the published structure, about 0.1 M parameters: 64 px in, masks of 16 px, prompts 32 wide."""
    settings: dict[str, Any] = {
        "image_size": 64,
        "embed_dim": 16,
        "stages": (1, 1, 2, 1),
        "global_att_blocks": (3,),
        "window_spec": (8, 4, 4, 2),
        "pos_embed_size": (4, 4),
        "hidden_dim": 32,
        "memory_dim": 16,
        "memory_layers": 1,
        "memory_feedforward": 32,
    }
    return Sam2Config(**{**settings, **changes})


def tiny_segmenter(seed: int = 0, **changes: Any) -> Sam2Segmenter:
    """A `Sam2Segmenter` of `tiny_sam2_config`, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Sam2Segmenter(tiny_sam2_config(**changes))


def tiny_model(family: str = "qwen2_5_vl", **settings: Any) -> tuple[Any, Any]:
    """A vision-language model of a family, smaller than the defaults of `segrl.testing`, and its processor."""
    small = {"hidden_size": 64, "vision_hidden_size": 32, "vision_layers": 2, "vision_heads": 2, "vocab_size": 640}
    return FAMILIES[family](**{**small, **settings})


def add_head(
    model: Any,
    processor: Any,
    *,
    freeze_encoder: bool = True,
    adapter: str = "semantic_guided",
    probe: str = "seg_token",
    seed: int = 0,
    **adapter_settings: Any,
) -> Any:
    """`model` with a new head on `tiny_segmenter`, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MaskHead.build(
            model,
            tiny_segmenter(seed),
            token_id=seg_token_id(processor),
            adapter=adapter,
            probe=probe,
            tokenizer=processor.tokenizer,
            freeze_encoder=freeze_encoder,
            **adapter_settings,
        )
    return attach_mask_head(model, head)


def tiny_headed_model(
    family: str = "qwen2_5_vl",
    *,
    freeze_encoder: bool = True,
    adapter: str = "semantic_guided",
    probe: str = "seg_token",
    **settings: Any,
) -> tuple[Any, Any]:
    """A `tiny_model` with a mask head, and its processor; `settings` go to the model."""
    model, processor = tiny_model(family, **settings)
    return add_head(model, processor, freeze_encoder=freeze_encoder, adapter=adapter, probe=probe), processor


def tiny_rows(n: int, processor: Any, completions: bool = True, *, size: int = 64, seed: int = 0) -> Any:
    """Synthetic rows with prompts, and with answers for SFT."""
    return prepare(
        make_synthetic(n, size=size, seed=seed),
        processor,
        ImagePromptSettings(instruction="Answer."),
        completions=completions,
        brief=True,
    )


def with_answers(rows: Any, texts: Sequence[str]) -> Any:
    """`rows` with other assistant texts, repeated as needed, for example some without a `<seg>`."""
    completions = [[{"role": "assistant", "content": texts[n % len(texts)]}] for n in range(len(rows))]
    return rows.remove_columns("completion").add_column("completion", completions)


def _training(**settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    given = {**defaults, **settings}
    if "activation_checkpointing" not in {
        item.name for item in fields(TrainingArguments)
    }:  # transformers before 5.23 may have the old name
        given["gradient_checkpointing"] = given.pop("activation_checkpointing")
    return given


def grpo_args(folder: Any, kind: Any = SegGRPOConfig, **settings: Any) -> Any:
    """Settings for a short GRPO run on the CPU: 2 steps, 4 samples a prompt, 12 new tokens."""
    short = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
    }
    return kind(str(folder), **_training(**{**short, **settings}))


def sft_args(folder: Any, kind: Any = SegSFTConfig, **settings: Any) -> Any:
    """Settings for a short SFT run on the CPU: 2 steps of 4 rows."""
    return kind(str(folder), **_training(**{"max_steps": 2, "per_device_train_batch_size": 4, **settings}))


def seg_bias(processor: Any, bias: float = 5.0) -> dict[str, Any]:
    """`generation_kwargs`: a random model writes `<seg>` now and then, ends now and then, and writes no placeholder."""
    tokenizer = getattr(processor, "tokenizer", processor)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return {
        "sequence_bias": [[[seg_token_id(processor)], bias], [[tokenizer.eos_token_id], 4.0]],
        "suppress_tokens": [tokenizer.convert_tokens_to_ids(name) for name in names],
    }


def questions(n: int = 3) -> tuple[list[Any], list[str]]:
    """Synthetic images of 64 px and one question each."""
    rows = make_synthetic(n, size=64)
    return list(rows["image"]), list(rows["query"])


def as_data(predictions: Sequence[Prediction]) -> list[list[Any]]:
    """Everything in predictions that have a mask, to be compared bit for bit, also after a trip through JSON."""
    return [
        [
            p.text,
            p.status.value,
            p.boxes.tolist(),
            np.packbits(np.asarray(p.mask)).tolist(),
            list(np.asarray(p.mask).shape),
        ]
        for p in predictions
    ]


class NewObjects:
    """Objects of one type that did not exist when this was made: `new()` lists those alive."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.before = [thing for thing in gc.get_objects() if type(thing) is kind]  # kept, so that no id is used twice

    def __call__(self) -> list[Any]:
        known = set(map(id, self.before))
        return [thing for thing in gc.get_objects() if type(thing) is self.kind and id(thing) not in known]
