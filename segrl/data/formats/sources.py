"""Files of annotations as the readers of formats take them, and their problems in one message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segrl.errors import DataError

__all__ = ["listed", "read_bytes", "read_json", "read_object"]

_LISTED = 10


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        DataError: It cannot be read.

    Example:
        >>> read_bytes(Path("no.p"))
        Traceback (most recent call last):
        segrl.errors.DataError: no.p: cannot be read: No such file or directory
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file, whatever it holds.

    Raises:
        DataError: It cannot be read, or is not JSON.

    Example:
        >>> _ = Path("a.json").write_text("[1, 2]")
        >>> read_json(Path("a.json"))
        [1, 2]
    """
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: As `read_json`, or it holds something else.

    Example:
        >>> _ = Path("a.json").write_text("[1, 2]")
        >>> read_object(Path("a.json"))
        Traceback (most recent call last):
        segrl.errors.DataError: a.json: holds a list, expected an object
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def listed(problems: Sequence[str]) -> str:
    """Return the first ten problems, each on a line of its own, and how many more there are; nothing for none.

    Example:
        >>> listed([f"image {number}" for number in range(12)]).splitlines()[-2:]
        ['  image 9', '  and 2 more']
    """
    more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "".join(f"\n  {problem}" for problem in problems[:_LISTED]) + more
