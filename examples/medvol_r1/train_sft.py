"""MedVol-R1 stage 1: supervised fine-tuning on key slices and boxes.

accelerate launch examples/medvol_r1/train_sft.py --output_dir runs/medvol_r1_sft
accelerate launch examples/medvol_r1/train_sft.py --preset medvol_r1_4b --data path/to/folder --output_dir runs/4b_sft
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import read
from recipes import find_recipe
from stages import (
    build_model,
    drawer,
    find_segmenter,
    load_rows,
    load_run,
    or_synthetic,
    oracle,
    ready_segmenter,
    report,
    score,
    stage1_rows,
    train_stage1,
)

from segrl import SegSFTConfig
from segrl.errors import SegRLError
from segrl.scripts import check_output, claim_output, run_script

PICTURES = 8


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Everything that can be wrong is found here, before anything is written; returns the work."""
    example, config, given = read(SegSFTConfig, "sft", "runs/medvol_r1_sft", argv)
    for name in ("skip_stage1", "rewards", "without", "reach", "sft_max_steps", "sft_learning_rate"):
        if name in given:
            raise SegRLError(f"--{name} is for train_grpo.py; drop it")
    recipe = find_recipe(example.preset)
    if example.key_slices is not None:
        recipe = replace(recipe, targets={**recipe.targets, "top_k": example.key_slices})
    folder = Path(config.output_dir)
    config.resume_from_checkpoint = check_output(
        folder, overwrite=example.overwrite, resume=config.resume_from_checkpoint, inputs=example.inputs()
    )
    train, test = (load_rows(example, recipe, config.seed, split, folder) for split in ("train", "test"))
    found = find_segmenter(example, recipe, None, config.resume_from_checkpoint)

    def work() -> None:
        claim_output(folder, asdict(example), config.resume_from_checkpoint)
        rows = or_synthetic(train, example, recipe, config.seed, "train", folder)
        held_out = or_synthetic(test, example, recipe, config.seed, "test", folder)
        segmenter = ready_segmenter(found, example, recipe, rows, config.seed, folder)
        model, processor = build_model(example, recipe, rows, config.seed)
        answers = stage1_rows(example, recipe, rows, processor)
        train_stage1(example, config, recipe, model, processor, answers)
        if PartialState().is_main_process:
            device = str(PartialState().device)
            results: dict[str, Any] = {"config": {**asdict(example), "sft": config.to_dict()}}
            results["oracle"] = oracle(segmenter.to(device), recipe.postprocessing, held_out, example)
            trained = load_run(folder, device=device, segmenter=segmenter)
            results["stage1"], records = score(trained, held_out, example, drawer(folder, PICTURES))
            report(folder, results, records)

    return work


if __name__ == "__main__":
    run_script(check)
