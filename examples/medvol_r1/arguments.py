"""Flags of this example, beside those that every script has and all of the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes import RECIPES, REWARDS, find_recipe

from segrl.data import M3D_SEG_DATASETS
from segrl.errors import SegRLError, unknown_name
from segrl.scripts import EvaluationArguments, TwoStageArguments, check_rewards, parse

PRESET = f"One of: {', '.join(RECIPES)}."
DATA = (
    "Folder with manifest.csv and NIfTI scans and labels, or (with --m3d_seg) a folder in M3D-Seg's layout, or a "
    "DatasetDict saved to disk, each with the splits train and test; None: synthetic volumes."
)
M3D_SEG = f"--data is a folder in the layout of M3D-Seg; which of its data sets: {', '.join(M3D_SEG_DATASETS)}."
SEGMENTER = "SAM 2 weights: a .pt file, owner/repo:file.pt, or a folder that a run wrote; default: the preset's."


@dataclass
class ExampleArguments(TwoStageArguments):
    """Flags of the two training scripts."""

    preset: str = field(default="tiny", metadata={"help": PRESET})
    data: str | None = field(default=None, metadata={"help": DATA})
    m3d_seg: str | None = field(default=None, metadata={"help": M3D_SEG})
    segmenter: str | None = field(default=None, metadata={"help": SEGMENTER})
    segmenter_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps for which a segmenter with random weights is trained first; default: the preset's, at most "
            "--max_steps if given."
        },
    )
    reasoning: bool = field(default=True, metadata={"help": "Chain of thought on or off (ablation)."})
    without: list[str] | None = field(
        default=None, metadata={"help": f"Rewards to leave out (ablation): {', '.join(REWARDS)}."}
    )
    reach: int = field(
        default=5,
        metadata={
            "help": "Delta of R_c: slices each way from the key slice that propagated_dice reads (2, 5, 10, 15)."
        },
    )
    pretrain_steps: int | None = field(
        default=None, metadata={"help": "At most so many steps before stage 1 (preset tiny); default: --max_steps."}
    )
    key_slices: int | None = field(
        default=None, metadata={"help": "Stage 1 answers with one of so many largest slices; default: the preset's."}
    )


@dataclass
class EvaluateArguments(EvaluationArguments):
    """Flags of the evaluation."""

    preset: str = field(default="tiny", metadata={"help": PRESET})
    data: str | None = field(default=None, metadata={"help": DATA})
    m3d_seg: str | None = field(default=None, metadata={"help": M3D_SEG})
    split: str = field(default="test", metadata={"help": "Split to evaluate."})
    segmenter: str | None = field(
        default=None, metadata={"help": "SAM 2 weights: a .pt file or owner/repo:file.pt; default: the run's."}
    )
    pictures: int = field(default=8, metadata={"help": "Volumes of which a picture is drawn."})


def read(
    config_class: type, stage: str, default_output: str, argv: Sequence[str]
) -> tuple[ExampleArguments, Any, set[str]]:
    """Command line to this example's arguments, the trainer's config, and the names of the flags that were given."""
    example, config, given = parse(
        argv,
        ExampleArguments,
        config_class,
        defaults=lambda known: {"output_dir": default_output, **getattr(find_recipe(known.preset), stage)},
        description=f"MedVol-R1, {stage}. Presets: {', '.join(RECIPES)}.",
        least={"reach": 0, "key_slices": 1, "pretrain_steps": 1, "segmenter_steps": 1},
    )
    rewards = list(find_recipe(example.preset).rewards if example.rewards is None else example.rewards)
    for name in example.without or ():
        if name not in rewards:
            raise unknown_name("reward for --without", name, rewards)
        rewards.remove(name)
    if not rewards:
        raise SegRLError(f"--without {' '.join(example.without or ())}: no reward is left")
    example.rewards = check_rewards(rewards)
    if (
        example.pretrain_steps is None and "max_steps" in given and config.max_steps > 0
    ):  # a short look is short in all of its parts
        example.pretrain_steps = config.max_steps
    return example, config, given
