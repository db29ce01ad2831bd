"""The steps that the three scripts of this example share: arguments, data, the two training stages, evaluation."""

from __future__ import annotations

import difflib
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from recipes import RECIPES, Recipe, find_recipe, rows_for
from rich.console import Console
from transformers import HfArgumentParser

from segrl import DenseLoss, ReasoningSegmenter, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.data import load_folder, make_synthetic
from segrl.errors import DataError, SegRLError, unknown_name
from segrl.evaluation import evaluate, evaluate_constant_mask
from segrl.heads import find_mask_head
from segrl.inference import save_settings
from segrl.metrics import summarise
from segrl.report import contact_sheet, results_table, versions, write_results
from segrl.rewards import list_rewards

MARKER = "segrl_run.json"


@dataclass
class ExampleArguments:
    """What this example adds to the trainer's own flags."""

    preset: str = field(default="tiny", metadata={"help": f"One of: {', '.join(RECIPES)}."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder with manifest.csv, images/, masks/, or a Hugging Face data set name; None: synthetic lesions."
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "train_sft: base model (path or hub name). train_grpo: a stage 1 run; None runs stage 1 first."
        },
    )
    segmenter: str | None = field(default=None, metadata={"help": "SAM 2 weights: a .pt file or owner/repo:file.pt."})
    rewards: list[str] | None = field(default=None, metadata={"help": "Registered rewards; default: the preset's."})
    dense_weight: float = field(default=1.0, metadata={"help": "Weight of DiceCE; 0 trains without it (ablation)."})
    reasoning: bool = field(default=True, metadata={"help": "Chain of thought on or off (ablation)."})
    sft_max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of stage 1 when train_grpo runs it; default: the preset's, at most --max_steps if given."
        },
    )
    sft_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of that stage 1."})
    train_limit: int | None = field(default=None, metadata={"help": "Use only the first rows of the training split."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate only the first rows of the test split."})
    eval_batch_size: int = field(default=16, metadata={"help": "Rows per generation in the evaluation."})
    overwrite: bool = field(default=False, metadata={"help": "Replace another run in output_dir."})


def parse(
    config_class: type, stage: str, default_output: str, argv: list[str] | None = None
) -> tuple[ExampleArguments, Any]:
    """Command line to arguments. The preset's settings are defaults; every flag of the trainer's config overrides them."""
    argv = sys.argv[1:] if argv is None else argv
    arguments: Any = (ExampleArguments, config_class)
    parser = HfArgumentParser(arguments, description=f"CORE-Seg, {stage}. Presets: {', '.join(RECIPES)}.")
    chosen, _ = HfArgumentParser((ExampleArguments,)).parse_args_into_dataclasses(  # type: ignore[arg-type]
        args=[a for a in argv if a not in ("-h", "--help")], return_remaining_strings=True, look_for_args_file=False
    )
    recipe = find_recipe(chosen.preset)
    parser.set_defaults(output_dir=default_output, **getattr(recipe, stage))
    example, config, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        flags = ["--" + item.name for kind in (ExampleArguments, config_class) for item in fields(kind)]
        raise unknown_name("flag", unknown[0].split("=")[0], difflib.get_close_matches(unknown[0], flags, n=5) or flags)
    names = example.rewards if example.rewards is not None else list(recipe.rewards)
    for name in names:
        if name not in list_rewards():
            raise unknown_name("reward", name, list_rewards())
    return example, config


def main_process() -> bool:
    return PartialState().is_main_process


def claim(folder: Path, example: ExampleArguments, resume: Any) -> None:
    """Make `folder` this run's, or refuse one that holds another run."""
    if not main_process():
        return
    used = folder.is_dir() and any(folder.iterdir())
    if used and not resume:
        if not example.overwrite:
            raise SegRLError(
                f"output_dir {str(folder)!r} is not empty; pass another --output_dir, --resume_from_checkpoint to continue that run, "
                "or --overwrite to replace it"
            )
        if not (folder / MARKER).is_file():
            raise SegRLError(
                f"--overwrite: {str(folder)!r} was not written by this example (no {MARKER}); remove it yourself"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / MARKER, {"arguments": vars(example), "versions": versions()})


def load_data(example: ExampleArguments, recipe: Recipe, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, checked in full."""
    if example.data is None:
        size = recipe.synthetic
        train = make_synthetic(size["train"], size=size["size"], seed=seed)
        test = make_synthetic(size["test"], size=size["size"], seed=seed + 1)
    elif Path(example.data).is_dir():
        train, test = load_folder(example.data, "train"), load_folder(example.data, "test")
    elif "/" in example.data and not example.data.startswith((".", "/")):
        from datasets import load_dataset

        train, test = load_dataset(example.data, split="train"), load_dataset(example.data, split="test")
    else:
        raise DataError(f"--data {example.data!r}: no such folder, nor a data set name owner/name")
    if example.train_limit:
        train = train.select(range(min(example.train_limit, len(train))))
    if example.eval_limit:
        test = test.select(range(min(example.eval_limit, len(test))))
    return train, test


def prompt_settings(example: ExampleArguments, recipe: Recipe) -> dict[str, Any]:
    return {**recipe.prompt, "reasoning": example.reasoning, "max_new_tokens": recipe.max_new_tokens}


def train_stage1(example: ExampleArguments, config: SegSFTConfig, recipe: Recipe, train: Dataset) -> Path:
    """SFT with dense losses; returns the folder of the trained model."""
    model, processor = recipe.build(train, example.model, example.segmenter)
    rows = rows_for(train, processor, recipe, completions=True, reasoning=example.reasoning)
    trainer = SegSFTTrainer(
        model,
        config,
        train_dataset=rows,
        processing_class=processor,
        peft_config=_lora(recipe, model),
        dense_losses=[DenseLoss("dice_ce", weight=example.dense_weight)] if example.dense_weight else None,
    )
    trainer.train(resume_from_checkpoint=_checkpoint(config))
    return _finish(trainer, example, recipe)


def train_stage2(
    example: ExampleArguments, config: SegGRPOConfig, recipe: Recipe, train: Dataset, stage1: Path
) -> Path:
    """GRPO with mask rewards and dense losses from the model in `stage1`; returns the folder of the trained model."""
    segmenter = ReasoningSegmenter.from_pretrained(stage1, device="cpu", trainable=True)
    head = find_mask_head(segmenter.model)
    if head is None:
        raise SegRLError(f"--model {str(stage1)!r} has no mask head; train stage 1 with train_sft.py")
    head.freeze_encoder = recipe.freeze_encoder[1]
    config.require_reasoning = example.reasoning
    rows = rows_for(train, segmenter.processor, recipe, completions=False, reasoning=example.reasoning)
    trainer = SegGRPOTrainer(
        segmenter.model,
        list(example.rewards if example.rewards is not None else recipe.rewards),
        config,
        train_dataset=rows,
        processing_class=segmenter.processor,
        dense_losses=[DenseLoss("dice_ce", weight=example.dense_weight)] if example.dense_weight else None,
    )
    trainer.train(resume_from_checkpoint=_checkpoint(config))
    return _finish(trainer, example, recipe)


def _finish(trainer: Any, example: ExampleArguments, recipe: Recipe) -> Path:
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    if trainer.is_world_process_zero():
        save_settings(folder, prompt_settings(example, recipe))
        write_results(folder / "log_history.json", trainer.state.log_history)  # type: ignore[arg-type]
    trainer.accelerator.wait_for_everyone()
    return folder


def _lora(recipe: Recipe, model: Any) -> Any:
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    head = find_mask_head(model)
    assert head is not None
    return LoraConfig(
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        trainable_token_indices={"embed_tokens": [head.probe.token_id]},
        task_type="CAUSAL_LM",
        **recipe.lora,
    )


def _checkpoint(config: Any) -> Any:
    """`--resume_from_checkpoint`: a folder, or `true` / `last` for the newest in output_dir."""
    value = config.resume_from_checkpoint
    return True if isinstance(value, str) and value.lower() in ("true", "last") else value


def score(folder: Path, test: Dataset, example: ExampleArguments) -> tuple[dict[str, Any], Any]:
    """Summary of the model in `folder` on the held-out rows, and what the contact sheet shows of it."""
    segmenter = ReasoningSegmenter.from_pretrained(folder)
    records, predictions, targets = evaluate(segmenter, test, batch_size=example.eval_batch_size)
    shown = [
        {"image": test[n]["image"], "prediction": predictions[n], "target": targets[n], "dice": records[n]["dice"]}
        for n in range(min(16, len(test)))
    ]
    return summarise(records), (records, shown)


def report(folder: Path, results: dict[str, Any], evaluated: Any) -> None:
    """`results.json`, `predictions.json`, `predictions.png`, and the table."""
    records, shown = evaluated
    results["versions"] = versions()
    write_results(folder / "results.json", results)
    write_results(folder / "predictions.json", records)
    contact_sheet(shown, folder / "predictions.png")
    results_table(results)
    Console().print(f"Written to {folder}: results.json, predictions.json, predictions.png, log_history.json")


def baseline(train: Dataset, test: Dataset) -> dict[str, Any]:
    return summarise(evaluate_constant_mask(train, test))


def run(main: Any) -> None:
    """Run a script's `main`; what the user can mend is one line on stderr and exit code 2."""
    try:
        main()
    except SegRLError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
