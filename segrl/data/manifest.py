"""Read, check and write `manifest.csv`, one line per row of a data set, for images and volumes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segrl.data.csv_files import CsvFile, read_csv
from segrl.data.formats.sources import listed
from segrl.data.listed_files import find_file
from segrl.data.reasoning import build_query
from segrl.data.text_columns import check_texts, name_classes
from segrl.errors import DataError, unknown_name
from segrl.files.whole import whole_file
from segrl.predictions.target import METADATA_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ManifestRows", "check_dataset", "parts_of", "raise_all", "read_manifest", "write_manifest"]

_PARTS = "\0"  # between the files of one cell; no path holds it


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
    folder: Path,
    files: tuple[str, str],
    split: str | None,
    limit: int | None,
    *,
    noun: str,
    merged: Sequence[str] = (),
    allow_outside: bool = False,
) -> ManifestRows:
    """Read `<folder>/manifest.csv`.

    Cells are read as spreadsheets write them, see `segrl.data.csv_files.read_csv`; a split is found whatever its
    capitals; paths may be written with another separator or Unicode form, see `segrl.data.listed_files.find_file`.

    Args:
        folder: The files are relative to it.
        files: The two columns that hold files; neither they nor their cells may be missing.
        split: Keep only rows with this value in the split column; None keeps all.
        limit: Keep only the first rows, after the split; None keeps all.
        noun: "image" or "scan", for errors and built queries.
        merged: Columns of files whose cells may name several, as in "a.png;a_1.png"; see `parts_of`.
        allow_outside: Whether files may be outside the folder.

    Returns:
        The rows, each with `files`, the metadata columns (a missing query is built, a missing name is the first file,
        other missing ones are empty) and the manifest's other columns.

    Raises:
        DataError: For a missing or unreadable manifest, a missing column, an unknown split, rows without a split where
            one is asked for, no rows, a limit below 1.
    """
    manifest = folder / "manifest.csv"
    table = read_csv(manifest, files, (*files, *METADATA_COLUMNS, "split", "reasoning", "label_value", "intensity"))
    lines = _lines(manifest, table, noun)
    found = ManifestRows([], [], [], 0, str(manifest))
    if split is not None:
        lines = _of_split(manifest, table, split, found.problems)
    if limit is not None:
        if limit < 1:
            raise DataError(f"limit={limit}: expected 1 or more rows, or None for all")
        lines = lines[:limit]
    found = replace(found, total=len(lines) + len(found.problems))
    for number, cells in lines:
        location = _location(table, number, cells, files[0])
        try:
            found.rows.append(_row(folder, table, cells, files, noun, merged, allow_outside))
            found.locations.append(location)
        except DataError as error:
            found.problems.append(f"{location}: {error}")
    return found


def parts_of(path: str) -> list[str]:
    """Return the paths of the files that are merged into one, of a column of `ManifestRows.rows`."""
    return path.split(_PARTS)


def raise_all(problems: Sequence[str], total: int, source: str) -> None:
    """Raise one error that lists all problems; return if there are none.

    Raises:
        DataError: If there is a problem.
    """
    if problems:
        raise DataError(f"{source}: {len(problems)} problems in {total} rows, expected none:{listed(problems)}")


def check_dataset(
    dataset: Dataset, columns: Sequence[str], file_problems: Callable[[Dataset, list[str]], Iterable[str]]
) -> None:
    """Check every row of a data set.

    Args:
        dataset: Any data set; the column name is optional.
        columns: Required columns, one of them query. Columns of classes count as the names of the classes.
        file_problems: Yields the problems with the files, given the data set and the location of each row.

    Raises:
        DataError: For a missing column, a column of texts that holds something else, for no rows, and for bad rows, see
            `raise_all`.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"dataset lacks the columns {missing}: expected {', '.join(columns)}, found {dataset.column_names}"
            f"{_rename_advice(dataset, missing)}"
        )
    check_texts(dataset)
    dataset = name_classes(dataset)
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


def _rename_advice(dataset: Dataset, missing: Sequence[str]) -> str:
    """Name the column that may hold the questions under another name."""
    if "query" not in missing:
        return ""
    likely = [name for name in ("text", "question", "prompt", "caption", "sentence") if name in dataset.column_names]
    found = likely[0] if likely else "..."
    return f"; the question to ask is the column query: dataset.rename_column({found!r}, 'query')"


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
    with whole_file(manifest) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def _lines(manifest: Path, table: CsvFile, noun: str) -> list[tuple[int, list[str]]]:
    if "query" not in table.header and "lesion" not in table.header:
        raise DataError(
            f"{manifest}: neither a query nor a lesion column in {table.header}; add one, to say what to segment"
        )
    if not table.lines:
        raise DataError(f"{manifest}: no rows under the header; expected one line per {noun}")
    return table.lines


def _location(table: CsvFile, number: int, cells: Sequence[str], first: str) -> str:
    at = table.header.index(first)
    return f"line {number} ({cells[at] if at < len(cells) else ''})"


def _of_split(manifest: Path, table: CsvFile, split: str, problems: list[str]) -> list[tuple[int, list[str]]]:
    """Return the rows of a split, and add the rows that name none to `problems`: they would be in no split at all."""
    if "split" not in table.header:
        raise DataError(
            f"{manifest}: split={split!r} was asked for, but there is no split column; add it or drop split="
        )
    at = table.header.index("split")
    whole = [(number, cells) for number, cells in table.lines if table.problem(cells) is None]
    known = dict.fromkeys(cells[at] for _, cells in whole if cells[at])
    wanted = split.strip().casefold()
    if wanted not in map(str.casefold, known):
        raise unknown_name(f"split of {manifest}", split, known)
    problems += [
        f"{_location(table, number, cells, table.header[0])}: column 'split' is empty; fill the cell or delete the row"
        for number, cells in whole
        if not cells[at]
    ]
    # Rows with a wrong number of cells are kept, so that they are reported.
    return [
        (number, cells)
        for number, cells in table.lines
        if table.problem(cells) is not None or cells[at].casefold() == wanted
    ]


def _row(
    folder: Path,
    table: CsvFile,
    cells: Sequence[str],
    files: tuple[str, str],
    noun: str,
    merged: Sequence[str],
    allow_outside: bool,
) -> dict[str, str]:
    """Return a row with every column of `ManifestRows.rows`; raise for one that is not whole."""
    if problem := table.problem(cells):
        raise DataError(problem)
    order = dict.fromkeys([*files, *METADATA_COLUMNS, *table.header], "")
    row = order | dict(zip(table.header, cells, strict=True))
    row["name"] = row["name"] or row[files[0]]
    for column in (*files, "query" if "query" in table.header else "lesion"):
        if not row[column]:
            raise DataError(f"column {column!r} is empty; fill the cell or delete the row")
    if "query" not in table.header:
        row["query"] = build_query(row["lesion"], row["anatomy"], row["modality"], row["name"], noun=noun)
    for column in files:
        names = [row[column]]
        if column in merged and ";" in row[column] and not (folder / row[column]).exists():
            names = [name.strip() for name in row[column].split(";") if name.strip()]
        try:
            row[column] = _PARTS.join(str(find_file(folder, name, allow_outside=allow_outside)) for name in names)
        except DataError as error:
            raise DataError(f"{column}: {error}") from error
    return row
