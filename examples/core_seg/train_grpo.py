"""CORE-Seg, the main job: stage 1 (unless `--model` names one), then stage 2 (GRPO with mask rewards and DiceCE,
`L_S2`).

accelerate launch examples/core_seg/train_grpo.py                                  # tiny preset, synthetic lesions
accelerate launch examples/core_seg/train_grpo.py --data path/to/folder --output_dir runs/mine
accelerate launch examples/core_seg/train_grpo.py --model runs/core_seg_sft --rewards format box_f1
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import ExampleArguments, parse, run
from recipes import Recipe, find_recipe, rows_for
from stages import (
    MARKER,
    baseline,
    build_model,
    check_batches,
    check_output,
    claim,
    finished,
    load_data,
    load_run,
    report,
    score_run,
    train_stage1,
    train_stage2,
)
from trl.import_utils import is_vllm_available

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.errors import SegRLError

# flags of the machine rather than of the method: given to this script, they hold for its stage 1 too
SHARED = (
    *("seed", "data_seed", "use_cpu", "bf16", "fp16", "tf32", "gradient_checkpointing", "activation_checkpointing"),
    *("optim", "deepspeed", "fsdp", "fsdp_config", "ddp_backend", "dataloader_num_workers", "dataloader_pin_memory"),
    *("disable_tqdm", "report_to", "logging_steps"),
)


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Everything that can be wrong is found here, before anything is written; returns the work."""
    example, config, given = parse(SegGRPOConfig, "grpo", "runs/core_seg", argv)
    if config.use_vllm and not is_vllm_available():
        raise SegRLError("--use_vllm: vLLM is not installed; pip install 'trl[vllm]', or drop the flag")
    recipe = find_recipe(example.preset)
    if config.frame_kind is not None:
        recipe = replace(recipe, prompt={**recipe.prompt, "frame_kind": config.frame_kind})
    config.frame_kind = recipe.prompt.get("frame_kind")
    config.require_reasoning = example.reasoning
    folder = Path(config.output_dir)
    config.resume_from_checkpoint = check_output(folder, example, config.resume_from_checkpoint)
    train, test = load_data(example, recipe, config.seed)
    stage1 = find_stage1(example, config)
    settings = {**asdict(example), "grpo": config.to_dict()}

    def rows_of(processor: Any, completions: bool) -> Any:
        rows = rows_for(train, processor, recipe, completions=completions, reasoning=example.reasoning)
        if not completions:
            check_batches(config, rows)
        return rows

    if example.skip_stage1 or stage1 is not None:
        first = None
        model, processor = build_model(example, recipe, train) if stage1 is None else load_run(stage1, example)
        rows = rows_of(processor, completions=False)
    else:
        stage1 = folder / "stage1"
        first = stage1_config(stage1, example, config, recipe, given)
        settings["sft"] = first.to_dict()
        model, processor = build_model(example, recipe, train)
        rows = rows_of(processor, completions=True)
        check_batches(config, rows)

    def work() -> None:
        nonlocal model, processor, rows
        claim(folder, example, config.resume_from_checkpoint)
        if first is not None:
            train_stage1(example, first, recipe, model, processor, rows)
            model, processor = load_run(folder / "stage1", replace(example, adapter=None, probe=None, segmenter=None))
            rows = rows_of(processor, completions=False)
        train_stage2(example, config, recipe, model, processor, rows)
        if PartialState().is_main_process:
            results: dict[str, Any] = {"baseline": baseline(train, test), "config": settings}
            if stage1 is not None:
                results["stage1"], _ = score_run(stage1, test, example)
            results["stage2"], evaluated = score_run(folder, test, example)
            report(folder, results, evaluated)

    return work


def find_stage1(example: ExampleArguments, config: SegGRPOConfig) -> Path | None:
    """The stage 1 run to start from; None if there is none yet, or if it is skipped."""
    if example.skip_stage1:
        return None
    if example.model is not None:
        return Path(example.model)
    if config.resume_from_checkpoint is None:
        return None
    folder = Path(config.resume_from_checkpoint).parent
    if finished(folder / "stage1"):
        return folder / "stage1"
    was = "..."
    if (folder / MARKER).is_file():
        was = json.loads((folder / MARKER).read_text(encoding="utf-8"))["arguments"].get("model") or was
    raise SegRLError(
        f"--resume_from_checkpoint: {str(folder)!r} holds no stage 1; pass --model {was} or --skip_stage1, "
        "whichever the run began with"
    )


def stage1_config(
    folder: Path, example: ExampleArguments, config: SegGRPOConfig, recipe: Recipe, given: set[str]
) -> SegSFTConfig:
    """The preset's stage 1, with what the command line says about it."""
    settings = {**recipe.sft, "output_dir": str(folder), "seed": config.seed}
    settings |= {name: getattr(config, name) for name in SHARED if name in given}
    if example.sft_learning_rate is not None:
        settings["learning_rate"] = example.sft_learning_rate
    if example.sft_max_steps is not None:
        settings["max_steps"] = example.sft_max_steps
    elif "max_steps" in given and config.max_steps > 0:
        preset = settings.get("max_steps", -1)
        settings["max_steps"] = min(preset, config.max_steps) if preset > 0 else config.max_steps
    return SegSFTConfig(**settings)


if __name__ == "__main__":
    run(check)
