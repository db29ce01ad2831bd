"""JSON lines, in which stages leave their results for each other: one object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from segrl.errors import DataError
from segrl.files.whole import write_whole

__all__ = ["read_json_lines", "write_json_lines"]

Row = TypeVar("Row")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one line a row; the file is replaced at once. No rows make an empty file.

    Example:
        >>> write_json_lines(Path("texts.jsonl"), [{"id": "a"}, {"id": "b"}])
        >>> Path("texts.jsonl").read_text()
        '{"id": "a"}\\n{"id": "b"}\\n'
    """
    write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def read_json_lines(path: Path, read: Callable[[Any], Row], stage: str, wrong: str = "damaged") -> list[Row]:
    r"""Read what `write_json_lines` wrote. Only \n ends a line: a text may hold other separators, such as U+2028.

    Args:
        path: The file.
        read: Turns the value of a line into a row.
        stage: That writes the file, for messages.
        wrong: Word for a line of another layout.

    Returns:
        The rows; none for an empty file.

    Raises:
        DataError: No such file, or a line that is no JSON or that `read` cannot read; names file, line and stage.

    Example:
        >>> _ = Path("texts.jsonl").write_text('{"id": "a"}\n{}\n')
        >>> read_json_lines(Path("texts.jsonl"), lambda row: row["id"], "write")
        Traceback (most recent call last):
        segrl.errors.DataError: texts.jsonl, line 2: damaged ('id'); run the stage `write` again
    """
    try:
        content = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); run the stage `{stage}` first") from error
    rows = []
    for number, line in enumerate(content.split("\n") if content else [], 1):
        try:
            rows.append(read(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {wrong} ({error}); run the stage `{stage}` again") from error
    return rows
