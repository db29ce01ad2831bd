"""The steps that the three scripts of this example share: data, models, the two stages, evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import ExampleArguments
from datasets import Dataset
from recipes import Recipe

from segrl import DenseLoss, ReasoningSegmenter, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.data import load_split, make_synthetic
from segrl.errors import CheckpointError, SegRLError
from segrl.evaluation import evaluate, evaluate_constant_mask
from segrl.heads import MaskHead, attach_mask_head, detach_mask_head, find_mask_head
from segrl.hub import check_source, reraise_as
from segrl.metrics import summarise
from segrl.models import language_model_lora
from segrl.reports import contact_sheet, results_table, versions, write_results
from segrl.scripts import RunArguments, train_and_save

# ---- data ------------------------------------------------------------------------------------------------------------


def load_rows(example: RunArguments, recipe: Recipe, seed: int, split: str) -> Dataset:
    """One split, `train` or `test`, checked in full; synthetic lesions without `--data`."""
    if example.data is None:
        size = recipe.synthetic
        rows = make_synthetic(size[split], size=size["size"], seed=seed + (split == "test"))
    else:
        rows = load_split(example.data, split)
    return example.limited(rows, split)


# ---- models ----------------------------------------------------------------------------------------------------------


def build_model(example: ExampleArguments, recipe: Recipe, train: Dataset) -> tuple[Any, Any]:
    """The preset's model with a new mask head, and its processor; with the head's parts that the flags ask for."""
    if example.model is not None:
        check_source("--model", example.model, "model", CheckpointError)
    given = [f"--{name} {value!r}" for name in ("model", "segmenter") if (value := getattr(example, name))]
    with reraise_as(" ".join(given) or example.preset, CheckpointError):
        model, processor = recipe.build(train, example.model, example.segmenter)
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
    with reraise_as(f"--model {str(folder)!r}", CheckpointError):
        return ReasoningSegmenter.from_pretrained(path, **settings)


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
    train_and_save(trainer, _settings(example, recipe))


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
    train_and_save(trainer, _settings(example, recipe))


def _settings(example: ExampleArguments, recipe: Recipe) -> dict[str, Any]:
    """How the trained model is asked."""
    return {**recipe.prompt, "reasoning": example.reasoning, "max_new_tokens": recipe.max_new_tokens}


def _dense_losses(example: ExampleArguments) -> list[DenseLoss] | None:
    return [DenseLoss("dice_ce", weight=example.dense_weight)] if example.dense_weight else None


def _lora(recipe: Recipe, model: Any) -> Any:
    head = find_mask_head(model)
    assert head is not None
    return recipe.lora and language_model_lora(model, tokens=[head.probe.token_id], **recipe.lora)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def score(segmenter: ReasoningSegmenter, test: Dataset, example: RunArguments) -> tuple[dict[str, Any], Any]:
    """Summary of the model on the held-out rows, and what the contact sheet shows of it."""
    records, predictions, targets = evaluate(segmenter, test, batch_size=example.eval_batch_size)
    shown = [
        {"image": test[n]["image"], "prediction": predictions[n], "target": targets[n], "dice": records[n]["dice"]}
        for n in range(min(16, len(test)))
    ]
    return summarise(records), (records, shown)


def score_run(folder: Path, test: Dataset, example: RunArguments) -> tuple[dict[str, Any], Any]:
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
