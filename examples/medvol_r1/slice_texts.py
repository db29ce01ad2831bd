"""Slices that the tiny preset learns from: pictures for its vision tower, and the words of its reasoning."""

# D slices of a volume; H, W of a slice

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from segrl.data import CaseReader, render_slices, uniform_slices
from segrl.geometry import mask_to_box, resize_mask
from segrl.models import Finding, Picture

BINS = 8  # of the edge of a slice
SIZES = ("none", "small", "medium", "large")
AREAS = (0.0, 0.035, 0.075)  # of the slice: above so much each next size begins


def add_reasoning(rows: Dataset, slices: int) -> Dataset:
    """Add a column `reasoning`: what each shown slice holds, in order, and where.

    "3 large 1245": slice 3 has more than the last of `AREAS` of its pixels in lesions, in a box with these left, top,
    right and bottom sides in bins of the edge. Short words in a fixed order are what a model of a few million
    parameters can learn, and every text teaches about every slice. A size that compared slices with each other was not
    learned (docs/log.md).
    """
    texts = []
    read = CaseReader(0)
    for row in _dicts(rows):
        mask = read(row, allow_empty=True).mask
        assert mask is not None
        shares = mask.mean(axis=(1, 2))
        parts = []
        for number, k in enumerate(uniform_slices(len(mask), slices), 1):
            size = SIZES[np.searchsorted(AREAS, shares[k])]
            parts.append(f"{number} {size} {''.join(map(str, _sides(mask[k])))}".strip())
        texts.append(", ".join(parts) + ".")
    return rows.add_column("reasoning", texts)  # type: ignore[call-arg]


def slice_pictures(rows: Dataset, size: int) -> list[Picture]:
    """Return every slice of some rows as a picture of `size` x `size` pixels, which knows the lesion of its row."""
    pictures = []
    read = CaseReader(0)
    for row in _dicts(rows):
        case = read(row, allow_empty=True)
        assert case.mask is not None
        images = render_slices(case.grey, np.arange(len(case.grey)), size, case.scan.spacing_mm)
        kind = row["lesion"] or "lesion"
        for image, section in zip(images, case.mask, strict=True):
            found = resize_mask(section, (image.height, image.width))
            findings = [Finding(kind, found)] if found.any() else []
            pictures.append(Picture(image, findings, frozenset([kind])))
    return pictures


def _sides(section: np.ndarray) -> list[int]:
    """Bins of the left, top, right and bottom side of the box around all foreground of a slice (H, W); [] without."""
    box, (height, width) = mask_to_box(section), section.shape
    if box is None:
        return []
    return (box / [width, height, width, height] * BINS).astype(int).clip(0, BINS - 1).tolist()


def _dicts(rows: Dataset) -> list[dict[str, Any]]:
    return [dict(rows[number]) for number in range(len(rows))]
