"""Image and mask folders with a `manifest.csv`, checked in full before training starts.

The checks open every file once and report all problems together, so that a broken mask does not stop a run after hours
of training and all bad files can be fixed at once.
"""

# H, W pixels of an image and its mask, after EXIF rotation

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps

from segrl.data.manifest import check_dataset, raise_all, read_manifest
from segrl.errors import DataError
from segrl.geometry.masks import binarize, mask_values
from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["check_rows", "load_folder"]

_BAD_FILE = (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError)  # PIL raises these for broken files


def load_folder(
    path: str | Path, split: str | None = None, *, validate: bool = True, limit: int | None = None
) -> Dataset:
    """Load the pairs of image and mask that `<path>/manifest.csv` lists.

    The manifest has the columns image and mask (paths relative to the folder) and optionally split, query, reasoning,
    modality, anatomy, lesion and name; any other column is kept as text. Without a query column the query is built from
    lesion, anatomy and modality. Pixels are decoded when a row is read.

    Args:
        path: The folder.
        split: Keep only rows with this value in the split column; None keeps all.
        validate: Open every file now (see `check_rows`), so that a broken one does not stop the training.
        limit: Keep only the first rows, after the split.

    Returns:
        A data set with the columns image, mask, query, modality, anatomy, lesion, name (the image path, unless the
        manifest has names) and the manifest's other columns. Optional columns that are missing are empty strings.

    Raises:
        DataError: For a missing or unreadable manifest, a missing column, an unknown split, no rows, and, with all
            problems in one message, for bad rows and files.

    Example:
        >>> import tempfile
        >>> from segrl.data import make_synthetic, write_folder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_folder(make_synthetic(3, size=32), folder, split=["train", "test", "train"])
        ...     rows = load_folder(folder, "train")
        >>> rows["name"][:], rows["lesion"][:]
        (['synthetic_0_00000', 'synthetic_0_00002'], ['ring abscess', 'dark cyst'])
    """
    found = read_manifest(Path(path), ("image", "mask"), split, limit, noun="image")
    names = list(found.rows[0]) if found.rows else ["image", "mask", *METADATA_COLUMNS]
    columns = {name: [row[name] for row in found.rows] for name in names}
    features = {name: Image() if name in ("image", "mask") else Value("string") for name in names}
    dataset = Dataset.from_dict(columns, features=Features(features))
    problems = [*found.problems, *(_problems(dataset, found.locations) if validate else ())]
    raise_all(problems, found.total, found.source)
    return dataset


def check_rows(dataset: Dataset) -> None:
    """Check every row of a data set with the columns image, mask and query, reading one row at a time.

    A row is bad if its image or mask is missing, corrupt or not 8-bit, if the two differ in size after EXIF rotation,
    if the mask holds more than two values, or if the query is empty. An empty mask is accepted: there is nothing to
    find.

    Raises:
        DataError: For a missing or wrongly typed column, for no rows, and for bad rows: the first ten with row number,
            name and fix, and their total number.

    Example:
        >>> from segrl.data import make_synthetic
        >>> check_rows(make_synthetic(2, size=32))
        >>> check_rows(make_synthetic(2, size=32).map(lambda row: {"query": ""}))
        Traceback (most recent call last):
        segrl.errors.DataError: dataset: 2 problems in 2 rows, expected none:
          row 0 (synthetic_0_00000): the query is empty; write what to segment
          row 1 (synthetic_0_00001): the query is empty; write what to segment
    """
    check_dataset(dataset, ("image", "mask", "query"), _problems)


def _problems(dataset: Dataset, locations: Iterable[str]) -> Iterator[str]:
    """Yield every problem with the files of a data set, row by row; at most one per file and one per pair."""
    for column in ("image", "mask"):
        if not isinstance(dataset.features[column], Image):
            raise DataError(
                f"column {column!r} has the type {dataset.features[column]}: expected datasets.Image; "
                f"use dataset.cast_column({column!r}, datasets.Image())"
            )
    encoded = dataset.select_columns(["image", "mask"])
    for column in ("image", "mask"):
        encoded = encoded.cast_column(column, Image(decode=False))
    for location, row in zip(locations, encoded, strict=True):
        assert isinstance(row, dict)
        arrays: list[np.ndarray] = []
        for column in ("image", "mask"):
            try:
                arrays.append(_decode(row[column], mask=column == "mask"))
                if column == "mask":
                    binarize(arrays[-1], "mask")
            except (DataError, *_BAD_FILE) as error:
                yield f"{location}: {column}: {_reason(error, row[column])}"
        if len(arrays) == 2 and arrays[0].shape[:2] != arrays[1].shape[:2]:
            (height, width), (mask_height, mask_width) = (array.shape[:2] for array in arrays)
            yield (
                f"{location}: the mask is {mask_width} x {mask_height} px, the image {width} x {height}; expected the "
                "same size after EXIF rotation; resize the mask with nearest neighbour"
            )


def _decode(value: dict[str, Any] | None, *, mask: bool) -> np.ndarray:
    """Decode an encoded image, upright: (H, W) or (H, W, C)."""
    if value is None:
        raise DataError("is missing (None); give a file or delete the row")
    source = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
    with PILImage.open(source) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1:
            raise DataError(f"has {pages} pages, expected one; save each page as a file of its own")
        if image.mode[0] in "IF" and not mask:
            raise DataError(f"has {image.mode} pixels, expected 8 bits per channel; window it and scale it to 0-255")
        upright = ImageOps.exif_transpose(image)
        return mask_values(upright) if mask else np.asarray(upright)


def _reason(error: Exception, value: dict[str, Any] | None) -> str:
    path = (value or {}).get("path") or ""
    if isinstance(error, DataError):
        return str(error).removeprefix("mask: ") + (f" [{path}]" if path else "")
    if isinstance(error, FileNotFoundError):
        return f"no such file {path}; copy it there or delete the row"
    return f"cannot be decoded ({error}); replace the file {path}"
