"""Folders of scans and labels with a `manifest.csv`, checked in full before training starts."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from segrl.data.manifest import TEXTS, raise_all, read_manifest
from segrl.data.volumes.intensity import Intensity
from segrl.data.volumes.nifti import Volume, read_label, read_volume
from segrl.errors import DataError

__all__ = ["check_volumes", "load_volumes", "write_manifest"]

COLUMNS = ("scan", "label", "label_value", "intensity", *TEXTS)


def load_volumes(
    path: str | Path,
    split: str | None = None,
    *,
    validate: bool = True,
    limit: int | None = None,
    allow_empty: bool = False,
) -> Dataset:
    """Loads scans and their labels listed in `<path>/manifest.csv`.

    The manifest has the columns image and label (paths relative to the folder, see `read_volume` and `read_label`) and
    optionally split, label_value, intensity, query, reasoning, modality, anatomy, lesion and name; any other column is
    kept as text. Several rows may share a scan, one per structure. Without a query column the query is built from
    lesion, anatomy and modality. Voxels stay in their files.

    Args:
        path: The folder.
        split: Keep only rows with this value in the split column; None keeps all.
        validate: Read every file now (see `check_volumes`) instead of meeting the broken one during training.
        limit: Keep only the first rows, after the split.
        allow_empty: Whether a label without foreground is fine: there is nothing to find.

    Returns:
        A data set with the columns scan and label (paths), label_value (int; 0, also where it is not given, takes every
        voxel that is not zero), intensity (see `segrl.data.Intensity`; "" leaves the choice to `intensity_for`),
        query, modality, anatomy, lesion, name (the image path, unless the manifest has names) and the manifest's other
        columns. Optional columns that are missing are empty strings.

    Raises:
        DataError: For a missing or unreadable manifest, a missing column, an unknown split, no rows, and, with all
            problems in one message, for bad rows and files.
    """
    found = read_manifest(Path(path), ("image", "label"), split, limit, noun="scan")
    problems, places, rows = list(found.problems), [], []
    for place, row in zip(found.places, found.rows, strict=True):
        if "scan" in row:
            raise DataError(f"{found.source}: a column 'scan' beside 'image', which load_volumes calls so; rename it")
        try:
            value, intensity = label_value(row.get("label_value", "")), row.get("intensity", "").strip()
            if intensity:
                Intensity.parse(intensity)
        except DataError as error:
            problems.append(f"{place}: {error}")
            continue
        rows.append({"scan": row.pop("image"), **row, "label_value": value, "intensity": intensity})
        places.append(place)
    dataset = volume_dataset(rows)
    if validate:
        problems += file_problems(dataset, places, allow_empty)
    raise_all(problems, found.total, found.source)
    return dataset


def check_volumes(dataset: Dataset, *, allow_empty: bool = False) -> None:
    """Checks every row of a data set with the columns scan, label and query, reading one scan at a time.

    A row is bad when its scan or label cannot be read (see `read_volume` and `read_label`), the label does not fit the
    scan, holds no foreground or not the row's label_value, or when intensity or query are wrong.

    Args:
        dataset: The columns label_value, intensity and name are optional.
        allow_empty: Whether a label without foreground is fine.

    Raises:
        DataError: For a missing column, for no rows, and for bad rows: the first ten with row number, name and fix, and
            their total number.
    """
    missing = [column for column in ("scan", "label", "query") if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"dataset lacks the columns {missing}: expected scan, label, query, found {dataset.column_names}"
        )
    if not len(dataset):
        raise DataError("dataset has no rows: expected at least one; check the split and the filters before it")
    names = dataset["name"] if "name" in dataset.column_names else [""] * len(dataset)
    places = [f"row {index} ({name})" if name else f"row {index}" for index, name in enumerate(names)]
    problems = [
        f"{place}: the query is empty; write what to segment"
        for place, query in zip(places, dataset["query"], strict=True)
        if not (query or "").strip()
    ]
    raise_all([*problems, *file_problems(dataset, places, allow_empty)], len(dataset), "dataset")


def write_manifest(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes `<folder>/manifest.csv`, the list that `load_volumes` and `load_folder` read; replaces one that is there.

    Args:
        folder: Exists; the rows' files are relative to it.
        rows: One mapping from column to value per row; all have the same columns.

    Returns:
        The manifest's path.

    Raises:
        DataError: If there are no rows, or their columns differ.
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


def volume_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows with the columns of `COLUMNS` and the same other columns as a data set, in this order."""
    names = [*COLUMNS, *(name for name in (rows[0] if rows else ()) if name not in COLUMNS)]
    features = {name: Value("int64" if name == "label_value" else "string") for name in names}
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names}, features=Features(features))


def file_problems(dataset: Dataset, places: Iterable[str], allow_empty: bool) -> Iterator[str]:
    """Every problem with the files of a data set, row by row; a scan that follows itself is read once."""
    volume: Volume | DataError | None = None
    last = ""
    for place, row in zip(places, dataset, strict=True):
        assert isinstance(row, dict)
        if row["scan"] != last or volume is None:
            try:
                volume, last = None, row["scan"] or ""  # the old scan makes room for the new one
                volume = read_volume(last)
            except DataError as error:
                volume = error
        if isinstance(volume, DataError):
            yield f"{place}: {volume}"
        if not row["label"]:
            yield f"{place}: the label is missing; give a file or delete the row"
            continue
        try:
            if row.get("intensity"):
                Intensity.parse(row["intensity"])
            scan = volume if isinstance(volume, Volume) else None
            read_label(row["label"], scan, label_value(row.get("label_value")), allow_empty=allow_empty)
        except DataError as error:
            yield f"{place}: {error}"


def label_value(value: Any) -> int:
    """A label value of a manifest or a row: a whole number of 0 or more; None and "" mean 0.

    Raises:
        DataError: If it is anything else.
    """
    text = str(value if value is not None else "").strip() or "0"
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (number >= 0 and number.is_integer()):
        raise DataError(f"label_value {text!r}: expected a whole number, 0 for every voxel that is not zero")
    return int(number)
