"""Folders of scans and labels with a `manifest.csv`, checked in full before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from segrl.caching.content import content_key
from segrl.data.contents import SplitContents
from segrl.data.manifest import check_dataset, raise_all, read_manifest
from segrl.data.volumes.intensity import Intensity
from segrl.data.volumes.nifti import read_label, read_volume
from segrl.data.volumes.volume import Volume
from segrl.errors import DataError
from segrl.predictions.target import METADATA_COLUMNS, read_spacing

__all__ = ["check_volumes", "file_problems", "label_value", "load_volumes", "volume_dataset"]

COLUMNS = ("scan", "label", "label_value", "intensity", *METADATA_COLUMNS)


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
    kept as text. `spacing_mm`, as "[5.0, 0.7, 0.7]" (z, y, x), is read for scans whose files do not say it. Several
    rows may share a scan, one per structure. Without a query column the query is built from lesion, anatomy and
    modality. Voxels stay in their files.

    Args:
        path: The folder.
        split: Keep only rows with this value in the split column; None keeps all.
        validate: Read every file now (see `check_volumes`), so that a broken one does not stop the training.
        limit: Keep only the first rows, after the split.
        allow_empty: Whether a label without foreground is accepted: there is nothing to find.
        allow_outside: Whether the manifest may name files outside the folder, by `..`, absolute paths or links.
        contents: Collects what the split holds, so that it is compared with the others (see `check_volumes`).

    Returns:
        A data set with the columns scan and label (paths), label_value (int; 0, the default, takes every voxel that is
        not zero), intensity (see `segrl.data.Intensity`; "" leaves the choice to `intensity_for`), query, modality,
        anatomy, lesion, name (the image path, unless the manifest has names) and the manifest's other columns. Optional
        columns that are missing are empty strings.

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
            value, intensity = label_value(row.get("label_value", "")), row.get("intensity", "").strip()
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
    scan or holds no foreground (with the row's label_value), if intensity or query are wrong, or if an earlier row asks
    the same of the same scan and has another label.

    Args:
        dataset: The columns label_value, intensity and name are optional.
        allow_empty: Whether a label without foreground is accepted.
        contents: Collects what the split holds. Pass the same object for all splits to be warned of scans that two of
            them share.
        split: Name of the split, for warnings; "" takes it from a column split, if there is one.

    Raises:
        DataError: For a missing column, for no rows, and for bad rows: the first ten with row number, name and fix, and
            their total number.

    Example:
        >>> check_volumes(Dataset.from_list([{"scan": "", "label": "", "query": "Segment the cyst."}]))
        Traceback (most recent call last):
        segrl.errors.DataError: dataset: 2 problems in 1 rows, expected none:
          row 0: .: is a folder, expected a scan file; convert a DICOM series with dcm2niix
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
    features = {name: Value("int64" if name == "label_value" else "string") for name in names}
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names}, features=Features(features))


def file_problems(
    dataset: Dataset,
    locations: Iterable[str],
    allow_empty: bool,
    contents: SplitContents | None = None,
    split: str = "",
) -> Iterator[str]:
    """Yield every problem with the files of a data set, row by row; neighbouring rows read a common scan once."""
    volume: Volume | DataError | None = None
    last = key = ""
    contents = contents or SplitContents()
    for location, row in zip(locations, dataset, strict=True):
        assert isinstance(row, dict)
        if row["scan"] != last or volume is None:
            try:
                volume, last = None, row["scan"] or ""  # the old scan makes room for the new one
                volume = read_volume(last)
                key = content_key(volume.voxels)
            except DataError as error:
                volume = error
        try:
            if isinstance(volume, Volume) and volume.spacing_mm is None:
                read_spacing(row.get("spacing_mm"), "spacing_mm")
        except DataError as error:
            yield f"{location}: {error}"
        if isinstance(volume, DataError):
            yield f"{location}: {volume}"
        if not row["label"]:
            yield f"{location}: the label is missing; give a file or delete the row"
            continue
        try:
            if row.get("intensity"):
                Intensity.parse(row["intensity"])
            scan = volume if isinstance(volume, Volume) else None
            mask = read_label(row["label"], scan, label_value(row.get("label_value")), allow_empty=allow_empty)
        except DataError as error:
            yield f"{location}: {error}"
            continue
        if scan is not None:
            name = split or str(row.get("split") or "")
            keys = {"image": key, "mask": content_key(mask)}
            if problem := contents.add(name, location, row, **keys, share=float(mask.mean())):
                yield f"{location}: {problem}"


def label_value(value: Any) -> int:
    """Read the label value of a manifest or a row: a whole number of 0 or more; None and "" mean 0.

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
