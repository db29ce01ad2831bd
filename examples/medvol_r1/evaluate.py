"""Evaluate a trained run, beside the ceiling of its frozen segmenter (true boxes on the best slice).

python examples/medvol_r1/evaluate.py --model runs/medvol_r1 --data path/to/folder
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import EvaluateArguments
from recipes import find_recipe
from stages import drawer, load_rows, load_run, or_synthetic, oracle, report, score

from segrl.errors import SegRLError
from segrl.scripts import Parser, check_numbers, check_output, claim_output, run_script


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Everything that can be wrong is found here, before anything is written; returns the work."""
    (arguments,) = Parser(EvaluateArguments, description="Evaluate a run of the MedVol-R1 example.").read(argv)
    check_numbers(arguments, {"pictures": 0})
    recipe = find_recipe(arguments.preset)
    if arguments.model is None:
        raise SegRLError("--model is missing: pass the folder of a run, such as runs/medvol_r1")
    folder = Path(arguments.output_dir or Path(arguments.model) / "evaluation")
    check_output(folder, overwrite=arguments.overwrite, inputs=arguments.inputs())
    rows = load_rows(arguments, recipe, arguments.seed, arguments.split, folder)
    trained = load_run(arguments.model, device=str(PartialState().device), segmenter=arguments.segmenter)
    if trained.segmenter is None:
        raise SegRLError(f"--model {arguments.model!r} has no segmenter; pass --segmenter with SAM 2 weights")

    def work() -> None:
        claim_output(folder, asdict(arguments))
        held_out = or_synthetic(rows, arguments, recipe, arguments.seed, arguments.split, folder)
        results: dict[str, Any] = {"config": asdict(arguments)}
        assert trained.segmenter is not None
        results["oracle"] = oracle(trained.segmenter, trained.settings.get("postprocessing", True), held_out, arguments)
        results["model"], records = score(trained, held_out, arguments, drawer(folder, arguments.pictures))
        report(folder, results, records)

    return work


if __name__ == "__main__":
    run_script(check)
