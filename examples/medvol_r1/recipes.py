"""Presets of the MedVol-R1 example: what is built, and with which settings it is trained.

| preset         | hardware      | time    | held-out result                                                      |
|----------------|---------------|---------|----------------------------------------------------------------------|
| `tiny`         | 2 CPU cores   | 14 min  | Dice 78.8 % (true boxes 79.3), visibility 60.7 to 67.2 %, boxes 22.4 |
|                |               |         | to 26.4 % from stage 1 to 2, on its synthetic volumes (docs/log.md)  |
| `medvol_r1_4b` | 4 GPUs, 80 GB | not run | not run; published Dice: 85.43 CT-ORG, 89.86 AbdomenCT-1K,           |
|                |               |         | 45.46 KiTS23                                                         |

The paper states neither hardware nor time; 4 GPUs of 80 GB is our estimate for Qwen3-VL-4B with LoRA, 64 images a
prompt and ZeRO-2 (`--deepspeed examples/medvol_r1/zero2.json`). A preset only holds numbers and builders; every trainer
setting in it is a default that a command-line flag overrides. `tiny` took 14 minutes with a thread on each core
(`--num_cpu_threads_per_process 2`), 17 with one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, concatenate_datasets

from segrl.data import prepare_volumes
from segrl.models import load_vlm
from segrl.scripts import find_preset
from segrl.segmenters import Sam2Config, Sam2Segmenter
from segrl.segmenters.sam2 import sam2_config

REWARDS = ("slice_format", "slice_visibility", "slice_boxes", "propagated_dice")  # R_f, R_a, R_s, R_c


@dataclass(frozen=True)
class Recipe:
    """One preset.

    Attributes:
        build: `build(train_rows, model_path) -> (model, processor)` for stage 1.
        segmenter: `segmenter(path) -> Sam2Segmenter`, the frozen one; None as path takes the preset's own.
        vision_warmup: Settings of `warmup.pretrain_vision`, for a model with random weights, whose tower is frozen
            afterwards; it also gets the short reasoning of `warmup.add_reasoning`. None has no such part.
        segmenter_training: Settings of `train_segmenter`, for a segmenter with random weights; None has weights.
        postprocessing: Of `VolumePropagator`.
        prompt: Settings of `segrl.data.prepare_volumes` that are saved with the model, so that inference asks the same
            way.
        targets: Settings of `prepare_volumes` for the answers of stage 1.
        sft, grpo: Trainer settings of the two stages.
        rewards: Registered names.
        lora: Settings of `peft.LoraConfig` for the language model; None trains the whole model.
        max_new_tokens: Of evaluation and inference.
        fill_to: Repeat the rows of a small training set up to about this many, each time with other key slices in the
            answers; 0 does not.
        synthetic: Volumes of each split, and their size.
        distractors: Whether synthetic volumes also hold lesions of the kind that is not asked for.
    """

    build: Callable[..., tuple[Any, Any]]
    segmenter: Callable[[str | None], Sam2Segmenter]
    prompt: dict[str, Any]
    sft: dict[str, Any]
    grpo: dict[str, Any]
    targets: dict[str, Any] = field(default_factory=dict)
    vision_warmup: dict[str, Any] | None = None
    segmenter_training: dict[str, Any] | None = None
    postprocessing: bool = True
    rewards: Sequence[str] = REWARDS
    lora: dict[str, Any] | None = None
    max_new_tokens: int = 256
    synthetic: dict[str, int] = field(
        default_factory=lambda: {"train": 600, "test": 240, "segmenter": 120, "depth": 16, "size": 64}
    )
    distractors: bool = True
    fill_to: int = 0

    def copies(self, rows: int) -> int:
        """How often each of so many training rows is in the data set."""
        return max(1, self.fill_to // rows)


def rows_for(dataset: Dataset, processor: Any, recipe: Recipe, *, completions: bool, reasoning: bool = True) -> Dataset:
    """The data set with the slices, prompts and answers of this recipe."""
    prompt = {key: value for key, value in recipe.prompt.items() if value is not None}
    settings = {"completions": completions, "reasoning": reasoning, **prompt, **recipe.targets}
    copies = recipe.copies(len(dataset))
    parts = [prepare_volumes(dataset, processor, seed=seed, **settings) for seed in range(copies if completions else 1)]
    return concatenate_datasets(parts if completions else parts * copies)


# ---- tiny ------------------------------------------------------------------------------------------------------------

_TINY_SAM2 = Sam2Config(
    image_size=64,
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


def _build_tiny(train: Dataset, model_path: str | None) -> tuple[Any, Any]:
    """About 3 M parameters of Qwen3-VL, random; the tokenizer learns the training texts."""
    from segrl.models import tiny_qwen3_vl

    if model_path:
        return load_vlm(model_path)
    rows = train.select(range(min(200, len(train))))
    columns = [name for name in ("query", "lesion", "anatomy", "modality") if name in rows.column_names]
    corpus = [str(dict(row)[name]) for row in rows for name in columns]
    corpus += [
        '"slice": 3, "bbox_2d_list": [[',
        "<slice 1>",
        ", 2 none, 3 small 0123, 4 medium 0145, 5 large 4567.",
    ] * 50
    side = _TINY_PROMPT["size"]
    return tiny_qwen3_vl(
        corpus=corpus,
        hidden_size=128,
        layers=3,
        heads=4,
        vision_hidden_size=64,
        vision_layers=2,
        vision_heads=2,
        patch_size=8,
        merge_size=4,  # one token a slice
        rope_theta=1e4,
        min_pixels=side**2,
        max_pixels=side**2,
    )


def _tiny_segmenter(path: str | None) -> Sam2Segmenter:
    return Sam2Segmenter(_TINY_SAM2) if path is None else Sam2Segmenter.from_pretrained(path, _TINY_SAM2)


_TINY_PROMPT = {"slices": 8, "size": 32, "instruction": "", "frame_kind": "original_px"}
_ON_A_CPU = {
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "lr_scheduler_type": "cosine",
}

# ---- at full size ----------------------------------------------------------------------------------------------------


def _build_4b(train: Dataset, model_path: str | None) -> tuple[Any, Any]:
    """Qwen3-VL-4B, from a path or the hub."""
    import torch

    return load_vlm(model_path or "Qwen/Qwen3-VL-4B-Instruct", dtype=torch.bfloat16)


def _medsam2(path: str | None) -> Sam2Segmenter:
    return Sam2Segmenter.from_pretrained(
        path or "wanglab/MedSAM2:MedSAM2_latest.pt", sam2_config("sam2.1_hiera_tiny", image_size=512)
    )


# formulas B, for both stages: AdamW (the trainers' default), warm-up 0.1, cosine, bf16, checkpointing
_PUBLISHED = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a fraction of all steps, as transformers reads a number below 1
    "bf16": True,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "save_steps": 100,
}

RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        build=_build_tiny,
        segmenter=_tiny_segmenter,
        vision_warmup={"steps": 200, "volumes": 300},
        segmenter_training={"steps": 450, "learning_rate": 1e-3},
        postprocessing=False,
        prompt=_TINY_PROMPT,
        targets={"top_k": 5},
        fill_to=64,
        sft={
            **_ON_A_CPU,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-3,
            "warmup_steps": 10,
            "max_steps": 450,
            "dataloader_num_workers": 1,  # the second core prepares the images
            "logging_steps": 50,
            "max_length": None,
        },
        grpo={
            **_ON_A_CPU,
            "per_device_train_batch_size": 32,
            "num_generations": 4,
            "max_completion_length": 112,
            "temperature": 0.5,
            "learning_rate": 1.5e-4,
            "warmup_steps": 10,
            "max_steps": 120,
            "logging_steps": 10,
            "beta": 0.01,
        },
        max_new_tokens=112,
    ),
    "medvol_r1_4b": Recipe(
        build=_build_4b,
        segmenter=_medsam2,
        prompt={"slices": 64, "size": 256, "instruction": None, "frame_kind": None},
        targets={"top_k": 5},  # the paper is silent on K
        sft={
            **_PUBLISHED,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-5,
            "max_length": None,
        },
        grpo={
            **_PUBLISHED,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "num_generations": 4,
            "max_completion_length": 256,
            "learning_rate": 2e-6,
            "beta": 0.01,
        },
        lora={"r": 128, "lora_alpha": 256},  # rank 128 on all linear layers; alpha is not published
    ),
}


def find_recipe(name: str) -> Recipe:
    """The preset of this name; an unknown one is an error that suggests the closest."""
    return find_preset(name, RECIPES)
