"""CORE-Seg, the main job: stage 1 (unless `--model` names one), then stage 2 (GRPO with mask rewards and DiceCE,
`L_S2`).

accelerate launch examples/core_seg/train_grpo.py                                  # tiny preset, synthetic lesions
accelerate launch examples/core_seg/train_grpo.py --data path/to/folder --output_dir runs/mine
accelerate launch examples/core_seg/train_grpo.py --model runs/core_seg_sft --rewards format box_f1
"""

import sys
from pathlib import Path

from recipes import find_recipe
from stages import baseline, claim, load_data, main_process, parse, report, run, score, train_stage1, train_stage2

from segrl import SegGRPOConfig, SegSFTConfig


def main() -> None:
    example, config = parse(SegGRPOConfig, "grpo", "runs/core_seg")
    recipe = find_recipe(example.preset)
    folder = Path(config.output_dir)
    claim(folder, example, config.resume_from_checkpoint)
    train, test = load_data(example, recipe, config.seed)
    if example.model is not None:
        stage1 = Path(example.model)
    elif config.resume_from_checkpoint and (folder / "stage1").is_dir():
        stage1 = folder / "stage1"
    else:
        settings = {**recipe.sft, "output_dir": str(folder / "stage1"), "seed": config.seed, "use_cpu": config.use_cpu}
        settings["disable_tqdm"] = config.disable_tqdm
        if example.sft_learning_rate is not None:
            settings["learning_rate"] = example.sft_learning_rate
        if example.sft_max_steps is not None:
            settings["max_steps"] = example.sft_max_steps
        elif any(argument.split("=")[0] == "--max_steps" for argument in sys.argv):
            settings["max_steps"] = min(settings.get("max_steps", config.max_steps), config.max_steps)
        stage1 = train_stage1(example, SegSFTConfig(**settings), recipe, train)
    train_stage2(example, config, recipe, train, stage1)
    if main_process():
        first, _ = score(stage1, test, example)
        second, evaluated = score(folder, test, example)
        results = {
            "baseline": baseline(train, test),
            "stage1": first,
            "stage2": second,
            "config": {**vars(example), "grpo": config.to_dict()},
        }
        report(folder, results, evaluated)


if __name__ == "__main__":
    run(main)
