"""Command lines of training scripts: their own flags beside all of a trainer's, presets, and errors of one line.

A script is a function `check(argv)` that finds whatever can be wrong before anything is written and returns the work;
`run_script(check)` is its last line. See `docs/how-to/write-a-training-script.md`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from transformers import HfArgumentParser

from segrl.errors import SegRLError, UnknownNameError, unknown_name
from segrl.reports.terminal import escaped_warnings, say
from segrl.rewards.factory import make_reward
from segrl.rewards.trial import try_reward
from segrl.scripts.arguments import check_numbers
from segrl.scripts.config_file import flag_values
from segrl.scripts.help_page import help_page
from segrl.scripts.trainer_settings import check_counts

__all__ = [
    "Parser",
    "check_list",
    "check_rewards",
    "find_preset",
    "missing_processes",
    "parse",
    "quiet",
    "run_script",
]

Arguments = TypeVar("Arguments")
Config = TypeVar("Config")
Preset = TypeVar("Preset")

# ---- reading a command line ------------------------------------------------------------------------------------------


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line instead of the usage of 300 flags, and that guesses no flags.

    Args:
        *types: Dataclasses; every field is a flag.
        **settings: Those of `argparse.ArgumentParser`, for example `description`.

    Example:
        >>> from segrl.scripts import RunArguments
        >>> Parser(RunArguments).read(["--eval_limit", "8"])[0].eval_limit
        8
    """

    def __init__(self, *types: type, **settings: Any) -> None:
        super().__init__(types, usage="%(prog)s [flags]", allow_abbrev=False, **settings)  # type: ignore[arg-type]
        self._types, self._whole = types, False
        if settings.get("add_help", True):
            self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show all flags of the trainer too")

    def format_help(self) -> str:
        """Return the help in groups, see `segrl.scripts.help_page`."""
        usage = f"{self.prog} [flags]"
        return help_page(self._types, self._actions, usage, self.description or "", whole=self._whole)

    def show_all(self) -> None:
        """Print the help with all flags and leave."""
        self._whole = True
        self.print_help()
        self.exit()

    def error(self, message: str) -> Any:
        """Raise `SegRLError` instead of printing the usage and leaving."""
        raise SegRLError(f"{message}; --help_all lists all flags")

    def read(self, argv: Sequence[str]) -> list[Any]:
        """Return one object per dataclass.

        Raises:
            SegRLError: A value that does not fit its flag, or settings that contradict each other.
            UnknownNameError: An unknown flag; the closest is suggested.
        """
        try:
            *objects, unknown = self.parse_args_into_dataclasses(list(argv), True, look_for_args_file=False)
        except SegRLError:
            raise
        except (ValueError, NotImplementedError, ImportError) as error:  # of TRL or transformers, about settings
            raise SegRLError(" ".join(str(error).split())) from error
        if unknown:
            raise _unexpected(unknown[0], self._option_string_actions)
        return objects


class _HelpAll(argparse.Action):
    """`--help_all`, as argparse's own `--help`."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **settings: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.show_all()


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

    Example:
        >>> from segrl import SegSFTConfig
        >>> from segrl.scripts import RunArguments
        >>> preset = {"output_dir": "runs/mine", "max_steps": 650, "bf16": False}
        >>> flags = ["--max_steps", "2", "--eval_limit", "8"]
        >>> arguments, config, given = parse(flags, RunArguments, SegSFTConfig, defaults=lambda known: preset)
        >>> config.output_dir, config.max_steps, arguments.eval_limit, sorted(given)
        ('runs/mine', 2, 8, ['eval_limit', 'max_steps'])
    """
    parser = Parser(arguments_class, config_class, description=description)
    if defaults is not None:
        settings = defaults(Parser(arguments_class, add_help=False).parse_known_args(list(argv))[0])
        known = [item.name for part in (arguments_class, config_class) for item in fields(part) if item.init]  # type: ignore[arg-type]
        for name in settings:
            if name not in known:  # argparse would keep it and nobody would read it
                raise unknown_name(f"setting of {config_class.__name__}", name, known)
        parser.set_defaults(**settings)
    read = vars(parser.parse_known_args(list(argv))[0])
    check_counts(SimpleNamespace(**{item.name: read.get(item.name) for item in fields(config_class)}))  # type: ignore[arg-type]
    arguments, config = parser.read(argv)
    check_numbers(arguments, least)
    return arguments, config, set(flag_values(argv))


def check_rewards(names: Sequence[str], drop: Sequence[str] = ()) -> list[str]:
    """Refuse rewards that cannot be made or do not score now, rather than after hours of stage 1.

    Each scores one made-up answer, see `segrl.rewards.trial.try_reward`.

    Args:
        names: Registered names, `module:attribute`, or YAML files.
        drop: Those to leave out (`--drop_rewards`).

    Returns:
        The names that are left.

    Raises:
        SegRLError: A reward is named twice, cannot be made or fails on the answer, or none is left.
        UnknownNameError: An unknown reward, or one to leave out that is not among the names; the closest is suggested.

    Example:
        >>> check_rewards(["format", "box_f1", "dual_granularity_mask"], drop=["box_f1"])
        ['format', 'dual_granularity_mask']
    """
    left = list(names)
    for flag, given in (("rewards", left), ("drop_rewards", list(drop))):
        check_list(flag, given)
    for name in drop:
        if name not in left:
            raise unknown_name("reward for --drop_rewards", name, left)
        left.remove(name)
    if drop and not left:
        raise SegRLError(f"--drop_rewards {' '.join(drop)}: no reward is left")
    for name in left:
        try_reward(make_reward(name))
    if len(set(left)) < len(left):
        raise SegRLError(f"--rewards {' '.join(left)}: a reward is named twice, expected each once")
    return left


def check_list(flag: str, values: Sequence[str]) -> None:
    """Refuse a list that is separated by commas where flags separate by spaces.

    Raises:
        SegRLError: Names the flag as it should be written.

    Example:
        >>> check_list("rewards", ["format,box_f1"])
        Traceback (most recent call last):
        segrl.errors.SegRLError: --rewards format,box_f1: expected names separated by spaces: --rewards format box_f1
    """
    joined = [value for value in values if "," in value and not Path(value).exists()]
    if joined:
        apart = " ".join(part for value in values for part in value.replace(",", " ").split())
        given = " ".join(values)
        raise SegRLError(f"--{flag} {given}: expected names separated by spaces: --{flag} {apart}")


def find_preset(name: str, presets: Mapping[str, Preset]) -> Preset:
    """Return the preset of this name.

    Raises:
        UnknownNameError: There is none; the closest is suggested.

    Example:
        >>> find_preset("tyny", {"tiny": 1, "large": 2})
        Traceback (most recent call last):
        segrl.errors.UnknownNameError: unknown preset 'tyny'; did you mean 'tiny'? Known: large, tiny
    """
    if name not in presets:
        raise unknown_name("preset", name, presets)
    return presets[name]


CHECK_ONLY = "--check_only"
_NOISE: Sequence[tuple[str, type[Warning]]] = (
    # TRL's configs set the old name of this setting by default, and peft reads it from every model
    (r"`gradient_checkpointing` is deprecated", FutureWarning),
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    (r"`gradient_checkpointing_(en|dis)able` is deprecated", FutureWarning),
    # PyTorch's loader, which the trainers ask for pinned memory also where there is no GPU
    (r"'pin_memory' argument is set", UserWarning),
)

# ---- running a script ------------------------------------------------------------------------------------------------


def run_script(check: Callable[[Sequence[str]], Callable[[], None]], argv: Sequence[str] | None = None) -> None:
    """Run a script; an error that its user can mend is one message on stderr instead of a traceback.

    With `--check_only` flags, data and parts are checked, and nothing is written.

    Args:
        check: `check(argv)` finds what can be wrong before anything is written and returns the work.
        argv: The command line; that of the process by default.

    Raises:
        SystemExit: 2 after a `SegRLError`, 130 after an interruption. With several processes the first one speaks for
            all if the checks fail, since they fail alike; the work can fail on one alone, which then says its rank.

    Example:
        >>> run_script(lambda argv: lambda: print("trained with", *argv), ["--max_steps", "2"])
        trained with --max_steps 2
        >>> run_script(lambda argv: lambda: print("trained"), ["--check_only"])
        all checks passed; nothing was written
    """
    rank = int(os.environ.get("RANK", "0"))
    working = False
    if (warning := missing_processes(os.environ)) is not None:
        say(f"warning: {warning}", stderr=True)
    try:
        with escaped_warnings(), quiet():
            asked = list(sys.argv[1:] if argv is None else argv)
            only = [argument for argument in asked if argument == CHECK_ONLY]
            work = check([argument for argument in asked if argument != CHECK_ONLY])
            if only:
                say("all checks passed; nothing was written")
                return
            working = True
            work()
    except SegRLError as error:
        if rank == 0 or working:
            say(f"error{f' on rank {rank}' if rank else ''}: {error}", stderr=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        if rank == 0:
            say("interrupted; checkpoints written so far stay in the output directory", stderr=True)
        raise SystemExit(130) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out, while a script runs, warnings of other libraries that its user cannot mend.

    Example:
        >>> with quiet():
        ...     warnings.warn("`gradient_checkpointing` is deprecated and will be removed", FutureWarning)
    """
    with warnings.catch_warnings():
        for message, category in _NOISE:
            warnings.filterwarnings("ignore", message, category)
        yield


def missing_processes(environment: Mapping[str, str]) -> str | None:
    """Return a warning where `accelerate launch --cpu --num_processes 2` started one process instead of several.

    accelerate leaves the others to MPI: it sets an address to meet at, and nobody else comes.

    Args:
        environment: The environment variables of the process.

    Returns:
        The warning; None if nobody is missing.

    Example:
        >>> launched = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
        >>> (missing_processes(launched) or "")[:43], missing_processes({**launched, "WORLD_SIZE": "2"})
        ('accelerate starts one process on a CPU, wha', None)
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
    return UnknownNameError(f"unknown flag {flag!r}; {hint}--help_all lists all flags")
