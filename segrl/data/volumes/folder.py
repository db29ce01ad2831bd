"""Folders of scans and labels with a `manifest.csv`, checked in full before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from segrl.caching.content import content_key
from segrl.data.contents import SplitContents
from segrl.data.manifest import check_dataset, raise_all, read_manifest
from segrl.data.volumes.case import choose_scaling, say_note
from segrl.data.volumes.intensity import Intensity
from segrl.data.volumes.labels import Labels, ignored_values, label_text, read_labels
from segrl.data.volumes.nifti import read_volume
from segrl.errors import DataError
from segrl.predictions.target import METADATA_COLUMNS, read_spacing

__all__ = ["check_volumes", "file_problems", "load_volumes", "rows_by_scan", "volume_dataset"]

_READ = ("scan", "label", "label_value", "intensity")
COLUMNS = (*_READ, *METADATA_COLUMNS)


def load_volumes(
    path: str | Path,
    split: str | None = None,
    *,
    validate: bool = True,
    limit: int | None = None,
    allow_empty: bool = False,
    allow_outside: bool = False,
    contents: SplitContents | None = None,
) -> Dataset:
    """Load the scans and labels that `<path>/manifest.csv` lists.

    The manifest has the columns image and label (paths relative to the folder, see `read_volume` and `read_label`) and
    optionally split, label_value, intensity, query, reasoning, modality, anatomy, lesion and name; any other column is
    kept as text. `ignored_value`, such as 255, names values of the label of voxels that scores leave out. `spacing_mm`,
    as "[5.0, 0.7, 0.7]" (z, y, x), is read for scans whose files do not say it. Several rows may share a scan, one per
    structure. Without a query column the query is built from lesion, anatomy and modality. Voxels stay in their files.

    Args:
        path: The folder.
        split: Keep only rows with this value in the split column; None keeps all.
        validate: Read every file now (see `check_volumes`), so that a broken one does not stop the training.
        limit: Keep only the first rows, after the split.
        allow_empty: Whether a label without foreground is accepted: there is nothing to find.
        allow_outside: Whether the manifest may name files outside the folder, by `..`, absolute paths or links.
        contents: Collects what the split holds, so that it is compared with the others (see `check_volumes`).

    Returns:
        A data set with the columns scan and label (paths), label_value (text: "3", or "1,2,3" for the union of several
        values; "0", the default, takes every voxel that is not zero), intensity (see `segrl.data.Intensity`; "" leaves
        the choice to `intensity_for`), query, modality, anatomy, lesion, name (the image path, unless the manifest has
        names) and the manifest's other columns. Optional columns that are missing are empty strings.

    Raises:
        DataError: For a missing or unreadable manifest, a missing column, an unknown split, no rows, and, with all
            problems in one message, for bad rows and files.

    Example:
        >>> import tempfile
        >>> from segrl.data import make_synthetic_volumes, write_manifest
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (row,) = make_synthetic_volumes(1, folder, depth=4, size=32)
        ...     files = {"image": row["scan"], "label": row["label"]}
        ...     _ = write_manifest(folder, [{**files, "lesion": "cyst"}, {**files, "lesion": ""}])
        ...     load_volumes(folder)
        Traceback (most recent call last):
        segrl.errors.DataError: ...manifest.csv: 1 problems in 2 rows, expected none:
          line 3 (...): column 'lesion' is empty; fill the cell or delete the row
    """
    found = read_manifest(Path(path), ("image", "label"), split, limit, noun="scan", allow_outside=allow_outside)
    problems, locations, rows = list(found.problems), [], []
    for location, row in zip(found.locations, found.rows, strict=True):
        if "scan" in row:
            raise DataError(f"{found.source}: a column 'scan' beside 'image', which load_volumes calls so; rename it")
        try:
            value, intensity = label_text(row.get("label_value", "")), row.get("intensity", "").strip()
            ignored_values(row.get("ignored_value"))
            if intensity:
                Intensity.parse(intensity)
        except DataError as error:
            problems.append(f"{location}: {error}")
            continue
        rows.append({"scan": row.pop("image"), **row, "label_value": value, "intensity": intensity})
        locations.append(location)
    dataset = volume_dataset(rows)
    contents = contents or SplitContents()
    if validate:
        problems += file_problems(dataset, locations, allow_empty, contents, split or "")
    raise_all(problems, found.total, found.source)
    contents.warn(found.source)
    return dataset


def check_volumes(
    dataset: Dataset, *, allow_empty: bool = False, contents: SplitContents | None = None, split: str = ""
) -> None:
    """Check every row of a data set with the columns scan, label and query, reading one scan at a time.

    A row is bad if its scan or label cannot be read (see `read_volume` and `read_label`), if the label does not fit the
    scan or holds no foreground (with the row's label_value), if the intensity leaves few grey levels of the scan (see
    `intensity_for`), if intensity or query are wrong, or if an earlier row asks the same of the same scan and has
    another label.

    Args:
        dataset: The columns label_value, intensity and name are optional.
        allow_empty: Whether a label without foreground is accepted.
        contents: Collects what the split holds. Pass the same object for all splits to be warned of scans that two of
            them share.
        split: Name of the split, for warnings; "" takes it from a column split, if there is one.

    Raises:
        DataError: For a missing column, for no rows, and for bad rows: all of them, with row number, name and fix.

    Example:
        >>> check_volumes(Dataset.from_list([{"scan": "", "label": "", "query": "Segment the cyst."}]))
        Traceback (most recent call last):
        segrl.errors.DataError: dataset: 2 problems in 1 rows, expected none:
          row 0: .: is a folder without DICOM files, expected a scan file or the folder of a DICOM series
          row 0: the label is missing; give a file or delete the row
    """
    contents = contents or SplitContents()
    check_dataset(
        dataset,
        ("scan", "label", "query"),
        lambda rows, locations: file_problems(rows, locations, allow_empty, contents, split),
    )
    contents.warn("dataset")


def volume_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Build a data set of rows with the columns of `COLUMNS` and equal other columns, in this order."""
    names = [*COLUMNS, *(name for name in (rows[0] if rows else ()) if name not in COLUMNS)]
    columns = {name: [row[name] for row in rows] for name in names}
    columns["label_value"] = [label_text(value) for value in columns["label_value"]]
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in names}))


def file_problems(
    dataset: Dataset,
    locations: Iterable[str],
    allow_empty: bool,
    contents: SplitContents | None = None,
    split: str = "",
) -> Iterator[str]:
    """Yield every problem with the files of a data set, row by row; each scan and label is read once.

    A remark about scans that are not scaled as others of their modality is logged, one line for the data set.
    """
    contents = contents or SplitContents()
    found: dict[int, list[str]] = {}
    notes: list[str] = []
    places = list(locations)
    wanted = (*COLUMNS, "spacing_mm", "split", "ignored_value")  # pictures are not read
    read = [name for name in dict.fromkeys(wanted) if name in dataset.column_names]
    rows: list[dict[str, Any]] = [dict(row) for row in dataset.select_columns(read)]  # type: ignore[call-overload]
    last, scan, key, labels = None, [], "", {}
    for number in rows_by_scan(rows):
        row = rows[number]
        if last is None or _scan_of(row) != last:  # the old scan made room before the new one is read
            last, labels = _scan_of(row), {}
            scan, key = _read_scan(row, notes)
        problems = found.setdefault(number, [])
        problems += scan
        mask, wrong = _read_mask(row, labels, allow_empty, fits=not scan)
        problems += wrong
        if mask is not None and key:
            name = split or str(row.get("split") or "")
            keys = {"image": key, "mask": content_key(mask)}
            if problem := contents.add(name, places[number], row, **keys, share=float(mask.mean())):
                problems.append(problem)
    if notes:
        more = f" (and {len(notes) - 1} more scans)" if len(notes) > 1 else ""
        say_note(notes[0] + more)
    for number, place in enumerate(places):
        yield from (f"{place}: {problem}" for problem in found[number])


def rows_by_scan(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the rows, those that share a scan side by side; else in their order.

    Example:
        >>> rows_by_scan([{"scan": "a"}, {"scan": "b"}, {"scan": "a"}])
        [0, 2, 1]
    """
    scans: dict[str, int] = {}
    scalings: dict[tuple[str, ...], int] = {}

    def place(number: int) -> tuple[int, int]:
        scan = _scan_of(rows[number])
        return scans.setdefault(scan[0], number), scalings.setdefault(scan, number)

    return sorted(range(len(rows)), key=place)


def _scan_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(column) or "") for column in ("scan", "intensity", "modality", "spacing_mm"))


def _read_scan(row: Mapping[str, Any], notes: list[str]) -> tuple[list[str], str]:
    """Return the problems of a row's scan and the key of its content, and add a remark to the notes."""
    path, intensity, modality, spacing = _scan_of(row)
    key = ""
    try:
        volume = read_volume(path)
        key = content_key(volume.voxels)
        if volume.spacing_mm is None:
            read_spacing(spacing, "spacing_mm")
        _, note = choose_scaling(volume, modality, intensity)
        notes += [f"{path!r}: {note}"] if note else []
    except DataError as error:
        return [str(error)], key
    except MemoryError as error:
        return [f"{path}: not enough memory ({error}); crop or resample the scan, or leave it out"], key
    return [], key


def _read_mask(
    row: Mapping[str, Any], labels: dict[str, Labels | DataError], allow_empty: bool, *, fits: bool
) -> tuple[np.ndarray | None, list[str]]:
    """Return a row's mask and its problems; a label without a readable scan is judged alone."""
    path = row["label"]
    if not path:
        return None, ["the label is missing; give a file or delete the row"]
    try:
        if path not in labels:
            try:
                labels[path] = read_labels(path, row["scan"] if fits else None)
            except DataError as error:
                labels[path] = error
        known = labels[path]
        if isinstance(known, DataError):
            raise known
        ignored_values(row.get("ignored_value"))
        return known.mask(row.get("label_value"), allow_empty=allow_empty), []
    except DataError as error:
        return None, [str(error)]
    except MemoryError as error:
        return None, [f"{path}: not enough memory ({error}); crop or resample the label, or leave it out"]
