"""The largest volume that is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from segrl.errors import DataError

__all__ = ["MAX_VOXELS", "check_size"]

MAX_VOXELS = 2**30
"""1,024 slices of 1024 x 1024 px: 4 GiB while a scan is read, 1 GiB as grey values. Assign another number to change it,
as `PIL.Image.MAX_IMAGE_PIXELS` for images."""


def check_size(path: Path, shape: Sequence[int]) -> None:
    """Check the number of voxels that a file claims to have, before memory is asked for.

    Raises:
        DataError: There are more than `MAX_VOXELS`.

    Example:
        >>> check_size(Path("scan.nii.gz"), (32767, 32767, 32767))
        Traceback (most recent call last):
        segrl.errors.DataError: scan.nii.gz: has 32767 x 32767 x 32767 voxels, expected at most 1073741824; ...
    """
    if math.prod(map(int, shape)) > MAX_VOXELS:
        raise DataError(
            f"{path}: has {' x '.join(map(str, shape))} voxels, expected at most {MAX_VOXELS}; replace the file if it "
            "is damaged, crop or resample it, or set segrl.data.volumes.limits.MAX_VOXELS"
        )
