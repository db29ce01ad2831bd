"""One volume of a data set: its grey values and its label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from segrl.data.volumes.intensity import Intensity, intensity_for, scale_intensity
from segrl.data.volumes.nifti import Volume, read_label, read_volume
from segrl.errors import DataError

__all__ = ["grey_values", "read_grey", "read_truth"]


def read_grey(path: str, *, modality: str = "", intensity: str = "") -> tuple[Volume, np.ndarray]:
    """Read a scan and its grey values.

    Args:
        path: NIfTI file or array, see `segrl.data.read_volume`.
        modality: Decides the scaling where `intensity` is empty, see `segrl.data.intensity_for`.
        intensity: Text form of an `Intensity`, such as "window:-160:240".

    Returns:
        The volume, and (D, H, W) uint8.

    Raises:
        DataError: As `read_volume`, or for an intensity that is none; both name the file.
    """
    volume = read_volume(path)
    return volume, grey_values(volume, modality=modality, intensity=intensity)


def grey_values(volume: Volume, *, modality: str = "", intensity: str = "") -> np.ndarray:
    """Grey values of a volume in memory, (D, H, W) uint8; see `read_grey`.

    Raises:
        DataError: An intensity that is none, or voxels that are NaN or infinite; names the volume.
    """
    try:
        scaling = Intensity.parse(intensity) if intensity else intensity_for(modality, volume.voxels)
        return scale_intensity(volume.voxels, scaling)
    except DataError as error:
        raise DataError(f"{volume.name or 'volume'}: {error}") from error


def read_truth(row: Mapping[str, Any], volume: Volume, *, allow_empty: bool = False) -> np.ndarray:
    """Read the label of a row.

    Args:
        row: The columns `label`, `label_value` and `name`.
        volume: The row's scan.
        allow_empty: Whether a label without such voxels is an empty mask instead of an error.

    Returns:
        (D, H, W) bool.

    Raises:
        DataError: The row has no label, or as `segrl.data.read_label`.
    """
    if not row["label"]:
        raise DataError(f"{row.get('name') or row['scan']}: no label; expected a path in the column 'label'")
    return read_label(row["label"], volume, row["label_value"] or 0, allow_empty=allow_empty)
