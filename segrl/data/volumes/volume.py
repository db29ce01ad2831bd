"""A scan in memory, and what is known of its grid."""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from segrl.data.volumes.grids import direction_letters, file_axes, millimetres, patient_axes, slice_grid
from segrl.errors import DataError
from segrl.predictions.target import check_spacing

__all__ = ["Volume"]


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in memory, with the grid of its file, on which masks are written.

    Attributes:
        voxels: (D, H, W) float32.
        spacing_mm: Size of a voxel along D, H and W in millimetres; None if it is not known.
        name: Path of the file, or another name for errors.
        affine: (4, 4), voxel of the file to world. A volume without a file gets one that starts at the origin.
        file_shape: Shape of the file's array, with its trailing axes of length 1. A volume without a file gets (W, H,
            D).
        header: NIfTI header of the file; None if there is none.
        oriented: Whether it is known how the patient lies in the grid, so that left and right may be named; by default
            if an affine is given.
        modality: What the file says, such as "CT"; "" if it says nothing, as NIfTI.
        inverted: Whether low values are shown white, as of a DICOM series in MONOCHROME1.

    Raises:
        DataError: If the voxels are not (D, H, W), there are none, or the spacing is not three positive numbers.

    Example:
        >>> volume = Volume(np.zeros((2, 3, 4), dtype=np.float32), spacing_mm=(5.0, 1.0, 1.0))
        >>> volume.file_shape, np.diag(volume.affine).tolist(), volume.oriented
        ((4, 3, 2), [-1.0, -1.0, 5.0, 1.0], False)
    """

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float] | None = None
    name: str = ""
    affine: np.ndarray | None = None
    file_shape: tuple[int, ...] | None = None
    header: nib.Nifti1Header | None = None
    oriented: bool | None = None
    modality: str = ""
    inverted: bool = False

    def __post_init__(self) -> None:
        label = f" of {self.name!r}" if self.name else ""
        if self.voxels.ndim != 3 or not self.voxels.size:
            raise DataError(f"Volume.voxels{label}: shape {self.voxels.shape}; expected (D, H, W), none of them 0")
        check_spacing(self.spacing_mm, f"Volume.spacing_mm{label}")
        if self.oriented is None:
            object.__setattr__(self, "oriented", self.affine is not None)
        if self.affine is None:
            depth, height, width = self.voxels.shape
            z, y, x = self.spacing_mm or (1.0, 1.0, 1.0)
            object.__setattr__(self, "affine", np.diag([-x, -y, z, 1.0]))
            object.__setattr__(self, "file_shape", (width, height, depth))

    @property
    def edges(self) -> tuple[str, str, str, str] | None:
        """Sides of the patient at the left, right, top and bottom edge of a slice; None if they are not known.

        Example:
            >>> Volume(np.zeros((2, 3, 4)), oriented=True).edges, Volume(np.zeros((2, 3, 4))).edges
            (('R', 'L', 'A', 'P'), None)
        """
        return direction_letters(self._grid) if self.oriented else None

    def file_slice(self, index: int) -> tuple[int, int]:
        """Return the axis of the file, from 0, that runs along the slices, and the index on it of slice `index`.

        Example:
            >>> Volume(np.zeros((5, 3, 4)), affine=np.diag([1, 1, -2, 1]), file_shape=(4, 3, 5)).file_slice(1)
            (2, 3)
        """
        assert self.affine is not None
        axes = patient_axes(self.affine)
        axis = file_axes(axes)[2]
        return axis, index if axes[axis, 1] > 0 else len(self.voxels) - 1 - index

    def z_mm(self, index: int) -> float | None:
        """Return how far up, in the file's world, the centre of a slice is, in millimetres; None if it is not known.

        Example:
            >>> Volume(np.zeros((5, 3, 4)), (2, 1, 1), oriented=True).z_mm(3), Volume(np.zeros((5, 3, 4))).z_mm(3)
            (6.0, None)
        """
        if not self.oriented or self.spacing_mm is None:
            return None
        _, height, width = self.voxels.shape
        return float((self._grid @ ((width - 1) / 2, (height - 1) / 2, index, 1))[2]) * millimetres(self.header)

    @property
    def _grid(self) -> np.ndarray:
        """(4, 4), of (W, H, D) to world."""
        assert self.affine is not None
        assert self.file_shape is not None
        return slice_grid(self.file_shape[:3], self.affine)[1]
