"""`--help` of training scripts: flags in groups, each once; `--help_all` shows those of the trainer too."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

__all__ = ["COMMON", "help_page"]

# flags of TRL and transformers that `--help` shows; `--help_all` shows all
COMMON = (
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_generations"),
    *("max_completion_length", "temperature", "beta", "loss_type", "reward_weights", "bf16", "use_cpu"),
    *("gradient_checkpointing", "logging_steps", "report_to", "log_completions", "save_strategy", "save_steps"),
    *("save_total_limit", "resume_from_checkpoint", "eval_steps", "load_best_model_at_end", "dataloader_num_workers"),
    *("deepspeed", "use_vllm"),
)
_BASE = "segrl.scripts.arguments"
_EXTRAS = (
    ("config FILE", "YAML file of flags, in TRL's format; flags on the command line override it."),
    ("check_only", "Check flags, data and parts, write nothing."),
    ("help_all", "Show all flags of the trainer too."),
)


def help_page(
    types: Sequence[type], actions: Sequence[argparse.Action], usage: str, description: str = "", *, whole: bool = False
) -> str:
    """Return the help of a script: flags of this example, of segrl's scripts and trainers, and of the trainer.

    Args:
        types: The dataclasses whose fields are the flags; the first is the script's own.
        actions: Of the parser, with their defaults.
        usage: How the script is called.
        description: What it does.
        whole: All flags of the trainer, instead of those in common use.

    Example:
        >>> from segrl.scripts import Parser, RunArguments
        >>> parser = Parser(RunArguments)
        >>> page = help_page([RunArguments], parser._actions, "my.py [flags]", "What it does.")
        >>> page.count("--eval_limit "), page.splitlines()[0], "--eval-limit" in page
        (1, 'usage: my.py [flags]', False)
    """
    by_name: dict[str, argparse.Action] = {}
    for action in actions:
        by_name.setdefault(action.dest, action)  # not its complement `--no_...`
    groups: dict[str, list[str]] = {"this example": [], "segrl": [], "common": [], "all others of the trainer": []}
    for kind in types:
        for name in (item.name for item in fields(kind) if item.name in by_name):
            group = _group(kind, name)
            if group == "common" and name not in COMMON:
                group = "all others of the trainer"
            groups[group].append(name)
    hidden = 0 if whole else len(groups.pop("all others of the trainer"))
    width = min(120, max(80, shutil.get_terminal_size((100, 24)).columns))
    lines = [f"usage: {usage}", *(["", *textwrap.wrap(description, width)] if description else [])]
    for title, names in groups.items():
        if names:
            lines += ["", f"{title}:"]
            lines += [line for name in names for line in _entry(by_name[name], width)]
    if any(part.__module__.startswith("segrl") or len(types) > 1 for part in types):
        lines += ["", "of every script:"]
        lines += [line for name, text in _EXTRAS for line in _lines(f"--{name}", text, width)]
    if hidden:
        lines += ["", f"{hidden} more flags of the trainer: --help_all"]
    return "\n".join(lines) + "\n"


def _group(part: type, name: str) -> str:
    """Return the group of a flag by the class that declares it last."""
    owner = next(kind for kind in part.__mro__ if name in vars(kind).get("__annotations__", {}))
    if owner.__module__ == _BASE or owner.__module__.startswith("segrl.trainers"):
        return "segrl"
    return "common" if owner.__module__.split(".")[0] in ("trl", "transformers") else "this example"


def _entry(action: argparse.Action, width: int) -> Iterator[str]:
    kind: Any = action.type
    shown = "|".join(map(str, action.choices)) if action.choices else ""
    if not shown and not _is_switch(action):
        shown = str(getattr(kind, "__name__", "value")).replace("parse_", "").upper()
        shown = {"STR": "TEXT", "FLOAT": "X", "INT": "N"}.get(shown, "VALUE")
    many = " ..." if action.nargs in ("+", "*") else ""
    default = action.default
    tail = "" if default in (None, False, argparse.SUPPRESS) or default == [] else f" (default: {default})"
    text = " ".join(str(action.help or "").replace("%%", "%").split()).split(" (default: ")[0]
    yield from _lines(f"--{action.dest}{' ' + shown if shown else ''}{many}", text.removesuffix(tail) + tail, width)


def _is_switch(action: argparse.Action) -> bool:
    """Whether the flag needs no value; `--flag false` turns one off that is on."""
    return action.const is True and action.nargs == "?"


def _lines(flag: str, text: str, width: int) -> Iterator[str]:
    column = 34
    wrapped = textwrap.wrap(text, width - column) or [""]
    first = f"  {flag}"
    if len(first) > column - 2:
        yield first
    else:
        yield f"{first:<{column}}{wrapped.pop(0)}".rstrip()
    yield from (f"{'':<{column}}{line}" for line in wrapped)
