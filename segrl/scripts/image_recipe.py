"""Presets and flags of runs on images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from segrl.predictions.prompt_settings import ImagePromptSettings
from segrl.scripts.arguments import EvaluationArguments, RunArguments, TwoStageArguments
from segrl.scripts.frozen_segmenter import SEGMENTER_HELP
from segrl.scripts.recipe import Recipe

__all__ = [
    "CascadeEvaluationFlags",
    "HeadTrainingFlags",
    "ImageEvaluationFlags",
    "ImageFlags",
    "ImageRecipe",
    "ImageTrainingFlags",
]

_DATA = (
    "Folder with manifest.csv, images/ and masks/, a DatasetDict saved to disk, or a hub data set owner/name, each "
    "with the splits train and test; None: synthetic lesions."
)


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """A preset of a run on images. A small training set is filled up to `fill_to` rows with augmented copies.

    Attributes:
        prompt: How the model is asked.
        adapter: The adapter of a mask head, by its registered name, and its settings.
        dense: Weights of the dense losses on the masks of a head, by their registered names.
        pretraining: For models with random weights: settings of `pretrain_vision`, `pretrain_captions` and
            `pretrain_segmenter` under "vision", "captions" and "segmenter", and the number of synthetic "scenes". The
            vision tower is frozen afterwards, and reasoning lists what is found (`list_findings`). None has weights.
        text_warmup: Trainer settings that differ in a first, text-only part of stage 1; None has no such part. A head
            that learns masks before `<seg>` knows the question segments every lesion, and stays there (docs/log.md).
        brief: Short template reasoning.
        max_boxes: Boxes that a reference answer names at most.
        noun: Word for every lesion in reference answers, in place of its name, and the one kind of lesion in
            pretraining. A model that has learned to write from a few hundred rows writes the names of those in pieces
            when it is asked for another. None: the name.

    Of synthetic data, "sft" in `synthetic` is the number of training rows with written answers, which stage 1 sees;
    stage 2 sees all of them, since it needs their masks alone. Without it, stage 1 sees all as well.

    Example:
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> parts = {"build": lambda rows, model: tiny_qwen2_5_vl(), "sft": {}, "grpo": {}, "rewards": ["box_f1"]}
        >>> ImageRecipe(prompt=ImagePromptSettings(), **parts).dense
        {'dice_ce': 1.0}
    """

    prompt: ImagePromptSettings
    adapter: tuple[str, Mapping[str, Any]] = ("semantic_guided", {})
    dense: Mapping[str, float] = field(default_factory=lambda: {"dice_ce": 1.0})
    pretraining: Mapping[str, Any] | None = None
    text_warmup: Mapping[str, Any] | None = None
    brief: bool = False
    max_boxes: int | None = None
    noun: str | None = None


@dataclass
class ImageFlags(RunArguments):
    """Flags of every script on images."""

    data: str | None = field(default=None, metadata={"help": _DATA})


@dataclass
class ImageTrainingFlags(ImageFlags, TwoStageArguments):
    """Flags of training on images."""


@dataclass
class HeadTrainingFlags(ImageTrainingFlags):
    """Flags of training with a mask head."""

    dense_weight: float = field(
        default=1.0, metadata={"help": "Factor of all dense losses; 0 trains without them (ablation)."}
    )
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
class ImageEvaluationFlags(ImageFlags, EvaluationArguments):
    """Flags of the evaluation on images."""


@dataclass
class CascadeEvaluationFlags(ImageEvaluationFlags):
    """Flags of the evaluation where a frozen segmenter makes the masks."""

    segmenter: str | None = field(default=None, metadata={"help": SEGMENTER_HELP})
