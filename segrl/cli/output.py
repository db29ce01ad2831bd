"""Exit codes, messages and argument types of the commands."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segrl.errors import RewardError

__all__ = []
if TYPE_CHECKING:  # imported when a command needs it, so that --help is quick
    pass

OK, BAD, WRONG = 0, 1, 2


YAML_SUFFIXES = (".yaml", ".yml")


def _import(modules: Sequence[str]) -> None:
    if modules:
        _search_here()
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises: its place is all that helps
            frames = traceback.extract_tb(error.__traceback__)
            place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
            raise RewardError(f"--import {module}: {type(error).__name__}: {error}{place}") from error


def _search_here() -> None:
    """Let modules of the current folder be imported; a command does not, other than `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _complain(message: str) -> int:
    from segrl.reports.terminal import console, printable_lines

    console(stderr=True).print(f"segrl: error: {printable_lines(message)}", soft_wrap=True)
    return WRONG


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2, allow_nan=False))
    return OK


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected 0 or more")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a number from 0 to 1")
    return number
