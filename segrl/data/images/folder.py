"""Image and mask folders with a `manifest.csv`, checked in full before training starts.

The checks open every file once and report all problems together: a run that stops after two hours at a broken mask has
cost two hours, and fixing files one error at a time costs as many runs as there are broken files.
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

from segrl.data.manifest import TEXTS, raise_all, read_manifest
from segrl.errors import DataError
from segrl.geometry.masks import binarize

_BAD_FILE = (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError)  # what PIL raises for broken files


def load_folder(
    path: str | Path, split: str | None = None, *, validate: bool = True, limit: int | None = None
) -> Dataset:
    """Loads image/mask pairs listed in `<path>/manifest.csv`.

    The manifest has the columns image and mask (paths relative to the folder) and optionally split, query, reasoning,
    modality, anatomy, lesion and name; any other column is kept as text. Without a query column the query is built from
    lesion, anatomy and modality. Pixels are decoded when a row is read.

    Args:
        path: the folder.
        split: keep only rows with this value in the split column; None keeps all.
        validate: open every file now (see `check_rows`) instead of meeting the broken one during training.
        limit: keep only the first rows, after the split.

    Returns:
        A data set with the columns image, mask, query, modality, anatomy, lesion, name (the image path, unless the
        manifest has names) and the manifest's other columns. Optional columns that are missing are empty strings.

    Raises:
        DataError: for a missing or unreadable manifest, a missing column, an unknown split, no rows, and, with all
            problems in one message, for bad rows and files.
    """
    found = read_manifest(Path(path), ("image", "mask"), split, limit, noun="image")
    names = list(found.rows[0]) if found.rows else ["image", "mask", *TEXTS]
    columns = {name: [row[name] for row in found.rows] for name in names}
    features = {name: Image() if name in ("image", "mask") else Value("string") for name in names}
    dataset = Dataset.from_dict(columns, features=Features(features))
    problems = [*found.problems, *(_problems(dataset, found.places) if validate else ())]
    raise_all(problems, found.total, found.source)
    return dataset


def check_rows(dataset: Dataset) -> None:
    """Checks every row of a data set with the columns image, mask and query, reading one row at a time.

    A row is bad when its image or mask is missing, corrupt or not 8-bit, when the two differ in size after EXIF
    rotation, when the mask holds more than two values, or when the query is empty. An empty mask is fine: there is
    nothing to find.

    Raises:
        DataError: for a missing or wrongly typed column, for no rows, and for bad rows: the first ten with row number,
            name and fix, and their total number.
    """
    missing = [column for column in ("image", "mask", "query") if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"dataset lacks the columns {missing}: expected image, mask, query, found {dataset.column_names}"
        )
    for column in ("image", "mask"):
        if not isinstance(dataset.features[column], Image):
            raise DataError(
                f"column {column!r} has the type {dataset.features[column]}: expected datasets.Image; "
                f"use dataset.cast_column({column!r}, datasets.Image())"
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
    raise_all([*problems, *_problems(dataset, places)], len(dataset), "dataset")


def _problems(dataset: Dataset, places: Iterable[str]) -> Iterator[str]:
    """Every problem with the files of a data set, row by row; at most one per file and one per pair."""
    encoded = dataset.select_columns(["image", "mask"])
    for column in ("image", "mask"):
        encoded = encoded.cast_column(column, Image(decode=False))
    for place, row in zip(places, encoded, strict=True):
        assert isinstance(row, dict)
        arrays: list[np.ndarray] = []
        for column in ("image", "mask"):
            try:
                arrays.append(_decode(row[column]))
                if column == "mask":
                    binarize(arrays[-1], "mask")
            except (DataError, *_BAD_FILE) as error:
                yield f"{place}: {column}: {_reason(error, row[column])}"
        if len(arrays) == 2 and arrays[0].shape[:2] != arrays[1].shape[:2]:
            (height, width), (mask_height, mask_width) = (array.shape[:2] for array in arrays)
            yield (
                f"{place}: the mask is {mask_width} x {mask_height} px, the image {width} x {height}; expected the "
                "same size after EXIF rotation; resize the mask with nearest neighbour"
            )


def _decode(value: dict[str, Any] | None) -> np.ndarray:
    """All pixels of an encoded image, upright: (H, W) or (H, W, C)."""
    if value is None:
        raise DataError("is missing (None); give a file or delete the row")
    source = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
    with PILImage.open(source) as image:
        if image.mode[0] in "IF":
            raise DataError(f"has {image.mode} pixels, expected 8 bits per channel; window it and scale it to 0-255")
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright)


def _reason(error: Exception, value: dict[str, Any] | None) -> str:
    path = (value or {}).get("path") or ""
    if isinstance(error, DataError):
        return str(error).removeprefix("mask: ") + (f" [{path}]" if path else "")
    if isinstance(error, FileNotFoundError):
        return f"no such file {path}; copy it there or delete the row"
    return f"cannot be decoded ({error}); replace the file {path}"
