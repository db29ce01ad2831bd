"""CORE-Seg: presets, flags, data, and what is built.

| preset         | hardware       | time                          | held-out mDice                                     |
|----------------|----------------|-------------------------------|----------------------------------------------------|
| `tiny`         | 1 CPU core     | 10 minutes (docs/log.md)      | 79 on its synthetic data (docs/log.md)             |
| `core_seg_3b`  | 2 A6000, 48 GB | not run by us                 | published: 37.06 on ComLesion-14K; not run by us   |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from datasets import Dataset

from segrl import DenseLoss, SegSFTTrainer
from segrl.data import augment, make_scene, make_synthetic, prepare
from segrl.errors import CheckpointError
from segrl.evaluation import evaluate_constant_mask
from segrl.geometry import binarize
from segrl.heads import MaskHead, attach_mask_head, find_mask_head
from segrl.inference import SegmenterBase
from segrl.models import (
    Picture,
    ensure_seg_token,
    list_findings,
    load_vlm,
    pretrain_captions,
    pretrain_vision,
    tiny_qwen3_vl,
)
from segrl.predictions import ImagePromptSettings
from segrl.reports import say
from segrl.scripts import EvaluationArguments, Recipe, RunArguments, TwoStageArguments, TwoStageRun, sam2_builder
from segrl.segmenters import pretrain_segmenter, sam2_config

# ---- presets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CoreSegRecipe(Recipe):
    """One preset. A small training set is filled up to `fill_to` rows with augmented copies, more of rare kinds.

    Attributes:
        prompt: How the model is asked.
        adapter: Settings of the preset's adapter, the semantic-guided one.
        pretraining: For models with random weights: settings of `pretrain_vision`, `pretrain_captions` and
            `pretrain_segmenter` under "vision", "captions" and "segmenter", and the number of synthetic "scenes". The
            vision tower is frozen afterwards, and reasoning lists what is found (`list_findings`). None has weights.
        text_warmup: Trainer settings that differ in a first, text-only part of stage 1; None has no such part. A head
            that learns masks before `<seg>` knows the question segments every lesion, and stays there (docs/log.md).
        brief: Short template reasoning.
        max_boxes: Boxes that a reference answer names at most.
    """

    prompt: ImagePromptSettings
    adapter: Mapping[str, Any] = field(default_factory=dict)
    pretraining: Mapping[str, Any] | None = None
    text_warmup: Mapping[str, Any] | None = None
    brief: bool = False
    max_boxes: int | None = None


MOST_VIEWS = 32  # of a row, itself and its copies
SIDE = 96  # of an image as the tiny model sees it, pixels: every coordinate has two digits


def build_tiny(train: Dataset, path: str | None) -> tuple[Any, Any]:
    """About 1.1 M parameters of Qwen3-VL, random; the tokenizer learns the training texts."""
    if path:
        return load_vlm(path)
    sample = train.select(range(min(400, len(train)))).remove_columns("image")
    corpus = [str(dict(row)[column]) for row in sample for column in ("query", "lesion", "anatomy", "modality")]
    return tiny_qwen3_vl(
        corpus=[*corpus, *(f"{lesion} 0123 4567, {lesion} none." for lesion in sorted(set(sample["lesion"])))],
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


def build_3b(train: Dataset, path: str | None) -> tuple[Any, Any]:
    """Qwen2.5-VL-3B, from a path or the hub."""
    return load_vlm(path or "Qwen/Qwen2.5-VL-3B-Instruct", dtype=torch.bfloat16)


ON_A_CPU = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
# GRPO as published (formulas C): mean over the tokens of an answer, then over answers; KL without bias correction; a
# ratio for each token. TRL's own defaults for the first two differ.
AS_PUBLISHED = {"loss_type": "grpo", "use_bias_correction_kl": False, "importance_sampling_level": "token"}
REWARDS = ("format", "box_f1", "dual_granularity_mask")

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

RECIPES = {
    "tiny": CoreSegRecipe(
        build=build_tiny,
        segmenter=sam2_builder(sam2_config("tiny", image_size=192)),  # masks of 48 x 48
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
            "max_steps": 64,
            "logging_steps": 5,
            "beta": 0.01,
            "temperature": 0.5,
            "feature_cache_memory": 2**31,
        },
        rewards=REWARDS,
        adapter={"standardise": True},
        brief=True,
        max_boxes=4,
        pretraining={
            "scenes": 3000,
            "vision": {"steps": 350},
            "captions": {"steps": 400},
            "segmenter": {"encoder_steps": 100, "decoder_steps": 250, "decoder_batch_size": 10},
        },
        text_warmup={"learning_rate": 3e-3, "lr_scheduler_type": "constant_with_warmup", "max_steps": 500},
        fill_to=3200,
        synthetic={"train": 2000, "test": 240, "size": SIDE},
        # A few hundred real images, each with lesions of one kind: more views of them, and longer. So few do not teach
        # boxes, so masks do not wait for words: a head that finds the lesion by itself survives wrong boxes.
        on_data={
            "sft": {**TINY_SFT, "max_steps": 700},
            "text_warmup": None,
            "pretraining": {
                "vision": {"steps": 400},
                "captions": {"steps": 200},
                "segmenter": {
                    "encoder_steps": 400,
                    "decoder_steps": 700,
                    "decoder_batch_size": 12,
                    "unprompted": 0.5,
                },
            },
            "fill_to": 4200,
        },
    ),
    "core_seg_3b": CoreSegRecipe(
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

# ---- flags -----------------------------------------------------------------------------------------------------------

DATA = (
    "Folder with manifest.csv, images/ and masks/, a DatasetDict saved to disk, or a hub data set owner/name, each "
    "with the splits train and test; None: synthetic lesions."
)


@dataclass
class DataFlags(RunArguments):
    """Flags of all three scripts."""

    data: str | None = field(default=None, metadata={"help": DATA})


@dataclass
class TrainingFlags(DataFlags, TwoStageArguments):
    """Flags of the two training scripts."""

    dense_weight: float = field(default=1.0, metadata={"help": "Weight of DiceCE; 0 trains without it (ablation)."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Name of `segrl parts list`, such as linear (ablation), or module:Class; default: the preset's."
        },
    )
    probe: str | None = field(
        default=None,
        metadata={
            "help": "seg_token or answer, whose states prompt the segmenter, or module:Class; default: the preset's."
        },
    )


@dataclass
class EvaluationFlags(DataFlags, EvaluationArguments):
    """Flags of the evaluation."""


# ---- the run ---------------------------------------------------------------------------------------------------------


class CoreSegRun(TwoStageRun):
    """A language model whose `<seg>` prompts SAM 2, trained with DiceCE on its masks in both stages."""

    name = "core_seg"
    recipes = RECIPES
    training_flags = TrainingFlags
    evaluation_flags = EvaluationFlags
    least: ClassVar = {"dense_weight": 0}
    stage1_flags = ("adapter", "probe", "segmenter")
    baseline_splits = ("train",)
    recipe: CoreSegRecipe
    prompt: ImagePromptSettings

    def load(self, split: str) -> Dataset:
        if self.arguments.data is not None:
            return self.arguments.limited(self.read(split), split)
        self.check_synthetic(split)
        return make_synthetic(self.count(split), **self.scenes(split))

    def scenes(self, part: str) -> dict[str, Any]:
        """Return which synthetic scenes a part of the data has; no two parts and no two seeds share one."""
        seed = 3 * self.seed + ("train", "test", "pretraining").index(part)
        return {"size": self.recipe.synthetic["size"], "seed": seed, "hard": True}

    def views(self) -> int:
        return sum(1 + copies for copies in self.augmented())

    def augmented(self) -> list[int]:
        """Return the number of augmented copies of each row; rare kinds of rows get more, as the square root says."""
        rows = self.train_rows
        if "reasoning" in rows.column_names:
            return [0] * len(rows)  # a turned image would contradict it
        kinds = list(zip(rows["modality"], rows["lesion"], strict=True))
        counts = Counter(kinds)
        roots = sum(math.sqrt(count) for count in counts.values())
        views = {kind: int(self.recipe.fill_to / (math.sqrt(count) * roots)) for kind, count in counts.items()}
        return [min(max(1, views[kind]), MOST_VIEWS) - 1 for kind in kinds]

    def prepare(self, model: Any, processor: Any, *, completions: bool) -> Dataset:
        rows, recipe = self._copied(), self.recipe
        if completions and self.pretrains and self.prompt.reasoning and "reasoning" not in rows.column_names:
            rows = rows.add_column("reasoning", [list_findings(picture) for picture in self.pictures(rows)])
        limits = {"brief": recipe.brief, "max_boxes": recipe.max_boxes, "coordinates": self.arguments.coordinates}
        return prepare(rows, processor, self.prompt, completions=completions, **limits)

    def build(self) -> tuple[Any, Any]:
        model, processor = super().build()
        adapter = self.arguments.adapter or "semantic_guided"
        head = MaskHead.build(
            model,
            self.segmenter or self.build_segmenter(None),
            token_id=ensure_seg_token(model, processor),
            adapter=adapter,
            probe=self.arguments.probe or "seg_token",
            tokenizer=processor.tokenizer,
            **(self.recipe.adapter if adapter == "semantic_guided" else {}),
        )
        return attach_mask_head(model, head), processor

    def check_run(self, folder: str | Path) -> None:
        if Path(folder).is_dir() and not (Path(folder) / "mask_head.json").is_file():
            raise CheckpointError(
                f"--model {str(folder)!r} has no mask head (no mask_head.json); train stage 1 with train_sft.py, or "
                "pass --skip_stage1 to train_grpo.py"
            )
        super().check_run(folder)

    def trainer_arguments(self, model: Any, stage: Literal["sft", "grpo"]) -> dict[str, Any]:
        if self.pretrains:
            # a tower that has learned to see is left alone: from words it forgets more than it learns (docs/log.md)
            model.model.visual.requires_grad_(False)
        weight = self.arguments.dense_weight
        return {"dense_losses": [DenseLoss("dice_ce", weight=weight)] if weight else None}

    # ---- in place of pretraining -------------------------------------------------------------------------------------

    @property
    def pretrains(self) -> bool:
        """Whether the model is one with random weights, or was when its stage 1 began."""
        return self.recipe.pretraining is not None and self.own_model

    def pictures(self, rows: Dataset) -> list[Picture]:
        """Return what is known about rows: of synthetic ones all lesions, of others the one that is asked for."""
        if self.arguments.data is None:
            return [make_scene(n, **self.scenes("train")).picture() for n in range(len(rows))]
        dicts = map(dict, rows)  # type: ignore[call-overload]
        return [Picture.from_mask(row["image"], binarize(row["mask"]), row["lesion"] or "lesion") for row in dicts]

    def warm_up(self, model: Any, processor: Any) -> tuple[Any, Any]:
        recipe = self.recipe.pretraining
        if recipe is None or not self.pretrains:
            return model, processor
        if self.arguments.data is None:
            scenes = range(self.arguments.count(recipe["scenes"], "train"))
            pictures = [make_scene(n, **self.scenes("pretraining")).picture() for n in scenes]
        else:
            pictures = self.pictures(self._copied())
        head = find_mask_head(model)
        assert head is not None
        seen = pretrain_vision(model, processor, pictures, seed=self.seed, **self._short(recipe["vision"]))
        said = pretrain_captions(model, processor, pictures, seed=self.seed, **self._short(recipe["captions"]))
        parts = [f"{seen:.0%} of held-out lesions are seen", f"{said:.0%} of caption tokens right"]
        if self.arguments.segmenter is None:
            loss = pretrain_segmenter(head.segmenter, pictures, seed=self.seed, **self._short(recipe["segmenter"]))
            parts.append(f"DiceCE {loss:.2f} of the segmenter from boxes")
        if PartialState().is_main_process:
            say(f"in place of pretraining: {'; '.join(parts)}")
        return model, processor

    def before_sft(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        if self.recipe.text_warmup is None or not self.pretrains:
            return
        changes = {**self.recipe.text_warmup, "save_strategy": "no", "eval_strategy": "no"}
        warmup = replace(config, **self._short(changes))
        self.trainer_arguments(model, "sft")  # freezes the tower
        SegSFTTrainer(model, warmup, train_dataset=rows, processing_class=processor).train()

    def _short(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.shortened(n) if name.endswith("steps") else n for name, n in settings.items()}

    def _copied(self) -> Dataset:
        copies = self.augmented()
        return augment(self.train_rows, copies) if any(copies) else self.train_rows

    def baselines(self, segmenter: SegmenterBase, rows: Dataset) -> dict[str, list[dict[str, Any]]]:
        train = self.rows.get("train")
        return {} if train is None else {"baseline": evaluate_constant_mask(train, rows)}
