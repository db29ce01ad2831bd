"""Flags that training and evaluation scripts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_args

from segrl.data.coordinates import CoordinatePolicy
from segrl.data.division import Division
from segrl.errors import SegRLError
from segrl.predictions.frames import FrameKind

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "MACHINE_FLAGS",
    "QUICK",
    "VALIDATION_SETTINGS",
    "EvaluationArguments",
    "RunArguments",
    "TwoStageArguments",
    "check_numbers",
    "first_stage_settings",
]

# flags of the machine rather than of the method: given to a script, they hold for each of its stages
MACHINE_FLAGS = (
    *("seed", "data_seed", "use_cpu", "bf16", "fp16", "tf32", "gradient_checkpointing", "activation_checkpointing"),
    *("optim", "deepspeed", "fsdp", "fsdp_config", "ddp_backend", "dataloader_num_workers", "dataloader_pin_memory"),
    *("disable_tqdm", "report_to", "logging_steps", "save_strategy", "save_steps", "save_total_limit"),
)

# settings of a trainer that say when a run is validated and what follows from it: they hold for each of its stages
VALIDATION_SETTINGS = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "restore_callback_states_from_checkpoint"),
)

_LEAST = {
    "train_limit": 1,
    "eval_limit": 1,
    "eval_batch_size": 1,
    "sft_max_steps": 1,
    "pretrain_steps": 1,
    "early_stopping": 1,
    "pictures": 0,
}


@dataclass
class RunArguments:
    """Flags of every script. A subclass that gives a field another default or help leaves it in its place."""

    preset: str = field(default="tiny", metadata={"help": "What is built, and with which settings it is trained."})
    data: str | None = field(
        default=None,
        metadata={"help": "Folder, DatasetDict saved to disk, or hub data set owner/name, with splits train and test."},
    )
    allow_outside: bool = field(
        default=False,
        metadata={"help": "Let manifest.csv name files outside its folder, by .., absolute paths or links."},
    )
    folds: int | None = field(
        default=None,
        metadata={
            "help": "Divide all rows of --data anew into so many folds, whatever their split; patients and images are "
            "kept together. --fold is the test split, the others are the training split."
        },
    )
    fold: int | None = field(default=None, metadata={"help": "The fold to test on, 1 to --folds."})
    patients: str | None = field(
        default=None,
        metadata={
            "help": "With --folds or --val_fraction: regular expression; rows are of one patient if it finds the same "
            "text in their names. Default: the column patient."
        },
    )
    hold_out_source: str | None = field(
        default=None,
        metadata={"help": "Test on all rows of --data with this text in the column source, train on all others."},
    )
    descriptions: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of descriptions by structure, such as M3D's term_dictionary.json: questions describe "
            "the structure and do not name it."
        },
    )
    paraphrases: str | None = field(
        default=None,
        metadata={"help": "JSON file of whole questions by structure, which do not name it."},
    )
    train_limit: int | None = field(default=None, metadata={"help": "Use only the first rows of the training split."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate only the first rows of the test split."})
    eval_batch_size: int = field(default=16, metadata={"help": "Rows per generation in the evaluation."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run in output_dir, all of the folder."})

    def limited(self, rows: Dataset, split: str) -> Dataset:
        """Return the rows of a split that `--train_limit` (of "train") or `--eval_limit` (of any other) leaves."""
        count = self.count(len(rows), split)
        return rows.select(range(count)) if count < len(rows) else rows

    def count(self, rows: int, split: str) -> int:
        """Return how many of `rows` rows of a split its limit leaves.

        Example:
            >>> RunArguments(eval_limit=8).count(160, "test"), RunArguments().count(160, "test")
            (8, 160)
        """
        limit = self.train_limit if split == "train" else self.eval_limit
        return rows if limit is None else min(limit, rows)

    def division(self) -> Division | None:
        """Return how `--data` is divided anew; None keeps its splits.

        Raises:
            SegRLError: A flag without `--data`, or as `segrl.data.division.Division`.

        Example:
            >>> RunArguments(data="lesions", hold_out_source="clinic A").division()
            Division(folds=None, fold=None, patients=None, source='clinic A')
        """
        given = [name for name in ("folds", "fold", "patients", "hold_out_source") if getattr(self, name) is not None]
        if given == ["patients"] and getattr(self, "val_fraction", None) is not None:
            return None  # they say which rows are held out together
        if not given:
            return None
        if self.data is None:
            raise SegRLError(f"--{given[0]} divides the rows of --data; pass --data, or drop the flag")
        return Division(folds=self.folds, fold=self.fold, patients=self.patients, source=self.hold_out_source)

    def inputs(self) -> dict[str, str | None]:
        """Return what the run reads, by the names of the flags, for `segrl.scripts.check_output`."""
        return {
            name: getattr(self, name, None) for name in ("model", "data", "segmenter", "descriptions", "paraphrases")
        }


@dataclass
class TwoStageArguments(RunArguments):
    """Flags of training where SFT (stage 1) comes before GRPO (stage 2), in two scripts or in the one of stage 2.

    Example:
        >>> TwoStageArguments(val_fraction=0.1).inputs()["model"] is None
        True
    """

    model: str | None = field(
        default=None,
        metadata={
            "help": "train_sft: base model (path or hub name). train_grpo: a stage 1 run; None runs stage 1 first; "
            "with --skip_stage1 a base model."
        },
    )
    segmenter: str | None = field(
        default=None,
        metadata={
            "help": "SAM 2 weights, a .pt file or owner/repo:file.pt; or NAME:SOURCE of `segrl parts list`, such as "
            "sam:facebook/sam-vit-base."
        },
    )
    skip_stage1: bool = field(default=False, metadata={"help": "train_grpo without stage 1 (ablation)."})
    rewards: list[str] | None = field(
        default=None, metadata={"help": "Registered rewards, module:attribute, or YAML files; default: the preset's."}
    )
    drop_rewards: list[str] | None = field(default=None, metadata={"help": "Rewards to leave out (ablation)."})
    reasoning: bool = field(
        default=True,
        metadata={"help": "Chain of thought on or off in the script's own stage (ablation); default: the preset's."},
    )
    sft_reasoning: bool | None = field(
        default=None,
        metadata={
            "help": "Chain of thought in stage 1 when train_grpo runs it: true or false; default: the preset's, else "
            "as in stage 2."
        },
    )
    coordinates: str = field(
        default="refuse",
        metadata={
            "help": "What to do with coordinates in a column reasoning: refuse, strip (CORE-Seg), or keep them.",
            "choices": list(get_args(CoordinatePolicy)),
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Load the base model in 4 bit (NF4 of bitsandbytes), for presets with LoRA; the mask head is not."
        },
    )
    lora_scope: str | None = field(
        default=None,
        metadata={
            "help": "Linear layers with LoRA: those of the language model, or all (PEFT's all-linear, with the vision "
            "tower); default: the preset's.",
            "choices": ["language", "all"],
        },
    )
    frame_kind: str | None = field(
        default=None,
        metadata={
            "help": "Frame of the boxes that the model writes: original_px, resized_px or relative_1000; default: the "
            "preset's, else read off the processor.",
            "choices": list(get_args(FrameKind)),
        },
    )
    sft_max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of stage 1 when train_grpo runs it; default: the preset's, at most --max_steps if given."
        },
    )
    sft_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of that stage 1."})
    pretrain_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps at most of each part that stands in for pretraining (preset tiny); default: --max_steps."
        },
    )
    pretrained_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps what stands in for pretraining (preset tiny), for runs that differ only in what "
            "comes after it."
        },
    )
    control: bool = field(
        default=False,
        metadata={
            "help": "train_grpo: also continue stage 1 for as long as stage 2 took, and compare; stage 2's time again."
        },
    )
    val_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Hold out this share of the training rows and measure Dice on them while training, every tenth of "
            "a stage (--eval_steps); patients (column patient, or --patients) and images are kept together."
        },
    )
    val_split: str | None = field(
        default=None, metadata={"help": "Measure Dice while training on this split of --data instead."}
    )
    early_stopping: int | None = field(
        default=None,
        metadata={
            "help": "End a stage when Dice on the validation rows has not risen for so many validations, and keep its "
            "best checkpoint."
        },
    )
    quick: bool = field(
        default=False,
        metadata={"help": "A look in a minute: few rows and steps in every part; in runs/NAME_quick by default."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print rows, steps, prompt lengths and an estimate of memory, and stop; nothing is written."},
    )


@dataclass
class EvaluationArguments(RunArguments):
    """Flags of the evaluation of a run.

    Example:
        >>> EvaluationArguments(model="runs/core_seg").split
        'test'
    """

    model: str | None = field(default=None, metadata={"help": "The run to evaluate: its output_dir."})
    output_dir: str | None = field(default=None, metadata={"help": "Where to write; default: MODEL/evaluation."})
    seed: int = field(default=42, metadata={"help": "Seed of the synthetic data; the trainers' default is 42."})
    split: str = field(default="test", metadata={"help": "Split to evaluate."})
    pictures: int | None = field(
        default=None, metadata={"help": "Answers of which a picture is drawn; default: 16 images, 8 volumes."}
    )


# what `--quick` sets, unless flags say otherwise
QUICK: Mapping[str, Any] = {"max_steps": 3, "train_limit": 64, "eval_limit": 16, "logging_steps": 1}


def check_numbers(arguments: Any, least: Mapping[str, float] | None = None) -> None:
    """Refuse numbers that are too small.

    Args:
        arguments: A dataclass; fields that are None are left out.
        least: The smallest value that each field may have; the limits and sizes of `RunArguments` and
            `TwoStageArguments` need no entry, they are at least 1.

    Raises:
        SegRLError: A number that is smaller, or NaN.

    Example:
        >>> check_numbers(RunArguments(eval_limit=1))
        >>> check_numbers(RunArguments(eval_limit=0))
        Traceback (most recent call last):
        segrl.errors.SegRLError: --eval_limit 0: expected 1 or more; leave the flag out for the default
    """
    smallest = {**_LEAST, **(least or {})}
    for name in (item.name for item in fields(arguments)):
        value = getattr(arguments, name)
        if name in smallest and value is not None and not value >= smallest[name]:
            raise SegRLError(f"--{name} {value}: expected {smallest[name]} or more; leave the flag out for the default")


def first_stage_settings(
    preset: Mapping[str, Any],
    config: Any,
    given: set[str],
    arguments: TwoStageArguments,
    output_dir: str,
    *,
    validates: bool = True,
) -> dict[str, Any]:
    """Return the settings of stage 1 where the script of stage 2 trains it first: the preset's, changed by flags.

    Args:
        preset: The preset's settings of stage 1.
        config: The config of stage 2; its seed and those of `MACHINE_FLAGS` that were given hold for stage 1 too.
        given: The flags that were given, from `parse`.
        arguments: `sft_max_steps` and `sft_learning_rate`. Without the first, `--max_steps` shortens stage 1 as well.
        output_dir: Where stage 1 goes.
        validates: Whether the stage is measured on the validation split too, if there is one.

    Returns:
        Arguments for the config of stage 1.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(seed=7, max_steps=20, bf16=False)
        >>> preset = {"max_steps": 650, "learning_rate": 1e-3, "bf16": True}
        >>> first_stage_settings(preset, config, {"max_steps", "bf16"}, TwoStageArguments(), "runs/mine/stage1")
        {'max_steps': 20, 'learning_rate': 0.001, 'bf16': False, 'output_dir': 'runs/mine/stage1', 'seed': 7}
    """
    settings = {**preset, "output_dir": output_dir, "seed": config.seed}
    settings |= {name: getattr(config, name) for name in MACHINE_FLAGS if name in given}
    if validates and (arguments.val_fraction is not None or arguments.val_split is not None):
        settings |= {name: getattr(config, name) for name in VALIDATION_SETTINGS}
        if config.load_best_model_at_end:
            settings |= {name: getattr(config, name) for name in ("save_strategy", "save_steps", "save_total_limit")}
    if arguments.sft_learning_rate is not None:
        settings["learning_rate"] = arguments.sft_learning_rate
    if arguments.sft_max_steps is not None:
        settings["max_steps"] = arguments.sft_max_steps
    elif "max_steps" in given and config.max_steps > 0:
        steps = settings.get("max_steps", -1)
        settings["max_steps"] = min(steps, config.max_steps) if steps > 0 else config.max_steps
    return settings
