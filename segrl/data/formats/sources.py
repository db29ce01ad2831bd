"""Files of annotations as the readers of formats take them, what they name, and their problems in one message."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segrl.errors import DataError

__all__ = ["by_id", "listed", "named_file", "read_bytes", "read_json", "read_object"]

_LISTED = 1000  # lines of one error


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


def by_id(entries: Sequence[Any], where: str) -> dict[Any, Any]:
    """Return entries by their "id"; an entry that stands there twice, unchanged, counts once.

    Args:
        entries: Mappings, as JSON has them.
        where: What they are, for errors.

    Raises:
        DataError: Entries without a number or text as their id, or different ones with one id: all are listed.

    Example:
        >>> by_id([{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}], "images of c.json")
        Traceback (most recent call last):
        segrl.errors.DataError: images of c.json: 1 ids cannot be told apart, expected one entry for each:
          id 7: entry 0 (a.png) and entry 1 (b.png)
    """
    found: dict[Any, tuple[int, Any]] = {}
    problems = []
    for number, entry in enumerate(entries):
        key = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(key, bool) or not isinstance(key, int | float | str):
            problems.append(f"{_called(number, entry)}: id {key!r}, expected a number or a text")
            continue
        first, other = found.setdefault(key, (number, entry))
        if other != entry:
            problems.append(f"id {key}: {_called(first, other)} and {_called(number, entry)}")
    if problems:
        count = len(problems)
        raise DataError(f"{where}: {count} ids cannot be told apart, expected one entry for each:{listed(problems)}")
    return {key: entry for key, (_, entry) in found.items()}


def _called(number: int, entry: Any) -> str:
    names = [str(entry[key]) for key in ("file_name", "name") if isinstance(entry, dict) and key in entry]
    return f"entry {number} ({names[0]})" if names else f"entry {number}"


def named_file(folder: Path, name: Any) -> Path:
    """Return the file that annotations name, relative to a folder.

    Links are followed wherever they lead, as COCO's folders are often links; names are not.

    Raises:
        DataError: No text, an absolute path, one that leads outside the folder by `..`, or no such file; begins with
            the name.

    Example:
        >>> named_file(Path("images"), "../x.png")
        Traceback (most recent call last):
        segrl.errors.DataError: ../x.png: leads outside the folder images; copy the file into it, and name it from there
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"{name!r}: expected the name of a file in {folder}")
    plain = Path(os.path.normpath(name))
    if plain.is_absolute() or plain.parts[:1] == ("..",):
        raise DataError(f"{name}: leads outside the folder {folder}; copy the file into it, and name it from there")
    if not (folder / name).is_file():
        raise DataError(f"{name}: no such file in {folder}")
    return folder / name


def listed(problems: Sequence[str]) -> str:
    """Return all problems, each on a line of its own; after a thousand how many more there are; nothing for none.

    Example:
        >>> listed([f"image {number}" for number in range(1002)]).splitlines()[-2:]
        ['  image 999', '  and 2 more']
    """
    more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "".join(f"\n  {problem}" for problem in problems[:_LISTED]) + more
