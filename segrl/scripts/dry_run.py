"""`--dry_run`: the plan of a run, printed; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model

from segrl.heads.attach import attach_mask_head, detach_mask_head
from segrl.reports.terminal import say
from segrl.scripts.memory import estimate_memory, read_sizes

__all__ = ["describe_run", "prompt_lengths"]

_LOOKED_AT = 32  # rows whose prompts are measured


def describe_run(run: Any, configs: Mapping[str, Any], ready: Any) -> None:
    """Print rows, phases, lengths of prompts, and an estimate of the memory that each stage takes.

    Args:
        run: A `TwoStageRun` whose checks have passed.
        configs: Settings of the trainer of each stage, by the name of its phase.
        ready: Model, processor and prepared rows of the first stage; None if its data is made when the run begins.
    """
    if not PartialState().is_main_process:
        return
    say(f"dry run of {run.name}, preset {run.arguments.preset}; nothing is written, {run.folder} neither")
    names = {"train": "training", "val": "validation", "test": "test"}
    counts = {split: run.count(split) for split in names if split in run.rows}
    if "val" not in counts and run.arguments.val_fraction is not None:
        counts["val"] = counts["train"] - run.trained_rows()
        counts["train"] = run.trained_rows()
    rows = ", ".join(f"{counts[split]} {name}" for split, name in names.items() if split in counts)
    few = f", stage 1 on {run.written()} of them" if "stage 1" in configs and run.written() < run.views() else ""
    say(f"rows: {rows}; {run.views()} are trained on with all copies{few}")
    for name, config in configs.items():
        say(f"{name}: {_steps(run, config)}")
    cost = sum(run.phases.plan.values())
    shares = ", ".join(f"{name} {100 * value / cost:.0f} %" for name, value in run.phases.plan.items())
    say(f"estimated shares of the time: {shares}")
    if ready is None:
        say("prompts and memory: not known before the data is made, when the run begins")
        return
    model, processor, prepared = ready
    lengths = prompt_lengths(prepared, processor)
    say(f"prompts: {min(lengths)} to {max(lengths)} tokens with images (of {len(lengths)} rows)")
    for name, config in configs.items():
        answer = _answer_length(prepared, processor) if name == "stage 1" else config.max_completion_length
        written = "longest reference answer" if name == "stage 1" else "longest answer (max_completion_length)"
        model = _as_trained(run, model)
        shares = getattr(config, "share_prompt", None) is not False
        sizes = read_sizes(model, config, prompt=max(lengths), answer=answer, shares_prompt=shares)
        say(f"{name}: {written} {answer} tokens; memory on a GPU {estimate_memory(sizes).text()}")
    kept = next(iter(configs.values())).feature_cache_memory
    say(f"not in it: libraries (about 1 GB), features of frozen encoders (up to {kept / 1e9:.1f} GB), other processes")


def prompt_lengths(rows: Dataset, processor: Any) -> list[int]:
    """Return the tokens of the prompts of some rows, images included.

    Args:
        rows: With `prompt`, and `image` or `images`; spread evenly, at most 32 are measured.
        processor: Of the model.

    Example:
        >>> from segrl.data import make_synthetic, prepare
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> _, processor = tiny_qwen2_5_vl()
        >>> rows = prepare(make_synthetic(2, size=56), processor, completions=False)
        >>> [length > 4 for length in prompt_lengths(rows, processor)]
        [True, True]
    """
    step = max(1, len(rows) // _LOOKED_AT)
    found = []
    for number in range(0, len(rows), step)[:_LOOKED_AT]:
        row = dict(rows[number])
        images = row["images"] if row.get("images") else [row["image"]]
        content = [*({"type": "image", "image": image} for image in images), *_texts(row["prompt"])]
        batch = processor.apply_chat_template(
            [[{"role": "user", "content": content}]], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        found.append(len(batch["input_ids"][0]))
    return found


def _texts(messages: Any) -> list[dict[str, str]]:
    contents = [message["content"] for message in messages]
    blocks = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in contents]
    return [{"type": "text", "text": block["text"]} for part in blocks for block in part if block.get("text")]


def _answer_length(rows: Dataset, processor: Any) -> int:
    if "completion" not in rows.column_names:
        return 0
    few = rows.select(range(0, len(rows), max(1, len(rows) // _LOOKED_AT)))["completion"]
    texts = ["".join(block["text"] for block in _texts(completion)) for completion in few]
    return max(len(ids) for ids in processor.tokenizer(texts)["input_ids"]) + 1


def _steps(run: Any, config: Any) -> str:
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * PartialState().num_processes
    what = "answers" if hasattr(config, "num_generations") else "rows"
    said = f"{run.steps(config)} steps of {batch} {what}"
    return said if config.max_steps > 0 else f"{said}, {config.num_train_epochs:g} epochs"


def _as_trained(run: Any, model: Any) -> Any:
    """The model with the adapters that training would add; the mask head stays as it is."""
    lora = run.adapters(model)
    if lora is None or hasattr(model, "peft_config"):
        return model
    head = detach_mask_head(model)
    with torch.no_grad():
        model = get_peft_model(model, lora)
    return model if head is None else attach_mask_head(model, head)
