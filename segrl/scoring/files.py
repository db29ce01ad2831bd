"""Read files of predictions and ground truths by row: JSON lines, CSV, parquet, folders of them."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segrl.errors import DataError

__all__ = ["StoredRow", "read_predictions", "read_targets", "target_of"]

BATCH = 256  # rows of a parquet file in memory at once


@dataclass(frozen=True)
class StoredRow:
    """One row of a file.

    Attributes:
        where: File and line, for errors.
        values: The columns.
        folder: The folder that relative paths start from.
    """

    where: str
    values: Mapping[str, Any]
    folder: Path


def read_predictions(path: Path) -> Iterator[StoredRow]:
    """Yield the rows of a file, or of all `predictions_*.jsonl` or else `completions_*.parquet` of a folder.

    Files of a folder are read in the order of their names.

    Raises:
        DataError: The file is missing, broken or of another kind; the message names the line.
    """
    if not path.is_dir():
        yield from _rows(path)
        return
    files = sorted(path.glob("predictions_*.jsonl")) or sorted(path.glob("completions_*.parquet"))
    if not files:
        raise DataError(
            f"{path}: neither predictions_*.jsonl nor completions_*.parquet in this folder; expected a file, or the "
            "folder 'completions' of a run"
        )
    for file in files:
        yield from _rows(file)


def read_targets(path: Path, on: str) -> dict[str, StoredRow]:
    """Return the rows of a file, or of the `manifest.csv` in a folder, by their value in the column `on`.

    A missing name is replaced by the path of the image.

    Raises:
        DataError: As in `read_predictions`; also if a value is missing or repeated.
    """
    found: dict[str, StoredRow] = {}
    for row in _rows(path / "manifest.csv" if path.is_dir() else path):
        key = row.values.get(on)
        if key in (None, "") and on == "name":
            key = row.values.get("image")  # as in the folders of `segrl.data.load_folder`
        if key in (None, ""):
            raise DataError(
                f"{row.where}: no column {on!r} to join by; expected one of {', '.join(map(str, row.values))}"
            )
        if str(key) in found:
            raise DataError(
                f"{row.where}: {on} {key!r} was there before, at {found[str(key)].where}; names must differ"
            )
        found[str(key)] = row
    return found


def target_of(row: StoredRow, ground_truths: Mapping[str, StoredRow], on: str) -> StoredRow:
    """Return the ground truth of a prediction.

    Raises:
        DataError: The prediction lacks the column, or there is no ground truth with this value.
    """
    key = row.values.get(on)
    if key in (None, ""):
        raise DataError(f"{row.where}: no column {on!r} to join by; expected one of {', '.join(sorted(row.values))}")
    if str(key) not in ground_truths:
        closest = difflib.get_close_matches(str(key), ground_truths, n=1)
        hint = f"; did you mean {closest[0]!r}?" if closest else ""
        raise DataError(f"{row.where}: no ground truth with {on} {str(key)!r:.100} among {len(ground_truths)}{hint}")
    return ground_truths[str(key)]


def _rows(path: Path) -> Iterator[StoredRow]:
    readers = {".jsonl": _json_lines, ".parquet": _parquet, ".csv": _csv}
    if path.suffix not in readers:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; expected {', '.join(readers)}")
    try:
        for line, values in readers[path.suffix](path):
            yield StoredRow(f"{path.name}, {line}", values, path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}; is the line cut off?") from error
            if not isinstance(values, dict):
                raise DataError(f'{where}: {line[:50]!r}; expected an object, such as {{"completion": "..."}}')
            yield f"line {number}", values


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise DataError(
                        f"{path.name}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells; quote "
                        "cells that hold commas"
                    )
                yield f"line {reader.line_num}", values
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a UTF-8 CSV file ({error}); save it as CSV in UTF-8") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    yield f"row {number}", values
                    number += 1
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}; was it written to the end?") from error
