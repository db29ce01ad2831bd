"""Files that a table names: found in the folder of the table, and not outside of it unless that is asked for."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PureWindowsPath

from segrl.errors import DataError

__all__ = ["find_file", "refuse_outside"]


def find_file(folder: Path, cell: str, *, allow_outside: bool = False) -> Path:
    r"""Return the path of a file that a cell of a table names; it need not exist.

    A name whose accents are written in another Unicode form than on the disk is found, and `\` separates folders where
    no name holds it.

    Args:
        folder: The folder that the table is in; relative paths start there.
        cell: A relative path, or an absolute one.
        allow_outside: Whether the file may be outside the folder.

    Raises:
        DataError: The file is outside the folder, by `..`, an absolute path or a link.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     find_file(Path(folder), "images\\a.png").relative_to(folder).as_posix()
        'images/a.png'
    """
    path = folder / cell
    if not os.path.lexists(path):
        other = path if "\\" not in cell else folder / PureWindowsPath(cell).as_posix()
        path = _as_on_disk(other) or other
    if not allow_outside:
        refuse_outside(folder, path, cell)
    return path


def refuse_outside(folder: Path, path: Path, cell: str) -> None:
    """Refuse a file that is outside a folder once links are followed.

    Raises:
        DataError: If it is.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"{cell!r} leads outside the folder {folder}; copy the file into it, or pass allow_outside=True "
            "(--allow_outside) if you trust the table"
        )


def _as_on_disk(path: Path) -> Path | None:
    """Return an existing path whose parts are equal up to their Unicode form; None without one."""
    if os.path.lexists(path):
        return path
    if path.name in ("", "..") or str(path).isascii():
        return None
    parent = _as_on_disk(path.parent)
    if parent is None or not parent.is_dir():
        return None
    name = unicodedata.normalize("NFC", path.name)
    return next((entry for entry in parent.iterdir() if unicodedata.normalize("NFC", entry.name) == name), None)
