"""The steps that the scripts of this example share: data, models, the segmenter, the two stages, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from arguments import ExampleArguments
from datasets import Dataset
from recipes import Recipe, rows_for
from segmenter import lesions_of, train_segmenter
from warmup import add_reasoning, pretrain_vision

from segrl import SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer, make_reward
from segrl.caching import FeatureCache
from segrl.data import check_volumes, load_m3d_seg, load_volumes, make_synthetic_volumes, read_label, uniform_slices
from segrl.data.splits import load_split
from segrl.errors import CheckpointError, DataError, SegRLError, unknown_name
from segrl.evaluation import VOLUME_GROUPINGS, evaluate_oracle_boxes, evaluate_volumes, summarise_volumes
from segrl.hub import check_source, reraise_as
from segrl.inference import VolumeSegmenter
from segrl.metrics import paired_bootstrap_ci
from segrl.models import language_model_lora, load_vlm
from segrl.reports import results_table, versions, volume_picture, write_results
from segrl.reports.table import VOLUME_COLUMNS, VOLUME_STAGES
from segrl.scripts import RunArguments, train_and_save
from segrl.segmenters import Sam2Segmenter, VolumePropagator
from segrl.segmenters.sam2 import SEGMENTER_CONFIG

SYNTHETIC = {"train": 0, "test": 1, "segmenter": 2}  # seeds of the splits, apart from the run's

# ---- data ------------------------------------------------------------------------------------------------------------


def load_rows(example: Any, recipe: Recipe, seed: int, split: str, folder: Path) -> Dataset | None:
    """One split of `--data`, checked in full; None stands for synthetic volumes, made when the work starts."""
    if example.m3d_seg is not None and example.data is None:
        raise SegRLError(f"--m3d_seg {example.m3d_seg}: pass --data with the folder of M3D-Seg too")
    if example.data is None:
        if split not in ("train", "test"):
            raise unknown_name("split of the synthetic volumes", split, ("train", "test"))
        return None
    if example.m3d_seg is not None:
        return example.limited(load_m3d_seg(example.data, example.m3d_seg, split), split)
    rows = load_split(example.data, split, folder=load_volumes, check=check_volumes)
    for column, default in (("label_value", 0), ("intensity", "")):  # a data set on disk need not have them
        if column not in rows.column_names:
            rows = rows.add_column(column, [default] * len(rows))  # type: ignore[call-arg]
    return example.limited(rows, split)


def count_synthetic(example: RunArguments, recipe: Recipe, split: str) -> int:
    """How many synthetic volumes a split has; those that a flag leaves out are not made."""
    limit = example.eval_limit if split == "test" else example.train_limit
    return min(recipe.synthetic[split], limit or recipe.synthetic[split])


def or_synthetic(
    rows: Dataset | None, example: RunArguments, recipe: Recipe, seed: int, split: str, folder: Path
) -> Dataset:
    """The rows of `load_rows`, or synthetic volumes, whose files are written into the run's folder."""
    if rows is not None:
        return rows
    size = recipe.synthetic
    with PartialState().main_process_first():
        return make_synthetic_volumes(
            count_synthetic(example, recipe, split), folder / "data" / split,
            depth=size["depth"], size=size["size"], seed=3 * seed + SYNTHETIC[split],
            distractors=recipe.distractors,
        )  # fmt: skip


# ---- models ----------------------------------------------------------------------------------------------------------


def build_model(example: ExampleArguments, recipe: Recipe, train: Dataset, seed: int) -> tuple[Any, Any]:
    """The preset's model and its processor; a model with random weights learns to see first."""
    if example.model is not None:
        check_source("--model", example.model, "model", CheckpointError)
    torch.manual_seed(seed)  # for random weights, here and in the warm-up
    with reraise_as(f"--model {example.model!r}" if example.model else example.preset, CheckpointError):
        model, processor = recipe.build(train, example.model)
    if recipe.vision_warmup is not None and example.model is None and not example.skip_stage1:
        settings = dict(recipe.vision_warmup)
        settings["steps"] = min(settings["steps"], example.pretrain_steps or settings["steps"])
        right = pretrain_vision(model, processor, train, size=recipe.prompt["size"], seed=seed, **settings)
        if PartialState().is_main_process:
            print(f"vision tower: tells the presence of a lesion on {right:.1%} of held-out slices", flush=True)
    return model, processor


def saved_first(folder: Path, model: Any, processor: Any) -> tuple[Any, Any]:
    """The same model, loaded from a folder if it came from none: TRL loads the reference of GRPO's KL term again."""
    if model.config._name_or_path:
        return model, processor
    if PartialState().is_main_process:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    PartialState().wait_for_everyone()
    return load_vlm(str(folder))


def stage1_rows(example: ExampleArguments, recipe: Recipe, train: Dataset, processor: Any) -> Dataset:
    """Rows with prompts and answers for stage 1.

    A small lesion may lie between the slices that are shown: no answer can name it, so that row is left out.

    Raises:
        DataError: No row is left.
    """
    masks = (read_label(row["label"], None, row["label_value"], allow_empty=True) for row in map(dict, train))  # type: ignore[call-overload]
    seen = [n for n, mask in enumerate(masks) if mask[uniform_slices(len(mask), recipe.prompt["slices"])].any()]
    if not seen:
        raise DataError(f"no lesion of {len(train)} rows is on one of the {recipe.prompt['slices']} slices shown")
    if len(seen) < len(train) and PartialState().is_main_process:
        print(f"stage 1: {len(train) - len(seen)} of {len(train)} rows left out, no slice shown has the lesion")
    train = train.select(seen)
    if recipe.vision_warmup is not None and example.reasoning and "reasoning" not in train.column_names:
        train = add_reasoning(train, recipe.prompt["slices"])
    return rows_for(train, processor, recipe, completions=True, reasoning=example.reasoning)


def load_run(
    folder: str | Path, *, segmenter: Sam2Segmenter | str | None = None, trainable: bool = False, **settings: Any
) -> VolumeSegmenter:
    """The model of a run, with its segmenter if the run has one, or another; weights in a file are read as its own."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"--model {str(folder)!r}: no such folder; pass the output_dir of a run")
    if not ((path / "config.json").is_file() or (path / "adapter_config.json").is_file()):
        raise CheckpointError(f"--model {str(folder)!r} holds no model; pass the output_dir of a finished run")
    with reraise_as(f"--model {str(folder)!r}", CheckpointError):
        loaded = VolumeSegmenter.from_pretrained(
            path, segmenter=None if isinstance(segmenter, str) else segmenter, trainable=trainable, **settings
        )
    if not isinstance(segmenter, str):
        return loaded
    with reraise_as(f"--segmenter {segmenter!r}", CheckpointError):
        other = Sam2Segmenter.from_pretrained(segmenter, loaded.segmenter and loaded.segmenter.config)
    return VolumeSegmenter(loaded.model, loaded.processor, loaded.settings, other.to(loaded.model.device))


def load_stage1(folder: Path, example: ExampleArguments, recipe: Recipe) -> VolumeSegmenter:
    """A run of stage 1, to be trained further, if it was asked the way that it will be asked now."""
    loaded = load_run(folder, trainable=True, device="cpu")
    for name, value in {"reasoning": example.reasoning, **recipe.prompt}.items():
        if (was := loaded.settings.get(name, value)) != value:
            flag = f"--{name}" if name in ("reasoning", "frame_kind") else "--preset"
            raise SegRLError(
                f"--model {str(folder)!r} was trained with {name} {was!r:.80}, here it is {value!r:.80}; pass "
                f"the {flag} that it was trained with"
            )
    return loaded


def find_segmenter(
    example: ExampleArguments, recipe: Recipe, stage1: Path | None, checkpoint: str | None
) -> Sam2Segmenter | None:
    """The frozen segmenter: of `--segmenter`, of the run to go on with, or the preset's; None is yet to be trained."""
    path = example.segmenter
    homes = [Path(checkpoint).parent] if checkpoint else []
    homes += [stage1, stage1.parent] if stage1 is not None else []
    if path is None:
        path = next((str(home) for home in homes if (home / SEGMENTER_CONFIG).is_file()), None)
    if path is None and recipe.segmenter_training is not None:
        return None
    with reraise_as(f"--segmenter {path!r}" if path else example.preset, CheckpointError):
        return recipe.segmenter(path)


def ready_segmenter(
    found: Sam2Segmenter | None, example: ExampleArguments, recipe: Recipe, train: Dataset, seed: int, folder: Path
) -> Sam2Segmenter:
    """The frozen segmenter, trained first where it has no weights, and saved in the run's folder."""
    state = PartialState()
    if found is None:
        settings = dict(recipe.segmenter_training or {})
        if example.segmenter_steps is not None:
            settings["steps"] = example.segmenter_steps
        elif example.pretrain_steps is not None:
            settings["steps"] = min(settings["steps"], example.pretrain_steps)
        rows = or_synthetic(None, example, recipe, seed, "segmenter", folder)  # all processes meet in it
        if state.is_main_process:
            torch.manual_seed(seed)
            found = recipe.segmenter(None)
            more = train if example.data is not None else ()
            losses = train_segmenter(found, lesions_of([*rows, *more]), seed=seed, **settings)
            last = losses[-min(20, len(losses)) :]
            print(f"segmenter: {len(losses)} steps, loss {losses[0]:.2f} to {sum(last) / len(last):.2f}", flush=True)
    if state.is_main_process and found is not None:
        found.save_pretrained(folder)
    state.wait_for_everyone()
    segmenter = found if found is not None else Sam2Segmenter.from_pretrained(folder)
    segmenter.requires_grad_(False)
    return segmenter


# ---- the two stages --------------------------------------------------------------------------------------------------


def train_stage1(
    example: ExampleArguments, config: SegSFTConfig, recipe: Recipe, model: Any, processor: Any, rows: Dataset
) -> None:
    """Supervised fine-tuning on slices and boxes; the model is saved in the config's output_dir."""
    _freeze_vision(example, recipe, model)
    trainer = SegSFTTrainer(
        model, config, train_dataset=rows, processing_class=processor, peft_config=_lora(recipe, model)
    )
    train_and_save(trainer, settings_of(example, recipe))


def rewards_of(example: ExampleArguments) -> list[Any]:
    """The rewards that were asked for; those of the paper read masks as far as `--reach` goes."""
    made = []
    for name in example.rewards or ():
        within = {"delta": example.reach} if name in ("propagated_dice", "medvol_r1") else {}
        made.append(make_reward(name, **within))
    return made


def train_stage2(
    example: ExampleArguments,
    config: SegGRPOConfig,
    recipe: Recipe,
    model: Any,
    processor: Any,
    rows: Dataset,
    segmenter: Sam2Segmenter,
) -> int:
    """GRPO; the model is saved in the config's output_dir. Returns how many slices the segmenter has encoded."""
    _freeze_vision(example, recipe, model)
    rewards = rewards_of(example)
    cache = FeatureCache(config.feature_cache_memory, config.feature_cache_dir, config.feature_cache_disk)
    propagator = VolumePropagator(segmenter, reach=example.reach, cache=cache, postprocessing=recipe.postprocessing)
    trainer = SegGRPOTrainer(
        model,
        rewards,
        config,
        train_dataset=rows,
        processing_class=processor,
        peft_config=_lora(recipe, model) if example.skip_stage1 else None,
        propagator=propagator if any(reward.needs_mask for reward in rewards) else None,
    )
    train_and_save(trainer, settings_of(example, recipe))
    return propagator.encoded_slices


def settings_of(example: ExampleArguments, recipe: Recipe) -> dict[str, Any]:
    """How the trained model is asked."""
    own = {
        "reasoning": example.reasoning,
        "max_new_tokens": recipe.max_new_tokens,
        "postprocessing": recipe.postprocessing,
    }
    return {**recipe.prompt, **own}


def _freeze_vision(example: ExampleArguments, recipe: Recipe, model: Any) -> None:
    """A tower that has learned to see is left alone: from words it forgets more than it learns (docs/log.md)."""
    if recipe.vision_warmup is not None and not example.skip_stage1:
        model.model.visual.requires_grad_(False)


def _lora(recipe: Recipe, model: Any) -> Any:
    return recipe.lora and language_model_lora(model, **recipe.lora)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def score(
    segmenter: VolumeSegmenter, test: Dataset, example: RunArguments, draw: Any = None
) -> tuple[dict[str, Any], Any]:
    """Summary of the model on the held-out volumes, and its records."""
    records = evaluate_volumes(segmenter, test, batch_size=example.eval_batch_size, on_answer=draw)
    return summarise_volumes(records), records


def oracle(segmenter: Sam2Segmenter, postprocessing: bool, test: Dataset, example: RunArguments) -> dict[str, Any]:
    """Summary of the frozen segmenter, prompted with the true boxes on the best slice: its ceiling."""
    propagator = VolumePropagator(segmenter, reach=None, postprocessing=postprocessing)
    return summarise_volumes(evaluate_oracle_boxes(propagator, test, batch_size=example.eval_batch_size))


def drawer(folder: Path, most: int) -> Callable[..., None]:
    """Draws a picture of each of the first volumes into `folder / "pictures"`."""

    def draw(number: int, grey: Any, prediction: Any, target: Any) -> None:
        if number < most:
            path = folder / "pictures" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            volume_picture(grey, prediction, target, path, spacing_mm=target.spacing_mm, query=target.query)

    return draw


def gain(after: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean difference of each score over the same volumes, with its paired 95 % bootstrap interval."""
    found = {}
    for name in ("dice", "slice_visibility", "slice_boxes"):
        new, old = (np.array([record[name] for record in records], dtype=float) for records in (after, before))
        found[name] = [float((new - old).mean()), *paired_bootstrap_ci(new, old)]
    return found


def report(folder: Path, results: dict[str, Any], records: Any) -> None:
    """`results.json`, `predictions.json`, and the table."""
    results["versions"] = versions()
    write_results(folder / "results.json", results)
    write_results(folder / "predictions.json", records)
    for name, (mean, low, high) in results.get("gain", {}).items():
        print(
            f"stage 2 - stage 1, {name}: {100 * mean:+.1f} points, 95 % interval [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    results_table(results, columns=VOLUME_COLUMNS, stages=VOLUME_STAGES, groupings=VOLUME_GROUPINGS)
    print(f"Written to {folder}: results.json, predictions.json, pictures/")
