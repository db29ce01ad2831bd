"""CORE-Seg stage 1: supervised fine-tuning with DiceCE on the masks (`L_S1`).

accelerate launch examples/core_seg/train_sft.py --output_dir runs/core_seg_sft
accelerate launch examples/core_seg/train_sft.py --preset core_seg_3b --data path/to/folder --output_dir runs/3b_sft
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from arguments import read
from recipes import find_recipe, rows_for
from stages import baseline, build_model, load_rows, report, score_run, train_stage1

from segrl import SegSFTConfig
from segrl.errors import SegRLError
from segrl.scripts import check_output, claim_output, run_script


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Everything that can be wrong is found here, before anything is written; returns the work."""
    example, config, given = read(SegSFTConfig, "sft", "runs/core_seg_sft", argv)
    for name in ("skip_stage1", "rewards", "sft_max_steps", "sft_learning_rate"):
        if name in given:
            raise SegRLError(f"--{name} is for train_grpo.py; drop it")
    recipe = find_recipe(example.preset)
    folder = Path(config.output_dir)
    config.resume_from_checkpoint = check_output(
        folder, overwrite=example.overwrite, resume=config.resume_from_checkpoint, inputs=example.inputs()
    )
    train, test = (load_rows(example, recipe, config.seed, split) for split in ("train", "test"))
    model, processor = build_model(example, recipe, train)
    rows = rows_for(train, processor, recipe, completions=True, reasoning=example.reasoning)

    def work() -> None:
        claim_output(folder, asdict(example), config.resume_from_checkpoint)
        train_stage1(example, config, recipe, model, processor, rows)
        if PartialState().is_main_process:
            summary, evaluated = score_run(folder, test, example)
            settings = {**asdict(example), "sft": config.to_dict()}
            report(folder, {"baseline": baseline(train, test), "stage1": summary, "config": settings}, evaluated)

    return work


if __name__ == "__main__":
    run_script(check)
