"""Printing text that others wrote (models, plugins) to a terminal: escaped, never interpreted."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

__all__ = ["console", "excerpt", "limits", "number", "printable", "printable_lines"]

PLAIN_WIDTH = 120  # columns, where the output is not a terminal


def printable(text: str) -> str:
    """`text` with control characters and everything else that is not printable escaped.

    Example:
        >>> printable("red \\x1b[31m text")
        'red \\\\x1b[31m text'
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def printable_lines(text: str) -> str:
    """`text` with everything but its line breaks escaped."""
    return "\n".join(map(printable, text.split("\n")))


def excerpt(text: str, most: int) -> str:
    """The printable start of `text`, at most `most` characters; three dots where something is left out.

    Example:
        >>> excerpt("one\\ntwo three", 9)
        'one\\\\nt...'
    """
    shown = printable(text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def number(value: float | int | None) -> str:
    """A score with four digits, or a whole number; a dash for none."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def limits(bounds: Sequence[float | None] | None) -> str:
    """A range, in which None stands for no limit; nothing if there is no range.

    Example:
        >>> limits([0.0, None])
        '0 to inf'
    """
    if bounds is None:
        return ""
    low, high = ("inf" if end is None else f"{end:.4g}" for end in bounds)
    return f"{'-' if bounds[0] is None else ''}{low} to {high}"


def console(*, stderr: bool = False) -> Console:
    """A console that interprets no markup, and does not fail on characters which the output cannot show."""
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if made.is_terminal:
        return made
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=PLAIN_WIDTH)
