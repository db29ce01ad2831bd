"""The folder that the trainers read, as the source of other layouts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets import Image

from segrl.data.formats.rows import FormatRow, ScanRow
from segrl.data.images.folder import load_folder
from segrl.data.overview import manifest_task
from segrl.data.volumes.folder import load_volumes
from segrl.geometry.mask_images import binarize

__all__ = ["read_rows"]

_OF_IMAGES = ("image", "mask", "ignored", "split", "name")
_OF_SCANS = ("scan", "label", "label_value", "ignored_value", "split", "name")


def read_rows(folder: str | Path) -> Iterator[FormatRow | ScanRow]:
    """Read a folder with `manifest.csv`, of images or of scans, the inverse of `write_rows`.

    Args:
        folder: The folder; every file is checked first.

    Raises:
        DataError: As `segrl.data.load_folder` and `load_volumes`.

    Example:
        >>> import numpy as np
        >>> from PIL import Image as PILImage
        >>> from segrl.data.formats import write_rows
        >>> row = FormatRow(PILImage.new("RGB", (4, 4)), np.eye(4, dtype=bool), "a", "train", {"lesion": "cyst"})
        >>> _ = write_rows([row], "mine")
        convert ...
        >>> [(row.name, row.split, row.texts["lesion"]) for row in read_rows("mine")]
        [('images/a.png', 'train', 'cyst')]
    """
    home = Path(folder)
    if manifest_task(home) == "volumes":
        for row in map(dict, load_volumes(home, allow_empty=True)):
            texts = {name: row[name] for name in row if name not in _OF_SCANS and row[name]}
            files = Path(row["scan"]), Path(row["label"])
            yield ScanRow(
                *files, row["label_value"], row.get("split") or "train", texts, row.get("ignored_value") or ""
            )
        return
    rows = load_folder(home).cast_column("image", Image(decode=False))
    for row in map(dict, rows):
        texts = {name: str(row[name]) for name in row if name not in _OF_IMAGES and row[name]}
        ignored = None if row.get("ignored") is None else binarize(row["ignored"])
        image = Path(row["image"]["path"])
        name = image.relative_to(home).as_posix() if image.is_relative_to(home) else str(image)
        yield FormatRow(image, binarize(row["mask"]), name, row.get("split") or "train", texts, ignored)
