"""MedSegBench: arrays of images and labels in one file (Kuş and Aydin, Scientific Data 2024).

Layout as in the `medsegbench` package, found in 2026-11; the downloads were not seen. Its sets have licences of their
own; nothing is fetched here.

    {flag}_{128,256,512}.npz     {train,val,test}_images (N, H, W[, 3]), {train,val,test}_label (N, H, W)
"""

# N images, H, W pixels

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from segrl.data.formats.rows import FormatRow
from segrl.errors import DataError

__all__ = ["read_medsegbench"]


def read_medsegbench(
    source: str | Path, *, texts: Mapping[str, str], labels: Mapping[int, str] | None = None
) -> Iterator[FormatRow]:
    """Read a file of MedSegBench, one row for each image and label that occurs in it.

    Args:
        source: The `.npz` file; pickled arrays in it are refused.
        texts: Columns that every row gets.
        labels: Names of the labels by their value; None: every value above 0 is the lesion of `texts`.

    Raises:
        DataError: No such file, arrays that are missing or of another shape, labels without a name.

    Example:
        >>> images, label = np.zeros((1, 4, 4), dtype=np.uint8), np.eye(4, dtype=np.uint8)[None]
        >>> np.savez("polyp_256.npz", train_images=images, train_label=label)
        >>> [row.name for row in read_medsegbench("polyp_256.npz", texts={"lesion": "polyp"})]
        ['train_00000']
    """
    path = Path(source)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        known = error.strerror if isinstance(error, OSError) else None
        reason = known or "damaged, another format, or with pickled objects in it, which are never loaded"
        raise DataError(f"{path}: cannot be read as .npz: {reason}; download it again") from error
    splits = [split for split in ("train", "val", "test") if f"{split}_images" in arrays]
    if not splits:
        raise DataError(f"{path}: no array train_images, val_images or test_images, only {', '.join(sorted(arrays))}")
    for split in splits:
        images, truth = arrays[f"{split}_images"], arrays.get(f"{split}_label")
        if truth is None or truth.shape != images.shape[:3] or images.dtype != np.uint8:
            shape = None if truth is None else truth.shape
            raise DataError(
                f"{path}: {split}_images is {images.dtype} {images.shape}, {split}_label {shape}; expected uint8 "
                "(N, H, W) or (N, H, W, 3) with labels (N, H, W)"
            )
        for number, (image, label) in enumerate(zip(images, truth, strict=True)):
            picture = Image.fromarray(image)
            values = [int(value) for value in np.unique(label) if value > 0]
            unnamed = [value for value in values if labels is not None and value not in labels]
            if unnamed:
                where = f"label {unnamed[0]} of {split} {number}"
                raise DataError(f"{path}: {where} has no name; pass --labels {unnamed[0]}=NAME")
            wanted = {None: texts.get("lesion", "")} if labels is None else {value: labels[value] for value in values}
            for value, lesion in wanted.items():
                mask = label > 0 if value is None else label == value
                yield FormatRow(picture, mask, f"{split}_{number:05d}", split, {**texts, "lesion": lesion})
