"""Facts of a case that need no look at the image: metadata, and its mask in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segrl.curation.case import Case
from segrl.data.reasoning import mask_words
from segrl.errors import DataError
from segrl.geometry.mask_images import read_mask_file
from segrl.geometry.masks import boxes_from_mask

__all__ = ["Facts", "mask_facts", "read_facts"]

_COUNTED = 0.1  # components below this share of the largest one's box are crumbs of an outline, and not counted


@dataclass(frozen=True)
class Facts:
    """Facts that a text must agree with.

    Attributes:
        lesion: Name of the lesion.
        anatomy: Body region; may be empty.
        modality: Imaging modality; may be empty.
        count: Components of the mask, without crumbs; 0 for an empty mask.
        size: Of the largest component, "small", "medium" or "large"; "" for an empty mask.
        location: Of the largest component, such as "upper left part", as the viewer sees it; "" for an empty mask.
        extent: x1, y1, x2, y2 of the whole foreground, as shares of width and height.
        boxes: Of all components in original pixels, x1, y1, x2, y2.
        shape: (width, height) of the image, pixels.

    Example:
        >>> Facts("cyst", "Breast", "Ultrasound", 1, "small", "centre", (0.4, 0.4, 0.6, 0.6)).boxes
        ()
    """

    lesion: str
    anatomy: str
    modality: str
    count: int
    size: str
    location: str
    extent: tuple[float, float, float, float]
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    shape: tuple[int, int] = (0, 0)


def read_facts(case: Case) -> Facts:
    """Read the mask of a case, and say what it shows.

    Raises:
        DataError: The mask cannot be read; names the file.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> Image.new("L", (40, 40), 255).save("mask.png")
        >>> case = Case("00ff", Path("a.png"), Path("mask.png"), "mine", "", "CT", "Lung", "nodule", "CC0-1.0")
        >>> read_facts(case).size
        'large'
    """
    name = case.name or case.id
    mask = read_mask_file(case.mask, f"mask of {name}")
    if not case.lesion.strip():
        raise DataError(f"{name}: lesion is empty; expected a name, give one with `lesion` of its source")
    return mask_facts(mask, case.lesion.strip(), case.anatomy.strip(), case.modality.strip())


def mask_facts(mask: np.ndarray, lesion: str, anatomy: str, modality: str) -> Facts:
    """Say what a mask shows.

    Args:
        mask: (H, W) bool.
        lesion: Name of the lesion.
        anatomy: May be empty.
        modality: May be empty.

    Example:
        >>> mask = np.zeros((10, 10), dtype=bool)
        >>> mask[1:4, 1:4], mask[9, 9] = True, True
        >>> facts = mask_facts(mask, "cyst", "Breast", "Ultrasound")
        >>> facts.count, facts.size, facts.location, facts.extent
        (2, 'large', 'upper left part', (0.1, 0.1, 1.0, 1.0))
    """
    height, width = mask.shape
    boxes = boxes_from_mask(mask)
    if not len(boxes):
        return Facts(lesion, anatomy, modality, 0, "", "", (0.0, 0.0, 0.0, 0.0), (), (width, height))
    size, location = mask_words(mask)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    (x1, y1), (x2, y2) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
    return Facts(
        lesion,
        anatomy,
        modality,
        count=int((areas >= _COUNTED * areas.max()).sum()),
        size=size,
        location=location,
        extent=(x1 / width, y1 / height, x2 / width, y2 / height),
        boxes=tuple(tuple(box) for box in boxes.tolist()),
        shape=(width, height),
    )
