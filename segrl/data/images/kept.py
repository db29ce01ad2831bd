"""Pixels that a check has read, kept for the evaluation that follows: a file is decoded once."""

# H, W pixels of an image and its mask

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["KeptPixels", "KeptRows"]


class KeptPixels:
    """Images and masks by the number of their row, up to a budget; what goes beyond it is read again.

    Args:
        memory_bytes: The budget.

    Example:
        >>> kept = KeptPixels(memory_bytes=100)
        >>> for number in range(2):
        ...     kept.add(number, np.zeros((4, 4, 3), np.uint8), np.eye(4, dtype=bool), None)
        >>> kept.take(0)["mask"].sum(), kept.take(0), kept.take(1)
        (np.int64(4), None, None)
    """

    def __init__(self, memory_bytes: int = 2**30) -> None:
        self.free = memory_bytes
        self._rows: dict[int, dict[str, np.ndarray | None]] = {}

    def add(self, number: int, image: np.ndarray, mask: np.ndarray, ignored: np.ndarray | None) -> None:
        """Keep a row, if it fits.

        Args:
            number: Of the row.
            image: (H, W, 3) uint8, upright.
            mask: (H, W) bool.
            ignored: (H, W) bool, or None.
        """
        size = image.nbytes + mask.nbytes + (0 if ignored is None else ignored.nbytes)
        if size <= self.free:
            self.free -= size
            self._rows[number] = {"image": image, "mask": mask, "ignored": ignored}

    def take(self, number: int) -> dict[str, Any] | None:
        """Return what is kept of a row, and let it go; None if it is not kept."""
        return self._rows.pop(number, None)


class KeptRows(Sequence[Mapping[str, Any]]):
    """Rows of a data set whose pixels come from memory where they are kept, and from files elsewhere.

    Args:
        dataset: Columns image, mask, perhaps ignored, and those of the metadata.
        kept: By numbers of these rows; each row is given once.

    Example:
        >>> from segrl.data import make_synthetic
        >>> rows, kept = make_synthetic(2, size=32), KeptPixels()
        >>> kept.add(0, np.full((32, 32, 3), 7, np.uint8), np.ones((32, 32), dtype=bool), None)
        >>> [row["image"].getpixel((0, 0)) == (7, 7, 7) for row in KeptRows(rows, kept)]
        [True, False]
    """

    def __init__(self, dataset: Dataset, kept: KeptPixels) -> None:
        self.dataset, self.kept = dataset, kept
        names = [name for name in METADATA_COLUMNS if name in dataset.column_names]
        self._texts: dict[str, Any] = dict(dataset.select_columns(names)[:]) if names else {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: Any) -> Any:
        found = self.kept.take(number)
        if found is None:
            return self.dataset[number]
        texts = {name: values[number] for name, values in self._texts.items()}
        return {**found, "image": Image.fromarray(found["image"]), **texts}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[number] for number in range(len(self)))
