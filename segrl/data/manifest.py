"""Read, check and write `manifest.csv`, one line per row of a data set, for images and volumes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from segrl.data.reasoning import build_query
from segrl.errors import DataError, unknown_name
from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["ManifestRows", "check_dataset", "raise_all", "read_manifest", "write_manifest"]

_LISTED = 10  # problems named in one error


@dataclass(frozen=True)
class ManifestRows:
    """The good rows of a manifest, and the problems of the others.

    Attributes:
        rows: All columns of each row as text: the two files as paths, the metadata, the manifest's other columns.
        locations: Where each row is in the manifest, for errors.
        problems: One line for each bad row.
        total: Number of selected rows, good or bad.
        source: Path of the manifest.
    """

    rows: list[dict[str, str]]
    locations: list[str]
    problems: list[str]
    total: int
    source: str


def read_manifest(
    folder: Path, files: tuple[str, str], split: str | None, limit: int | None, *, noun: str
) -> ManifestRows:
    """Read `<folder>/manifest.csv`.

    Args:
        folder: The files are relative to it.
        files: The two columns that hold files; neither they nor their cells may be missing.
        split: Keep only rows with this value in the split column; None keeps all.
        limit: Keep only the first rows, after the split; None keeps all.
        noun: "image" or "scan", for errors and built queries.

    Returns:
        The rows, each with `files`, the metadata columns (a missing query is built, a missing name is the first file,
        other missing ones are empty) and the manifest's other columns.

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
    order = list(dict.fromkeys([*files, *METADATA_COLUMNS, *header]))
    found = ManifestRows([], [], [], len(lines), str(manifest))
    for number, cells in lines:
        line = f"line {number} ({cells[header.index(first)] if header.index(first) < len(cells) else ''})"
        if len(cells) != len(header):
            found.problems.append(f"{line}: {len(cells)} cells, expected {len(header)}; quote cells that hold commas")
            continue
        row = dict.fromkeys(order, "") | dict(zip(header, cells, strict=True))
        row["name"] = row["name"] or row[first]
        empty = [column for column in needed if not row[column].strip()]
        if empty:
            found.problems.append(f"{line}: column {empty[0]!r} is empty; fill the cell or delete the row")
            continue
        if "query" not in header:
            row["query"] = build_query(row["lesion"], row["anatomy"], row["modality"], row["name"], noun=noun)
        row |= {column: str(folder / row[column]) for column in files}
        found.rows.append(row)
        found.locations.append(line)
    return found


def raise_all(problems: Sequence[str], total: int, source: str) -> None:
    """Raise one error for all problems, which lists the first ten; return if there are none.

    Raises:
        DataError: If there is a problem.
    """
    if not problems:
        return
    listed = "".join(f"\n  {problem}" for problem in problems[:_LISTED])
    more = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    raise DataError(f"{source}: {len(problems)} problems in {total} rows, expected none:{listed}{more}")


def check_dataset(
    dataset: Dataset, columns: Sequence[str], file_problems: Callable[[Dataset, list[str]], Iterable[str]]
) -> None:
    """Check every row of a data set.

    Args:
        dataset: Any data set; the column name is optional.
        columns: Required columns, one of them query.
        file_problems: Yields the problems with the files, given the data set and the location of each row.

    Raises:
        DataError: For a missing column, for no rows, and for bad rows, see `raise_all`.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"dataset lacks the columns {missing}: expected {', '.join(columns)}, found {dataset.column_names}"
        )
    if not len(dataset):
        raise DataError("dataset has no rows: expected at least one; check the split and the filters before it")
    names = dataset["name"] if "name" in dataset.column_names else [""] * len(dataset)
    locations = [f"row {index} ({name})" if name else f"row {index}" for index, name in enumerate(names)]
    problems = [
        f"{location}: the query is empty; write what to segment"
        for location, query in zip(locations, dataset["query"], strict=True)
        if not (query or "").strip()
    ]
    raise_all([*problems, *file_problems(dataset, locations)], len(dataset), "dataset")


def write_manifest(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `<folder>/manifest.csv`, which `load_folder` and `load_volumes` read; an existing one is replaced.

    Args:
        folder: An existing folder; the rows' files are relative to it.
        rows: One mapping from column to value per row; all have the same columns.

    Returns:
        Path of the manifest.

    Raises:
        DataError: If there are no rows, or their columns differ.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = write_manifest(folder, [{"image": "a.png", "mask": "b.png", "query": "Where, if at all?"}])
        ...     manifest.read_text().splitlines()
        ['image,mask,query', 'a.png,b.png,"Where, if at all?"']
    """
    manifest = Path(folder) / "manifest.csv"
    header = list(rows[0]) if rows else []
    for number, row in enumerate(rows):
        if set(row) != set(header):
            raise DataError(
                f"row {number} for {manifest} has the columns {list(row)}, row 0 has {header}; expected the same"
            )
    if not rows:
        raise DataError(f"no rows for {manifest}: expected at least one")
    unfinished = manifest.with_name(".manifest.csv")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    return unfinished.replace(manifest)


def _read(manifest: Path, files: tuple[str, str], noun: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and (line number in the file, cells) of every row that is not blank."""
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
    # Rows with a wrong number of cells are kept, so that they are reported.
    return [(number, cells) for number, cells in lines if len(cells) != len(header) or cells[at] == split]
