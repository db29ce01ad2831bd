"""Files that appear whole or not at all: a reader, or a process that goes on after a kill, never sees half of one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

__all__ = ["is_unfinished", "remove_unfinished", "whole_file", "write_whole"]

_UNFINISHED = re.compile(r"\..+\.(\d+)\.tmp(\..+)?", re.DOTALL)


@contextmanager
def whole_file(path: str | os.PathLike[str], *, suffix: str = "") -> Iterator[Path]:
    """Yield the path of an unfinished file beside `path`, which takes its place at the end of the block.

    After an error nothing is left, and an earlier file stays as it was. Only a killed process leaves the unfinished
    file, `.NAME.PROCESS.tmp`, which `is_unfinished` knows.

    Args:
        path: Of the file. Missing folders are created, an existing file is replaced.
        suffix: End of the name of the unfinished file, for libraries that look at it, such as ".nii.gz".

    Example:
        >>> with whole_file("new/notes.txt") as unfinished:
        ...     _ = unfinished.write_text("whole")
        ...     Path("new/notes.txt").exists()
        False
        >>> [path.name for path in Path("new").iterdir()]
        ['notes.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file at once, as `whole_file`; text as UTF-8.

    Returns:
        The path.

    Example:
        >>> write_whole(Path("new", "notes.txt"), "whole").read_text()
        'whole'
    """
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Return whether a file has the name of an unfinished one of `whole_file`, with any suffix.

    Where no process writes, it is what a killed one left.

    Example:
        >>> [is_unfinished(name) for name in (".notes.txt.7.tmp", "out/.a.nii.gz.7.tmp.nii.gz", ".draft.tmp", "7.tmp")]
        [True, True, False, False]
    """
    return _UNFINISHED.fullmatch(Path(path).name) is not None


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left in a folder; files of processes that are alive stay, and so do other folders.

    Example:
        >>> Path("out").mkdir()
        >>> _ = Path("out", ".mask.png.4194305.tmp.png").write_bytes(b"half")  # no process has this number
        >>> remove_unfinished("out")
        >>> list(Path("out").iterdir())
        []
    """
    for path in Path(folder).glob(".*.tmp*"):
        found = _UNFINISHED.fullmatch(path.name)
        if found is not None and not psutil.pid_exists(int(found[1])):
            path.unlink(missing_ok=True)
