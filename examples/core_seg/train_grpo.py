"""CORE-Seg, the main job: stage 1 (unless `--model` names one), then stage 2 (GRPO with mask rewards and DiceCE,
`L_S2`).

accelerate launch examples/core_seg/train_grpo.py                                  # tiny preset, synthetic lesions
accelerate launch examples/core_seg/train_grpo.py --data path/to/folder --output_dir runs/mine
accelerate launch examples/core_seg/train_grpo.py --model runs/core_seg_sft --rewards format box_f1
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import read
from recipes import find_recipe, rows_for
from stages import baseline, build_model, load_rows, load_run, report, score_run, train_stage1, train_stage2
from trl.import_utils import is_vllm_available

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.errors import SegRLError
from segrl.scripts import check_batches, check_output, claim_output, find_stage1, first_stage_settings, run_script


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Everything that can be wrong is found here, before anything is written; returns the work."""
    example, config, given = read(SegGRPOConfig, "grpo", "runs/core_seg", argv)
    if config.use_vllm and not is_vllm_available():
        raise SegRLError("--use_vllm: vLLM is not installed; pip install 'trl[vllm]', or drop the flag")
    recipe = find_recipe(example.preset)
    if config.frame_kind is not None:
        recipe = replace(recipe, prompt={**recipe.prompt, "frame_kind": config.frame_kind})
    config.frame_kind = recipe.prompt.get("frame_kind")
    config.require_reasoning = example.reasoning
    folder = Path(config.output_dir)
    config.resume_from_checkpoint = check_output(
        folder, overwrite=example.overwrite, resume=config.resume_from_checkpoint, inputs=example.inputs()
    )
    train, test = (load_rows(example, recipe, config.seed, split) for split in ("train", "test"))
    stage1 = find_stage1(example.model, config.resume_from_checkpoint, skip=example.skip_stage1)
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
        first = SegSFTConfig(**first_stage_settings(recipe.sft, config, given, example, str(stage1)))
        settings["sft"] = first.to_dict()
        model, processor = build_model(example, recipe, train)
        rows = rows_of(processor, completions=True)
        check_batches(config, rows)

    def work() -> None:
        nonlocal model, processor, rows
        claim_output(folder, asdict(example), config.resume_from_checkpoint)
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


if __name__ == "__main__":
    run_script(check)
