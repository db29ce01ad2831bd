"""CSV files as people and spreadsheets write them: read where there is one right reading, else one error."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segrl.errors import DataError

__all__ = ["CsvFile", "read_csv"]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class CsvFile:
    """The cells of a CSV file, without the blanks around them.

    Attributes:
        header: Names of the columns.
        lines: (line number in the file, cells) of every row that is not blank.
        delimiter: Between the cells: a comma, a semicolon or a tab.
    """

    header: list[str]
    lines: list[tuple[int, list[str]]]
    delimiter: str

    def problem(self, cells: Sequence[str]) -> str | None:
        """Say what is wrong with the number of cells in a row; None if it is right."""
        if len(cells) == len(self.header):
            return None
        return (
            f"{len(cells)} cells, expected {len(self.header)}; quote cells that hold {_DELIMITERS[self.delimiter]}, as "
            'in "round, dark"'
        )


def read_csv(path: Path, needed: Sequence[str], known: Sequence[str]) -> CsvFile:
    """Read a CSV file in UTF-8.

    Cells may be separated by commas, semicolons or tabs: the one that splits the first line into the needed columns.
    Blanks around cells are dropped, and so are empty cells behind the last column.

    Args:
        path: The file.
        needed: Columns that must be there.
        known: Columns whose name may be written in capitals.

    Raises:
        DataError: No such file, another encoding, a quote that is never closed, a needed column that is missing, or a
            column that is named twice.
    """
    columns = " and ".join(needed)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a CSV file with at least the columns {columns}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: not a UTF-8 CSV file (line {line}: {error}); save it as CSV in UTF-8") from error
    for delimiter in _DELIMITERS:
        header = _header(text, delimiter, known)
        if set(needed) <= set(header):
            break
    else:
        header = _header(text, ",", known)
        missing = [name for name in needed if name not in header]
        raise DataError(f"{path}: no column {missing}; expected {columns} in the first line, found {header}")
    while header and not header[-1]:
        header.pop()
    if len(set(header)) < len(header):
        raise DataError(f"{path}: a column is named twice in {header}; expected different names, rename one")
    return CsvFile(header, _lines(path, text, delimiter, len(header)), delimiter)


def _lines(path: Path, text: str, delimiter: str, width: int) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    lines, begin = [], 1
    try:
        for cells in reader:
            number, begin = begin, reader.line_num + 1
            cells = [cell.strip() for cell in cells]
            while len(cells) > width and not cells[-1]:
                cells.pop()
            if number > 1 and any(cells):
                lines.append((number, cells))
    except csv.Error as error:
        raise DataError(
            f"{path}: line {begin}: not a CSV row ({error}); close every quote, and double a quote inside one, as in "
            '"a ""bright"" spot"'
        ) from error
    return lines


def _header(text: str, delimiter: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])]
    return [name.casefold() if name.casefold() in known else name for name in names]
