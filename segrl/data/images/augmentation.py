"""Augment a small data set before training, so that all completions of a GRPO group see the same image."""

# H, W pixels of an image and its mask

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from segrl.errors import DataError
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import binarize

__all__ = ["augment", "random_view"]


def augment(dataset: Dataset, copies: int | Sequence[int], *, seed: int = 0) -> Dataset:
    """Return the rows of a data set and `copies` augmented copies of each, in memory.

    A copy is flipped, turned by a multiple of 90 degrees, cropped to 75 to 100 % of each side and changed in
    brightness, contrast and gamma; its mask is flipped, turned and cropped with it. No crop removes the whole lesion.
    Texts do not change, so do not use this if queries say left, right, above or below.

    Args:
        dataset: Columns image, mask and name; others are copied. A row with reasoning is refused.
        copies: Augmented copies of each row; one number for all rows, or one for each.
        seed: Of all random choices; the same seed gives the same data.

    Returns:
        The rows with the same columns, each followed by its copies; a copy's name ends in `#1`, `#2`, ...

    Raises:
        DataError: `copies` below 0 or not one for each row, or a row with reasoning, which describes the unchanged
            image.

    Example:
        >>> from segrl.data import make_synthetic
        >>> rows = augment(make_synthetic(1, size=64), copies=1)
        >>> rows["name"][:], [image.size for image in rows["image"]]
        (['synthetic_0_00000', 'synthetic_0_00000#1'], [(64, 64), (54, 55)])
    """
    counts = [copies] * len(dataset) if isinstance(copies, int) else list(copies)
    if len(counts) != len(dataset):
        raise DataError(f"copies: expected one number for each of {len(dataset)} rows, got {len(counts)}")
    if min(counts, default=0) < 0:
        raise DataError(f"copies={min(counts)}: expected 0 or more")

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(len(dataset)):
            row = dataset[index]
            if counts[index] and str(row.get("reasoning") or "").strip():
                raise DataError(
                    f"{row['name']}: has its own reasoning, which a turned image would contradict; use copies=0"
                )
            image = read_image(row["image"], f"image of {row['name']}")
            mask = PILImage.fromarray(binarize(row["mask"], str(row["name"])).astype(np.uint8) * 255)
            yield {**row, "image": _png(image), "mask": _png(mask)}
            for copy in range(1, counts[index] + 1):
                rng = np.random.default_rng((seed, index, copy))
                changed, moved = random_view(np.asarray(image), np.asarray(mask), rng)
                pictures = {"image": _png(PILImage.fromarray(changed)), "mask": _png(PILImage.fromarray(moved))}
                pictures |= dict.fromkeys({"ignored"} & row.keys())  # of the unchanged image; no training reads it
                yield {**row, **pictures, "name": f"{row['name']}#{copy}"}

    return Dataset.from_list(list(rows()), features=dataset.features)


def random_view(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a random view of an image, see `augment`.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8.
        rng: Of all choices.

    Returns:
        Both, of another size.

    Example:
        >>> image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        >>> [view.shape for view in random_view(image, mask, np.random.default_rng(0))]
        [(29, 26, 3), (29, 26)]
    """
    height, width = mask.shape
    high, wide = (max(8, int(side * rng.uniform(0.75, 1.0))) for side in (height, width))
    top, left = int(rng.integers(max(1, height - high + 1))), int(rng.integers(max(1, width - wide + 1)))
    window = (slice(top, top + high), slice(left, left + wide))
    if mask[window].any() or not mask.any():
        image, mask = image[window], mask[window]
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    image, mask = np.rot90(image, turns), np.rot90(mask, turns)
    if flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    gamma, contrast, shift = np.exp(rng.normal(0, 0.2)), rng.uniform(0.75, 1.25), rng.uniform(-0.1, 0.1)
    values = (image / 255.0) ** gamma
    values = np.clip((values - values.mean()) * contrast + values.mean() + shift, 0, 1)
    return np.ascontiguousarray((values * 255).round().astype(np.uint8)), np.ascontiguousarray(mask)


def _png(image: PILImage.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
