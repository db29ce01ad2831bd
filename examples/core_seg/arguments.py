"""Command lines of the three scripts: this example's own flags, the presets' defaults, and errors of one line."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from recipes import RECIPES, find_recipe
from transformers import HfArgumentParser

from segrl import load_reward, make_reward
from segrl.errors import SegRLError, UnknownNameError


@dataclass
class DataArguments:
    """What all three scripts ask."""

    preset: str = field(default="tiny", metadata={"help": f"One of: {', '.join(RECIPES)}."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder with manifest.csv, images/ and masks/, a DatasetDict saved to disk, or a hub data set "
            "owner/name, each with the splits train and test; None: synthetic lesions."
        },
    )
    train_limit: int | None = field(default=None, metadata={"help": "Use only the first rows of the training split."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate only the first rows of the test split."})
    eval_batch_size: int = field(default=16, metadata={"help": "Rows per generation in the evaluation."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run in output_dir, all of the folder."})


@dataclass
class ExampleArguments(DataArguments):
    """What training adds."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "train_sft: base model (path or hub name). train_grpo: a stage 1 run; None runs stage 1 first; "
            "with --skip_stage1 a base model."
        },
    )
    segmenter: str | None = field(default=None, metadata={"help": "SAM 2 weights: a .pt file or owner/repo:file.pt."})
    skip_stage1: bool = field(default=False, metadata={"help": "train_grpo without stage 1 (ablation)."})
    rewards: list[str] | None = field(
        default=None, metadata={"help": "Registered rewards, module:attribute, or YAML files; default: the preset's."}
    )
    dense_weight: float = field(default=1.0, metadata={"help": "Weight of DiceCE; 0 trains without it (ablation)."})
    reasoning: bool = field(default=True, metadata={"help": "Chain of thought on or off (ablation)."})
    adapter: str | None = field(
        default=None, metadata={"help": "semantic_guided, linear or mlp (ablation); default: the preset's."}
    )
    probe: str | None = field(
        default=None,
        metadata={"help": "seg_token or answer, whose states prompt the segmenter; default: the preset's."},
    )
    sft_max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of stage 1 when train_grpo runs it; default: the preset's, at most --max_steps if given."
        },
    )
    sft_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of that stage 1."})


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line instead of the usage of 300 flags, and that guesses no flags."""

    def __init__(self, *types: type, **settings: Any) -> None:
        super().__init__(types, usage="%(prog)s [flags]", allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> Any:
        raise SegRLError(f"{message}; --help lists all flags")

    def read(self, argv: Sequence[str]) -> list[Any]:
        """One object per dataclass. An unknown flag is an error that suggests the closest."""
        try:
            *objects, unknown = self.parse_args_into_dataclasses(list(argv), True, look_for_args_file=False)
        except SegRLError:
            raise
        except (ValueError, NotImplementedError) as error:  # settings of TRL or transformers that contradict each other
            raise SegRLError(" ".join(str(error).split())) from error
        if unknown:
            raise _unexpected(unknown[0], self._option_string_actions)
        return objects


def parse(
    config_class: type, stage: str, default_output: str, argv: Sequence[str]
) -> tuple[ExampleArguments, Any, set[str]]:
    """Command line to this example's arguments, the trainer's config, and the names of the flags that were given.

    The preset's settings are defaults; every flag of the trainer's config overrides them.
    """
    known = Parser(ExampleArguments, add_help=False).parse_known_args(list(argv))[0]
    recipe = find_recipe(known.preset)
    parser = Parser(ExampleArguments, config_class, description=f"CORE-Seg, {stage}. Presets: {', '.join(RECIPES)}.")
    parser.set_defaults(output_dir=default_output, **getattr(recipe, stage))
    example, config = parser.read(argv)
    check_numbers(example)
    if example.rewards is None:
        example.rewards = list(recipe.rewards)
    for name in example.rewards:  # a wrong one should fail now, not after stage 1
        load_reward(name) if name.endswith((".yaml", ".yml")) else make_reward(name)
    if len(set(example.rewards)) < len(example.rewards):
        raise SegRLError(f"--rewards {' '.join(example.rewards)}: a reward is named twice, expected each once")
    given = {item.split("=")[0].removeprefix("--").replace("-", "_") for item in argv if item.startswith("--")}
    return example, config, given


def check_numbers(arguments: DataArguments) -> None:
    """Limits and sizes are at least 1, weights at least 0."""
    least = {"train_limit": 1, "eval_limit": 1, "eval_batch_size": 1, "sft_max_steps": 1, "dense_weight": 0}
    for name in (item.name for item in fields(arguments)):
        value = getattr(arguments, name)
        if name in least and value is not None and not value >= least[name]:
            raise SegRLError(f"--{name} {value}: expected {least[name]} or more; leave the flag out for the default")


def run(check: Callable[[Sequence[str]], Callable[[], None]], argv: Sequence[str] | None = None) -> None:
    """Run a script: `check(argv)` finds what can be wrong before anything is written and returns the work.

    What the user can mend becomes one message on stderr and exit code 2.
    """
    rank = int(os.environ.get("RANK", "0"))
    working = False
    if (warning := alone(os.environ)) is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    try:
        work = check(sys.argv[1:] if argv is None else argv)
        working = True
        work()
    except SegRLError as error:
        if rank == 0 or working:  # the checks fail on all ranks alike; one says so
            print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; checkpoints written so far stay in the output directory", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def alone(environment: Mapping[str, str]) -> str | None:
    """What to say when `accelerate launch --cpu --num_processes 2` was asked for several processes and started one.

    accelerate leaves the others to MPI: it sets an address to meet at, and nobody else comes.
    """
    several = "MASTER_PORT" in environment and environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not several or {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & environment.keys():
        return None
    return (
        "accelerate starts one process on a CPU, whatever --num_processes says, unless MPI starts the others; for two: "
        f"torchrun --standalone --nproc_per_node 2 {sys.argv[0]} --use_cpu"
    )


def _unexpected(argument: str, options: Sequence[str] | dict[str, Any]) -> UnknownNameError:
    flag = argument.split("=")[0]
    if not flag.startswith("-"):
        return UnknownNameError(f"unexpected argument {argument!r}; expected flags, such as --data {argument}")
    closest = difflib.get_close_matches(flag, [name for name in options if name.startswith("--")], n=1)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    return UnknownNameError(f"unknown flag {flag!r}; {hint}--help lists all flags")
