"""Evaluate a trained run.

python examples/core_seg/evaluate.py --model runs/core_seg --data path/to/folder
"""

from dataclasses import dataclass, field
from pathlib import Path

from recipes import find_recipe
from stages import ExampleArguments, baseline, load_data, report, run, score
from transformers import HfArgumentParser

from segrl.errors import SegRLError


@dataclass
class EvaluateArguments(ExampleArguments):
    """`--model` is the run to evaluate."""

    output_dir: str | None = field(default=None, metadata={"help": "Where to write; default: MODEL/evaluation."})
    seed: int = field(default=42, metadata={"help": "Seed of the synthetic data; the trainers' default is 42."})


def main() -> None:
    (arguments,) = HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if arguments.model is None:
        raise SegRLError("--model is missing: pass the folder of a run, such as runs/core_seg")
    train, test = load_data(arguments, find_recipe(arguments.preset), arguments.seed)
    summary, evaluated = score(Path(arguments.model), test, arguments)
    folder = Path(arguments.output_dir or Path(arguments.model) / "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    report(folder, {"baseline": baseline(train, test), "stage1": summary, "config": vars(arguments)}, evaluated)


if __name__ == "__main__":
    run(main)
