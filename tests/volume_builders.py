"""Volumes in files that several test files build."""

# D slices, H/W pixels of a slice

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segrl.data import Volume, write_mask, write_volume


def blocks(areas: Any, height: int = 24, width: int = 40) -> np.ndarray:
    """(D, H, W): on every slice a bar of so many pixels in the first row, and from 3 on also a lone pixel below it."""
    mask = np.zeros((len(areas), height, width), dtype=bool)
    for section, area in zip(mask, areas, strict=True):
        section[2, 5 : 5 + area - (area >= 3)] = True
        section[10, 7] = area >= 3
    return mask


def row_of(folder: Path, mask: np.ndarray, name: str = "one", **fields: Any) -> dict[str, Any]:
    """A row about a volume that is brighter inside the mask, its files written into `folder`."""
    rng = np.random.default_rng(len(name))
    voxels = rng.uniform(20, 40, mask.shape) + 60 * mask
    volume = Volume(voxels.astype(np.float32), (3.0, 1.0, 1.0))
    scan, label = folder / f"{name}.nii.gz", folder / f"{name}_label.nii.gz"
    write_volume(scan, volume)
    write_mask(label, mask, volume)
    texts = {"query": "Where is it?", "modality": "MRI", "anatomy": "Head", "lesion": "dark cyst", "name": name}
    return {"scan": str(scan), "label": str(label), "label_value": "0", "intensity": "", **texts, **fields}
