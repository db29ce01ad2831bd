"""Exit codes, messages and argument types of the commands."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segrl.errors import SegRLError

__all__ = [
    "BAD",
    "OK",
    "WRONG",
    "CommandParser",
    "add_command",
    "complain",
    "count",
    "import_modules",
    "positive",
    "print_json",
    "search_here",
    "share",
]

OK, BAD, WRONG = 0, 1, 2


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors escape what was typed."""

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        """Leave with a status, after a message."""
        from segrl.reports.terminal import printable_lines

        super().exit(status, None if message is None else printable_lines(message))


def add_command(
    areas: Any, name: str, text: str, *parents: argparse.ArgumentParser, more: str = "", **settings: Any
) -> argparse.ArgumentParser:
    """Add a command that is described as it is listed.

    Args:
        areas: Of `add_subparsers`.
        name: Of the command.
        text: What it does, one sentence without capital and full stop.
        parents: Parsers of shared flags.
        more: Further sentences of its description.
        settings: Others of `ArgumentParser`.
    """
    described = " ".join(filter(None, (f"{text[0].upper()}{text[1:]}.", more)))
    return areas.add_parser(name, help=text, description=described, parents=parents, **settings)


def import_modules(modules: Sequence[str]) -> None:
    if modules:
        search_here()
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises: its place is all that helps
            frames = traceback.extract_tb(error.__traceback__)
            place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
            raise SegRLError(f"--import {module}: {type(error).__name__}: {error}{place}") from error


def search_here() -> None:
    """Let modules of the current folder be imported; a command does not, other than `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def complain(message: str) -> int:
    from segrl.reports.terminal import say

    say(f"segrl: error: {message}", stderr=True)
    return WRONG


def print_json(value: Any) -> int:
    from segrl.reports.terminal import say

    say(json.dumps(value, indent=2, allow_nan=False))
    return OK


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected 0 or more")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a number from 0 to 1")
    return number
