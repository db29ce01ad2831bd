"""MedVol-R1: the segmenter if it has no weights yet, stage 1 (unless `--model` names one), then stage 2 (GRPO).

accelerate launch examples/medvol_r1/train_grpo.py                                   # tiny preset, synthetic volumes
accelerate launch examples/medvol_r1/train_grpo.py --data path/to/folder --output_dir runs/mine
accelerate launch examples/medvol_r1/train_grpo.py --model runs/medvol_r1_sft --without propagated_dice
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import read
from recipes import find_recipe, rows_for
from stages import (
    build_model,
    count_synthetic,
    drawer,
    find_segmenter,
    gain,
    load_rows,
    load_run,
    load_stage1,
    or_synthetic,
    oracle,
    ready_segmenter,
    report,
    saved_first,
    score,
    stage1_rows,
    train_stage1,
    train_stage2,
)
from trl.import_utils import is_vllm_available

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.errors import SegRLError
from segrl.scripts import check_batches, check_output, claim_output, find_stage1, first_stage_settings, run_script

PICTURES = 8


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Everything that can be wrong is found here, before anything is written; returns the work."""
    example, config, given = read(SegGRPOConfig, "grpo", "runs/medvol_r1", argv)
    if config.use_vllm and not is_vllm_available():
        raise SegRLError("--use_vllm: vLLM is not installed; pip install 'trl[vllm]', or drop the flag")
    recipe = find_recipe(example.preset)
    if config.frame_kind is not None:
        recipe = replace(recipe, prompt={**recipe.prompt, "frame_kind": config.frame_kind})
    if example.key_slices is not None:
        recipe = replace(recipe, targets={**recipe.targets, "top_k": example.key_slices})
    config.frame_kind = recipe.prompt.get("frame_kind")
    config.require_reasoning = example.reasoning
    folder = Path(config.output_dir)
    config.resume_from_checkpoint = check_output(
        folder, overwrite=example.overwrite, resume=config.resume_from_checkpoint, inputs=example.inputs()
    )
    train, test = (load_rows(example, recipe, config.seed, split, folder) for split in ("train", "test"))
    stage1 = find_stage1(example.model, config.resume_from_checkpoint, skip=example.skip_stage1)
    started = load_stage1(stage1, example, recipe) if stage1 is not None else None
    found = find_segmenter(example, recipe, stage1, config.resume_from_checkpoint)
    settings: dict[str, Any] = {**asdict(example), "grpo": config.to_dict()}
    first = None
    if stage1 is None and not example.skip_stage1:
        first = SegSFTConfig(**first_stage_settings(recipe.sft, config, given, example, str(folder / "stage1")))
        settings["sft"] = first.to_dict()
    count = len(train) if train is not None else count_synthetic(example, recipe, "train")
    check_batches(config, range(count * recipe.copies(count)))

    def work() -> None:
        claim_output(folder, asdict(example), config.resume_from_checkpoint)
        rows = or_synthetic(train, example, recipe, config.seed, "train", folder)
        held_out = or_synthetic(test, example, recipe, config.seed, "test", folder)
        segmenter = ready_segmenter(found, example, recipe, rows, config.seed, folder)
        model, processor = (
            (started.model, started.processor)
            if started is not None
            else build_model(example, recipe, rows, config.seed)
        )
        if first is not None:
            answers = stage1_rows(example, recipe, rows, processor)
            train_stage1(example, first, recipe, model, processor, answers)
            again = load_run(folder / "stage1", trainable=True, device="cpu", segmenter=segmenter)
            model, processor = again.model, again.processor
        else:
            model, processor = saved_first(folder / "start", model, processor)
        questions = rows_for(rows, processor, recipe, completions=False)
        encoded = train_stage2(example, config, recipe, model, processor, questions, segmenter)
        if PartialState().is_main_process:
            device = str(PartialState().device)
            results: dict[str, Any] = {"config": settings, "encoded_slices": encoded}
            first_records: list[dict[str, Any]] = []
            results["oracle"] = oracle(segmenter.to(device), recipe.postprocessing, held_out, example)
            before = stage1 if stage1 is not None else folder / "stage1"
            if not example.skip_stage1:
                results["stage1"], first_records = score(
                    load_run(before, device=device, segmenter=segmenter), held_out, example
                )
            trained = load_run(folder, device=device, segmenter=segmenter)
            results["stage2"], records = score(trained, held_out, example, drawer(folder, PICTURES))
            if not example.skip_stage1:
                results["gain"] = gain(records, first_records)
            report(folder, results, records)

    return work


if __name__ == "__main__":
    run_script(check)
