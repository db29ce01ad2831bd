"""CORE-Seg stage 1: supervised fine-tuning with DiceCE on the masks (`L_S1`).

accelerate launch examples/core_seg/train_sft.py --output_dir runs/core_seg_sft
accelerate launch examples/core_seg/train_sft.py --preset core_seg_3b --data path/to/folder --output_dir runs/3b_sft
"""

from pathlib import Path

from recipes import find_recipe
from stages import baseline, claim, load_data, main_process, parse, report, run, score, train_stage1

from segrl import SegSFTConfig


def main() -> None:
    example, config = parse(SegSFTConfig, "sft", "runs/core_seg_sft")
    recipe = find_recipe(example.preset)
    folder = Path(config.output_dir)
    claim(folder, example, config.resume_from_checkpoint)
    train, test = load_data(example, recipe, config.seed)
    train_stage1(example, config, recipe, train)
    if main_process():
        summary, evaluated = score(folder, test, example)
        results = {
            "baseline": baseline(train, test),
            "stage1": summary,
            "config": {**vars(example), "sft": config.to_dict()},
        }
        report(folder, results, evaluated)


if __name__ == "__main__":
    run(main)
