"""Command lines of training scripts: their own flags beside all of a trainer's, presets, and errors of one line.

A script is a function `check(argv)` that finds whatever can be wrong before anything is written and returns the work;
`run_script(check)` is its last line. See `docs/how-to/write-a-training-script.md`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import HfArgumentParser

from segrl.errors import SegRLError, UnknownNameError, unknown_name
from segrl.rewards import load_reward, make_reward

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "MACHINE_FLAGS",
    "EvaluationArguments",
    "Parser",
    "RunArguments",
    "TwoStageArguments",
    "check_numbers",
    "check_rewards",
    "find_preset",
    "first_stage_settings",
    "missing_processes",
    "parse",
    "run_script",
]

# flags of the machine rather than of the method: given to a script, they hold for each of its stages
MACHINE_FLAGS = (
    *("seed", "data_seed", "use_cpu", "bf16", "fp16", "tf32", "gradient_checkpointing", "activation_checkpointing"),
    *("optim", "deepspeed", "fsdp", "fsdp_config", "ddp_backend", "dataloader_num_workers", "dataloader_pin_memory"),
    *("disable_tqdm", "report_to", "logging_steps"),
)
_LEAST = {"train_limit": 1, "eval_limit": 1, "eval_batch_size": 1, "sft_max_steps": 1}

Arguments = TypeVar("Arguments")
Config = TypeVar("Config")
Preset = TypeVar("Preset")


# ---- flags that scripts share ----------------------------------------------------------------------------------------


@dataclass
class RunArguments:
    """What every script asks. A subclass that gives a field another default or help leaves it in its place."""

    preset: str = field(default="tiny", metadata={"help": "What is built, and with which settings it is trained."})
    data: str | None = field(
        default=None,
        metadata={"help": "Folder, DatasetDict saved to disk, or hub data set owner/name, with splits train and test."},
    )
    train_limit: int | None = field(default=None, metadata={"help": "Use only the first rows of the training split."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate only the first rows of the test split."})
    eval_batch_size: int = field(default=16, metadata={"help": "Rows per generation in the evaluation."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run in output_dir, all of the folder."})

    def limited(self, rows: Dataset, split: str) -> Dataset:
        """The rows of a split that `--train_limit` (of "train") or `--eval_limit` (of any other) leaves."""
        limit = self.train_limit if split == "train" else self.eval_limit
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    def inputs(self) -> dict[str, str | None]:
        """What the run reads, by the names of the flags, for `segrl.runs.check_output`."""
        return {name: getattr(self, name, None) for name in ("model", "data", "segmenter")}


@dataclass
class TwoStageArguments(RunArguments):
    """What training adds when SFT (stage 1) comes before GRPO (stage 2), in two scripts or in the one of stage 2."""

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
    sft_max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of stage 1 when train_grpo runs it; default: the preset's, at most --max_steps if given."
        },
    )
    sft_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of that stage 1."})


@dataclass
class EvaluationArguments(RunArguments):
    """What the evaluation of a run adds."""

    model: str | None = field(default=None, metadata={"help": "The run to evaluate: its output_dir."})
    output_dir: str | None = field(default=None, metadata={"help": "Where to write; default: MODEL/evaluation."})
    seed: int = field(default=42, metadata={"help": "Seed of the synthetic data; the trainers' default is 42."})


# ---- reading a command line ------------------------------------------------------------------------------------------


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line instead of the usage of 300 flags, and that guesses no flags.

    Args:
        *types: Dataclasses; every field is a flag.
        **settings: Those of `argparse.ArgumentParser`, for example `description`.
    """

    def __init__(self, *types: type, **settings: Any) -> None:
        super().__init__(types, usage="%(prog)s [flags]", allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> Any:
        """Raise what is wrong, as `SegRLError`."""
        raise SegRLError(f"{message}; --help lists all flags")

    def read(self, argv: Sequence[str]) -> list[Any]:
        """One object per dataclass.

        Raises:
            SegRLError: A value that does not fit its flag, or settings that contradict each other.
            UnknownNameError: An unknown flag; the closest is suggested.
        """
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
    argv: Sequence[str],
    arguments_class: type[Arguments],
    config_class: type[Config],
    *,
    defaults: Callable[[Any], Mapping[str, Any]] | None = None,
    description: str | None = None,
    least: Mapping[str, float] | None = None,
) -> tuple[Arguments, Config, set[str]]:
    """Read the command line of a script that trains.

    Args:
        argv: The command line, without the script.
        arguments_class: Dataclass of the script's own flags.
        config_class: Dataclass of the trainer's flags, for example `SegGRPOConfig`.
        defaults: `defaults(arguments)` gives the settings of the chosen preset; `arguments` has the script's own flags
            as attributes. They replace the defaults of flags, and every flag that is given overrides them.
        description: For `--help`.
        least: For `check_numbers`.

    Returns:
        The script's arguments, the trainer's config, and the names of the flags that were given.

    Raises:
        SegRLError: A value that does not fit its flag, or settings that contradict each other.
        UnknownNameError: An unknown flag, or an unknown setting in `defaults`; the closest is suggested.
    """
    parser = Parser(arguments_class, config_class, description=description)
    if defaults is not None:
        settings = defaults(Parser(arguments_class, add_help=False).parse_known_args(list(argv))[0])
        known = [item.name for part in (arguments_class, config_class) for item in fields(part) if item.init]  # type: ignore[arg-type]
        for name in settings:
            if name not in known:  # argparse would keep it and nobody would read it
                raise unknown_name(f"setting of {config_class.__name__}", name, known)
        parser.set_defaults(**settings)
    arguments, config = parser.read(argv)
    check_numbers(arguments, least)
    given = {item.split("=")[0].removeprefix("--").replace("-", "_") for item in argv if item.startswith("--")}
    return arguments, config, given


def check_numbers(arguments: Any, least: Mapping[str, float] | None = None) -> None:
    """Refuse numbers that are too small.

    Args:
        arguments: A dataclass; fields that are None are left out.
        least: The smallest value that each field may have; the limits and sizes of `RunArguments` and
            `TwoStageArguments` need no entry, they are at least 1.

    Raises:
        SegRLError: A number that is smaller, or NaN.
    """
    smallest = {**_LEAST, **(least or {})}
    for name in (item.name for item in fields(arguments)):
        value = getattr(arguments, name)
        if name in smallest and value is not None and not value >= smallest[name]:
            raise SegRLError(f"--{name} {value}: expected {smallest[name]} or more; leave the flag out for the default")


def check_rewards(names: Sequence[str]) -> list[str]:
    """Refuse rewards that cannot be made now, rather than after hours of stage 1.

    Args:
        names: Registered names, `module:attribute`, or YAML files.

    Returns:
        The names, as a list.

    Raises:
        SegRLError: A reward is named twice, or cannot be made.
        UnknownNameError: An unknown reward; the closest is suggested.
    """
    for name in names:
        load_reward(name) if name.endswith((".yaml", ".yml")) else make_reward(name)
    if len(set(names)) < len(names):
        raise SegRLError(f"--rewards {' '.join(names)}: a reward is named twice, expected each once")
    return list(names)


def find_preset(name: str, presets: Mapping[str, Preset]) -> Preset:
    """The preset of this name.

    Raises:
        UnknownNameError: There is none; the closest is suggested.
    """
    if name not in presets:
        raise unknown_name("preset", name, presets)
    return presets[name]


def first_stage_settings(
    preset: Mapping[str, Any], config: Any, given: set[str], arguments: TwoStageArguments, output_dir: str
) -> dict[str, Any]:
    """Settings of stage 1 when the script of stage 2 trains it first: the preset's, and what the command line says.

    Args:
        preset: The preset's settings of stage 1.
        config: The config of stage 2; its seed and those of `MACHINE_FLAGS` that were given hold for stage 1 too.
        given: The flags that were given, from `parse`.
        arguments: `sft_max_steps` and `sft_learning_rate`. Without the first, `--max_steps` shortens stage 1 as well.
        output_dir: Where stage 1 goes.

    Returns:
        Arguments for the config of stage 1.
    """
    settings = {**preset, "output_dir": output_dir, "seed": config.seed}
    settings |= {name: getattr(config, name) for name in MACHINE_FLAGS if name in given}
    if arguments.sft_learning_rate is not None:
        settings["learning_rate"] = arguments.sft_learning_rate
    if arguments.sft_max_steps is not None:
        settings["max_steps"] = arguments.sft_max_steps
    elif "max_steps" in given and config.max_steps > 0:
        steps = settings.get("max_steps", -1)
        settings["max_steps"] = min(steps, config.max_steps) if steps > 0 else config.max_steps
    return settings


# ---- running a script ------------------------------------------------------------------------------------------------


def run_script(check: Callable[[Sequence[str]], Callable[[], None]], argv: Sequence[str] | None = None) -> None:
    """Run a script, so that what its user can mend is one message on stderr instead of a traceback.

    Args:
        check: `check(argv)` finds what can be wrong before anything is written and returns the work.
        argv: The command line; that of the process by default.

    Raises:
        SystemExit: 2 after a `SegRLError`, 130 after an interruption. With several processes the first one speaks for
            all if the checks fail, since they fail alike; the work can fail on one alone, which then says its rank.
    """
    rank = int(os.environ.get("RANK", "0"))
    working = False
    if (warning := missing_processes(os.environ)) is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    try:
        work = check(sys.argv[1:] if argv is None else argv)
        working = True
        work()
    except SegRLError as error:
        if rank == 0 or working:
            print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; checkpoints written so far stay in the output directory", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def missing_processes(environment: Mapping[str, str]) -> str | None:
    """What to say when `accelerate launch --cpu --num_processes 2` was asked for several processes and started one.

    accelerate leaves the others to MPI: it sets an address to meet at, and nobody else comes.

    Args:
        environment: The environment variables of the process.

    Returns:
        The warning; None if nobody is missing.
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
