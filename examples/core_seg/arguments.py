"""Flags of this example, beside those that every script has and all of the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes import RECIPES, find_recipe

from segrl.scripts import EvaluationArguments, TwoStageArguments, check_rewards, parse

PRESET = f"One of: {', '.join(RECIPES)}."
DATA = (
    "Folder with manifest.csv, images/ and masks/, a DatasetDict saved to disk, or a hub data set owner/name, each "
    "with the splits train and test; None: synthetic lesions."
)


@dataclass
class ExampleArguments(TwoStageArguments):
    """Flags of the two training scripts."""

    preset: str = field(default="tiny", metadata={"help": PRESET})
    data: str | None = field(default=None, metadata={"help": DATA})
    dense_weight: float = field(default=1.0, metadata={"help": "Weight of DiceCE; 0 trains without it (ablation)."})
    reasoning: bool = field(default=True, metadata={"help": "Chain of thought on or off (ablation)."})
    adapter: str | None = field(
        default=None, metadata={"help": "semantic_guided, linear or mlp (ablation); default: the preset's."}
    )
    probe: str | None = field(
        default=None,
        metadata={"help": "seg_token or answer, whose states prompt the segmenter; default: the preset's."},
    )


@dataclass
class EvaluateArguments(EvaluationArguments):
    """Flags of the evaluation."""

    preset: str = field(default="tiny", metadata={"help": PRESET})
    data: str | None = field(default=None, metadata={"help": DATA})


def read(
    config_class: type, stage: str, default_output: str, argv: Sequence[str]
) -> tuple[ExampleArguments, Any, set[str]]:
    """Command line to this example's arguments, the trainer's config, and the names of the flags that were given."""
    example, config, given = parse(
        argv,
        ExampleArguments,
        config_class,
        defaults=lambda known: {"output_dir": default_output, **getattr(find_recipe(known.preset), stage)},
        description=f"CORE-Seg, {stage}. Presets: {', '.join(RECIPES)}.",
        least={"dense_weight": 0},
    )
    rewards = find_recipe(example.preset).rewards if example.rewards is None else example.rewards
    example.rewards = check_rewards(rewards)
    return example, config, given
