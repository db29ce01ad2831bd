"""The steps that the three scripts of this example share: output folder, data, models, the two stages, evaluation."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import DataArguments, ExampleArguments
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from recipes import Recipe
from transformers.trainer_utils import get_last_checkpoint

from segrl import DenseLoss, ReasoningSegmenter, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.data import check_rows, load_folder, make_synthetic
from segrl.errors import CheckpointError, DataError, SegRLError, unknown_name
from segrl.evaluation import evaluate, evaluate_constant_mask
from segrl.heads import MaskHead, attach_mask_head, detach_mask_head, find_mask_head
from segrl.inference import save_settings
from segrl.metrics import summarise
from segrl.report import contact_sheet, results_table, versions, write_results

MARKER, HISTORY = "segrl_run.json", "log_history.json"
TEXTS = ("modality", "anatomy", "lesion", "name")


# ---- output folder ---------------------------------------------------------------------------------------------------


def check_output(folder: Path, example: DataArguments, resume: Any = None) -> str | None:
    """Refuse a folder that must not be written to, and change nothing. Returns the checkpoint to continue from."""
    if folder.exists() and not folder.is_dir():
        raise SegRLError(f"output_dir {str(folder)!r} is a file; pass a folder")
    checkpoint = _checkpoint(folder, resume)
    if checkpoint is not None and _inside(checkpoint, folder):
        if example.overwrite:
            raise SegRLError(
                "--overwrite would remove the run that --resume_from_checkpoint continues; pass one of them"
            )
        return checkpoint
    if not folder.is_dir() or not any(folder.iterdir()):
        return checkpoint
    if not example.overwrite:
        raise SegRLError(
            f"output_dir {str(folder)!r} is not empty; pass another --output_dir, --resume_from_checkpoint to continue "
            "that run, or --overwrite to replace it"
        )
    if not (folder / MARKER).is_file():
        raise SegRLError(
            f"--overwrite: {str(folder)!r} was not written by this example (no {MARKER}); remove it yourself"
        )
    inputs = {name: getattr(example, name, None) for name in ("model", "data", "segmenter")}
    for name, path in {**inputs, "resume_from_checkpoint": checkpoint}.items():
        if path and _inside(path, folder):
            raise SegRLError(f"--overwrite would remove --{name} {path!r}; pass another --output_dir")
    return checkpoint


def claim(folder: Path, example: DataArguments, checkpoint: str | None = None) -> None:
    """Make `folder`, which passed `check_output`, this run's. The run that it held is removed here."""
    state = PartialState()
    state.wait_for_everyone()  # until the other processes have checked the folder too
    if state.is_main_process and not (checkpoint and _inside(checkpoint, folder)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            write_results(folder / MARKER, {"arguments": asdict(example), "versions": versions()})
        except OSError as error:
            raise SegRLError(f"output_dir {str(folder)!r} cannot be written: {error}; pass another") from error
    state.wait_for_everyone()


def _checkpoint(folder: Path, value: Any) -> str | None:
    """`--resume_from_checkpoint`: a folder, or `true` / `last` for the newest in output_dir."""
    if value is None or str(value).lower() == "false":
        return None
    if str(value).lower() in ("true", "last"):
        newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if newest is None:
            raise SegRLError(
                f"--resume_from_checkpoint {value}: no checkpoint in {str(folder)!r}; start without the flag"
            )
        value = newest
    if not (Path(value) / "trainer_state.json").is_file():
        raise CheckpointError(
            f"--resume_from_checkpoint {str(value)!r}: no checkpoint there (no trainer_state.json); expected a folder "
            "checkpoint-N, or 'last' for the newest in output_dir"
        )
    return str(value)


def _inside(path: str, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())


# ---- data ------------------------------------------------------------------------------------------------------------


def load_data(example: DataArguments, recipe: Recipe, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, checked in full."""
    train, test = load_split(example, recipe, seed, "train"), load_split(example, recipe, seed, "test")
    return train, test


def load_split(example: DataArguments, recipe: Recipe, seed: int, split: str) -> Dataset:
    """One split, `train` or `test`, checked in full.

    Raises:
        UnknownNameError: the data has no such split.
        DataError: no such data, or bad rows.
    """
    if example.data is None:
        size = recipe.synthetic
        rows = make_synthetic(size[split], size=size["size"], seed=seed + (split == "test"))
    elif (Path(example.data) / "dataset_dict.json").is_file():
        rows = _of_columns(_hugging_face(load_from_disk, example.data), example.data, split)
    elif (Path(example.data) / "dataset_info.json").is_file():
        raise DataError(
            f"--data {example.data!r} is one data set; expected the splits train and test: save "
            "DatasetDict({'train': ..., 'test': ...})"
        )
    elif Path(example.data).is_dir():
        rows = load_folder(example.data, split)
    elif example.data.count("/") == 1 and not example.data.startswith((".", "/", "~")):
        rows = _of_columns(_hugging_face(load_dataset, example.data), example.data, split)
    else:
        raise DataError(f"--data {example.data!r}: no such folder, nor a data set name owner/name")
    limit = example.train_limit if split == "train" else example.eval_limit
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _hugging_face(load: Any, name: str) -> Any:
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise DataError(f"--data {name!r} cannot be loaded: {' '.join(str(error).split())}") from error


def _of_columns(splits: DatasetDict, name: str, split: str) -> Dataset:
    """A split of a data set from elsewhere: checked, with the text columns that it lacks."""
    if split not in splits:
        raise unknown_name(f"split of {name}", split, map(str, splits))
    rows = splits[split]
    check_rows(rows)
    for column in TEXTS:
        given = rows[column] if column in rows.column_names else [None] * len(rows)
        texts = [str(text) if text is not None else "" for text in given]
        if column == "name":
            texts = [text or f"row {number}" for number, text in enumerate(texts)]
        if column in rows.column_names:
            rows = rows.remove_columns(column)
        rows = rows.add_column(column, texts)  # type: ignore[call-arg]
    return rows


# ---- models ----------------------------------------------------------------------------------------------------------


def build_model(example: ExampleArguments, recipe: Recipe, train: Dataset) -> tuple[Any, Any]:
    """The preset's model with a new mask head, and its processor; with the head's parts that the flags ask for."""
    path = example.model
    if path is not None and not Path(path).is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise CheckpointError(f"--model {path!r}: no such folder, nor a model name owner/name")
    try:
        model, processor = recipe.build(train, path, example.segmenter)
    except (OSError, ValueError) as error:  # transformers' and the hub's words for files that are missing or unknown
        if isinstance(error, SegRLError):
            raise
        given = [f"--{name} {value!r}" for name in ("model", "segmenter") if (value := getattr(example, name))]
        raise CheckpointError(f"{' '.join(given) or example.preset}: {' '.join(str(error).split())}") from error
    if example.adapter is not None or example.probe is not None:
        old = detach_mask_head(model)
        assert old is not None
        config = old.to_config()
        head = MaskHead.build(
            model,
            old.segmenter,
            token_id=old.probe.token_id,
            adapter=example.adapter or config["adapter"]["type"],
            probe=example.probe or config["probe"]["type"],
            tokenizer=processor.tokenizer,
            freeze_encoder=old.freeze_encoder,
        )
        attach_mask_head(model, head)
    return model, processor


def load_run(folder: str | Path, example: ExampleArguments) -> tuple[Any, Any]:
    """Model and processor of a run, to be trained further, if they fit what the flags ask for."""
    segmenter = load_segmenter(folder, device="cpu", trainable=True)
    settings = segmenter.settings
    if settings.get("reasoning", example.reasoning) != example.reasoning:
        raise SegRLError(
            f"--model {str(folder)!r} was trained with --reasoning {settings['reasoning']}; pass the same here"
        )
    for name in ("adapter", "probe", "segmenter"):
        if getattr(example, name) is not None:
            raise SegRLError(f"--{name} belongs to stage 1; --model {str(folder)!r} has its own already, drop the flag")
    return segmenter.model, segmenter.processor


def load_segmenter(folder: str | Path, **settings: Any) -> ReasoningSegmenter:
    """The model of a run with its mask head."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"--model {str(folder)!r}: no such folder; pass the output_dir of a run")
    if not (path / "mask_head.json").is_file():
        raise CheckpointError(
            f"--model {str(folder)!r} has no mask head (no mask_head.json); train stage 1 with train_sft.py, or pass "
            "--skip_stage1 to train_grpo.py"
        )
    try:
        return ReasoningSegmenter.from_pretrained(path, **settings)
    except (OSError, ValueError) as error:
        if isinstance(error, SegRLError):
            raise
        raise CheckpointError(f"--model {str(folder)!r}: {' '.join(str(error).split())}") from error


def finished(folder: Path) -> bool:
    """Whether a stage was trained to its end and saved in `folder`."""
    return (folder / HISTORY).is_file()


# ---- the two stages --------------------------------------------------------------------------------------------------


def train_stage1(
    example: ExampleArguments, config: SegSFTConfig, recipe: Recipe, model: Any, processor: Any, rows: Dataset
) -> None:
    """SFT with dense losses (`L_S1`); the model is saved in the config's output_dir."""
    if recipe.text_warmup and example.model is None and not config.resume_from_checkpoint:
        changes = dict(recipe.text_warmup)
        if config.max_steps > 0:
            changes["max_steps"] = min(changes["max_steps"], config.max_steps)
        warmup = replace(config, **changes, save_strategy="no", eval_strategy="no")
        SegSFTTrainer(model, warmup, train_dataset=rows, processing_class=processor).train()
    trainer = SegSFTTrainer(
        model,
        config,
        train_dataset=rows,
        processing_class=processor,
        peft_config=_lora(recipe, model),
        dense_losses=_dense_losses(example),
    )
    _train(trainer, example, recipe)


def train_stage2(
    example: ExampleArguments, config: SegGRPOConfig, recipe: Recipe, model: Any, processor: Any, rows: Dataset
) -> None:
    """GRPO with mask rewards and dense losses (`L_S2`); the model is saved in the config's output_dir."""
    head = find_mask_head(model)
    assert head is not None
    assert example.rewards is not None
    head.freeze_encoder = recipe.freeze_encoder[0 if example.skip_stage1 else 1]
    trainer = SegGRPOTrainer(
        model,
        list(example.rewards),
        config,
        train_dataset=rows,
        processing_class=processor,
        peft_config=_lora(recipe, model) if example.skip_stage1 else None,
        dense_losses=_dense_losses(example),
    )
    _train(trainer, example, recipe)


def check_batches(config: SegGRPOConfig, rows: Dataset) -> None:
    """TRL drops the last, incomplete batch of questions; with fewer rows than that nothing would be trained."""
    questions = (config.generation_batch_size or 0) // (config.num_generations or 1)
    if len(rows) < questions:
        raise DataError(
            f"{len(rows)} training rows, expected at least {questions}: one batch holds that many questions "
            f"(generation_batch_size={config.generation_batch_size} / num_generations={config.num_generations}); "
            "lower --per_device_train_batch_size or add rows"
        )


def _train(trainer: Any, example: ExampleArguments, recipe: Recipe) -> None:
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    if trainer.is_world_process_zero():
        settings = {**recipe.prompt, "reasoning": example.reasoning, "max_new_tokens": recipe.max_new_tokens}
        save_settings(folder, settings)
        history: Any = [{key: _finite(value) for key, value in entry.items()} for entry in trainer.state.log_history]
        write_results(folder / HISTORY, history)  # last: `finished` looks for it
    trainer.accelerator.wait_for_everyone()


def _dense_losses(example: ExampleArguments) -> list[DenseLoss] | None:
    return [DenseLoss("dice_ce", weight=example.dense_weight)] if example.dense_weight else None


def _finite(value: Any) -> Any:
    """JSON has no NaN, which the log gives a reward that applied to no row."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


# ---- evaluation ------------------------------------------------------------------------------------------------------


def score(segmenter: ReasoningSegmenter, test: Dataset, example: DataArguments) -> tuple[dict[str, Any], Any]:
    """Summary of the model on the held-out rows, and what the contact sheet shows of it."""
    records, predictions, targets = evaluate(segmenter, test, batch_size=example.eval_batch_size)
    shown = [
        {"image": test[n]["image"], "prediction": predictions[n], "target": targets[n], "dice": records[n]["dice"]}
        for n in range(min(16, len(test)))
    ]
    return summarise(records), (records, shown)


def score_run(folder: Path, test: Dataset, example: DataArguments) -> tuple[dict[str, Any], Any]:
    """`score` of a run, loaded afresh, on the device that was trained on."""
    return score(load_segmenter(folder, device=str(PartialState().device)), test, example)


def baseline(train: Dataset, test: Dataset) -> dict[str, Any]:
    """Summary of the best constant mask."""
    return summarise(evaluate_constant_mask(train, test))


def report(folder: Path, results: dict[str, Any], evaluated: Any) -> None:
    """`results.json`, `predictions.json`, `predictions.png`, and the table."""
    records, shown = evaluated
    results["versions"] = versions()
    write_results(folder / "results.json", results)
    write_results(folder / "predictions.json", records)
    contact_sheet(shown, folder / "predictions.png")
    results_table(results)
    print(f"Written to {folder}: results.json, predictions.json, predictions.png")
