"""Print to a terminal: text of models, data sets, files and plugins is escaped, never interpreted.

`say` prints all lines of commands and scripts, and `console` all tables.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

__all__ = ["console", "escaped_warnings", "excerpt", "limits", "number", "printable", "printable_lines", "say"]

PLAIN_WIDTH = 120  # columns if the output is not a terminal


def printable(text: str) -> str:
    """Escape control characters and all others that are not printable.

    Example:
        >>> printable("red \\x1b[31m text")
        'red \\\\x1b[31m text'
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def printable_lines(text: str) -> str:
    """Escape all characters that are not printable, except line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str, *, stderr: bool = False) -> None:
    """Print lines at once; characters that are not printable are escaped, also in names of files and in queries.

    Args:
        text: One or several lines, without markup.
        stderr: Print to standard error.

    Example:
        >>> say("found scan\\x1b[2J.nii")
        found scan\\x1b[2J.nii
    """
    print(printable_lines(text), file=_stream(stderr), flush=True)


@contextmanager
def escaped_warnings() -> Iterator[None]:
    """Escape what Python prints of warnings, whose messages may name files, while a command runs."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable_lines(before(*args, **kwargs))
    try:
        yield
    finally:
        warnings.formatwarning = before


def excerpt(text: str, max_characters: int) -> str:
    """Return the escaped start of `text`, at most `max_characters` long; three dots replace the rest.

    Example:
        >>> excerpt("one\\ntwo three", 9)
        'one\\\\nt...'
    """
    shown = printable(text[: max_characters + 1])
    return shown if len(shown) <= max_characters else shown[: max_characters - 3] + "..."


def number(value: float | int | None) -> str:
    """Format a score with four digits, or a whole number; a dash for None."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def limits(bounds: Sequence[float | None] | None) -> str:
    """Format a range, in which None is no limit; "" if there is no range.

    Example:
        >>> limits([0.0, None])
        '0 to inf'
    """
    if bounds is None:
        return ""
    low, high = ("inf" if end is None else f"{end:.4g}" for end in bounds)
    return f"{'-' if bounds[0] is None else ''}{low} to {high}"


def console(*, stderr: bool = False) -> Console:
    """Return a console that interprets no markup, and does not fail on characters that the output cannot show."""
    _stream(stderr)
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if made.is_terminal:
        return made
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=PLAIN_WIDTH)


def _stream(stderr: bool) -> TextIO:
    """Return an output that does not fail on characters that it cannot show."""
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    return stream
