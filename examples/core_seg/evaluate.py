"""Evaluate a trained run on the test split, beside the best constant mask of the training split, if there is one.

python examples/core_seg/evaluate.py --model runs/core_seg --data path/to/folder
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arguments import EvaluateArguments
from recipes import find_recipe
from stages import baseline, load_rows, load_segmenter, report, score

from segrl.errors import SegRLError, UnknownNameError
from segrl.scripts import Parser, check_numbers, check_output, claim_output, run_script


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Everything that can be wrong is found here, before anything is written; returns the work."""
    (arguments,) = Parser(EvaluateArguments, description="Evaluate a run of the CORE-Seg example.").read(argv)
    check_numbers(arguments)
    recipe = find_recipe(arguments.preset)
    if arguments.model is None:
        raise SegRLError("--model is missing: pass the folder of a run, such as runs/core_seg")
    folder = Path(arguments.output_dir or Path(arguments.model) / "evaluation")
    check_output(folder, overwrite=arguments.overwrite, inputs=arguments.inputs())
    test = load_rows(arguments, recipe, arguments.seed, "test")
    try:
        train = load_rows(arguments, recipe, arguments.seed, "train")
    except UnknownNameError:  # data of another source, only to test on
        train = None
    segmenter = load_segmenter(arguments.model, device=str(PartialState().device))

    def work() -> None:
        claim_output(folder, asdict(arguments))
        summary, evaluated = score(segmenter, test, arguments)
        results: dict[str, Any] = {"model": summary, "config": asdict(arguments)}
        if train is not None:
            results["baseline"] = baseline(train, test)
        report(folder, results, evaluated)

    return work


if __name__ == "__main__":
    run_script(check)
