"""`manifest.csv`: one line per row of a data set, two files each, read and checked for images and volumes alike."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segrl.data.reasoning import build_query
from segrl.errors import DataError, unknown_name

__all__: list[str] = []

TEXTS = ("query", "modality", "anatomy", "lesion", "name")
_LISTED = 10  # problems named in one error


@dataclass(frozen=True)
class ManifestRows:
    """The good rows of a manifest, and what is wrong with the others.

    Attributes:
        rows: All columns of each row as text: the two files as paths, the texts, the manifest's other columns.
        places: Per row, where it is in the manifest, for errors.
        problems: What is wrong with the rows that are left out.
        total: Rows that were asked for, good or bad.
        source: The manifest's path.
    """

    rows: list[dict[str, str]]
    places: list[str]
    problems: list[str]
    total: int
    source: str


def read_manifest(
    folder: Path, files: tuple[str, str], split: str | None, limit: int | None, *, noun: str
) -> ManifestRows:
    """Reads `<folder>/manifest.csv`.

    Args:
        folder: The files are relative to it.
        files: The two columns that hold files; they must be there and filled.
        split: Keep only rows with this value in the split column; None keeps all.
        limit: Keep only the first rows, after the split; None keeps all.
        noun: What a row is about, in errors and built queries: "image" or "scan".

    Returns:
        The rows, each with `files`, the columns of `TEXTS` (empty where missing; the query is built, the name is the
        first file) and the manifest's other columns.

    Raises:
        DataError: For a missing or unreadable manifest, a missing column, an unknown split, no rows, a limit below 1.
    """
    manifest = folder / "manifest.csv"
    header, lines = _read(manifest, files, noun)
    if split is not None:
        lines = _of_split(manifest, header, lines, split)
    if limit is not None:
        if limit < 1:
            raise DataError(f"limit={limit}: expected 1 or more rows, or None for all")
        lines = lines[:limit]
    first = files[0]
    needed = [*files, "query" if "query" in header else "lesion"]
    order = [*files, *TEXTS, *(column for column in header if column not in (*files, *TEXTS))]
    found = ManifestRows([], [], [], len(lines), str(manifest))
    for number, cells in lines:
        place = f"line {number} ({cells[header.index(first)] if header.index(first) < len(cells) else ''})"
        if len(cells) != len(header):
            found.problems.append(f"{place}: {len(cells)} cells, expected {len(header)}; quote cells that hold commas")
            continue
        row = dict.fromkeys(order, "") | dict(zip(header, cells, strict=True))
        row["name"] = row["name"] or row[first]
        empty = [column for column in needed if not row[column].strip()]
        if empty:
            found.problems.append(f"{place}: column {empty[0]!r} is empty; fill the cell or delete the row")
            continue
        if "query" not in header:
            row["query"] = build_query(row["lesion"], row["anatomy"], row["modality"], row["name"], noun=noun)
        row |= {column: str(folder / row[column]) for column in files}
        found.rows.append(row)
        found.places.append(place)
    return found


def raise_all(problems: Sequence[str], total: int, source: str) -> None:
    """Raises one error with all problems, of which the first ten are listed; returns if there are none.

    Raises:
        DataError: If there is a problem.
    """
    if not problems:
        return
    listed = "".join(f"\n  {problem}" for problem in problems[:_LISTED])
    more = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    raise DataError(f"{source}: {len(problems)} problems in {total} rows, expected none:{listed}{more}")


def _read(manifest: Path, files: tuple[str, str], noun: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and (line number in the file, cells) of every row that is not blank."""
    columns = " and ".join(files)
    if not manifest.is_file():
        raise DataError(f"{manifest}: no such file; expected a CSV file with at least the columns {columns}")
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [column.strip() for column in next(reader, [])]
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{manifest}: not a UTF-8 CSV file ({error}); save it as CSV in UTF-8") from error
    missing = [column for column in files if column not in header]
    if missing:
        raise DataError(f"{manifest}: no column {missing}; expected {columns} in the first line, found {header}")
    if len(set(header)) < len(header):
        raise DataError(f"{manifest}: a column is named twice in {header}; expected different names, rename one")
    if "query" not in header and "lesion" not in header:
        raise DataError(f"{manifest}: neither a query nor a lesion column in {header}; add one, to say what to segment")
    if not lines:
        raise DataError(f"{manifest}: no rows under the header; expected one line per {noun}")
    return header, lines


def _of_split(manifest: Path, header: list[str], lines: list[tuple[int, list[str]]], split: str):
    if "split" not in header:
        raise DataError(
            f"{manifest}: split={split!r} was asked for, but there is no split column; add it or drop split="
        )
    at = header.index("split")
    known = dict.fromkeys(cells[at] for _, cells in lines if len(cells) == len(header))
    if split not in known:
        raise unknown_name(f"split of {manifest}", split, known)
    # rows with a wrong number of cells stay, to be reported
    return [(number, cells) for number, cells in lines if len(cells) != len(header) or cells[at] == split]
