"""Grids of files: which axes of an array run along the patient's, how large voxels are, and what a header leaves open.

Arrays are turned by whole axes, each file axis to the patient axis that it is closest to. Files of one scan are turned
together: a label follows its scan, since of a scan near 45 degrees the last digit of an affine decides.
"""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

__all__ = [
    "axes_like",
    "direction_letters",
    "file_axes",
    "file_spacing",
    "knows_orientation",
    "millimetres",
    "patient_axes",
    "slice_grid",
    "to_file",
    "to_slices",
]

_PATIENT_AXES = axcodes2ornt(("L", "P", "S"))  # of (W, H, D)
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's unit codes for metre and micron; all others are read as millimetres
_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))  # towards lower and higher coordinates of NIfTI's world
_OBLIQUE = 0.38  # sine of 22.5 degrees: a direction nearer to the diagonal than to the axis has two letters


def patient_axes(affine: np.ndarray) -> np.ndarray:
    """Return the turn of a file's axes to (W, H, D), in nibabel's form: new axis and sign of each file axis."""
    return ornt_transform(io_orientation(affine), _PATIENT_AXES)


def axes_like(affine: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the turn of a file's axes to those of `grid`, the (4, 4) affine of its scan's (W, H, D)."""
    return io_orientation(np.linalg.inv(grid) @ affine)


def slice_grid(
    shape: Sequence[int], affine: np.ndarray, axes: np.ndarray | None = None
) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the shape (D, H, W) of a file's array after its turn, and the affine of (W, H, D)."""
    axes = patient_axes(affine) if axes is None else axes
    return tuple(int(shape[axis]) for axis in file_axes(axes))[::-1], affine @ inv_ornt_aff(axes, tuple(shape))


def file_axes(axes: np.ndarray) -> list[int]:
    """Return the axes of the file that run along W, H and D."""
    return [int(axis) for axis in np.argsort(axes[:, 0])]


def to_slices(array: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Reorder the axes (X, Y, Z) of a file to (D, H, W)."""
    return np.ascontiguousarray(apply_orientation(array, axes).transpose(2, 1, 0))


def to_file(slices: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reorder (D, H, W) to the axes (X, Y, Z) of a file, the inverse of `to_slices`."""
    return apply_orientation(slices.transpose(2, 1, 0), ornt_transform(_PATIENT_AXES, io_orientation(affine)))


def millimetres(header: Any) -> float:
    """Return the length of the header's unit in millimetres."""
    return 1.0 if header is None else _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)


def file_spacing(affine: np.ndarray, header: Any) -> tuple[float, float, float] | None:
    """Return the size of a voxel along D, H and W in millimetres; None if the file does not say it.

    An array has none. Nor has a NIfTI file that was saved with a unit matrix for its affine, or with no affine at all,
    and without a unit of length: voxels of 1 mm are then what the software fills in.
    """
    if _says_nothing(affine, header):
        return None
    edges = voxel_sizes(affine) * millimetres(header)
    x, y, z = (float(edges[axis]) for axis in file_axes(patient_axes(affine)))
    return z, y, x


def knows_orientation(affine: np.ndarray, header: Any) -> bool:
    """Return whether the file says how it lies in the patient: by the code of its sform or qform."""
    return not _says_nothing(affine, header) and _has_form(header)


def direction_letters(grid: np.ndarray) -> tuple[str, str, str, str]:
    """Return the sides of the patient at the left, right, top and bottom edge of a slice.

    Args:
        grid: (4, 4) affine of (W, H, D) to NIfTI's world.

    Returns:
        Such as ("R", "L", "A", "P"); two letters for oblique slices, the closer side first.
    """
    columns, rows = (grid[:3, axis] / np.linalg.norm(grid[:3, axis]) for axis in (0, 1))
    left, right, top, bottom = (_towards(direction) for direction in (-columns, columns, -rows, rows))
    return left, right, top, bottom


def _towards(direction: np.ndarray) -> str:
    order = [int(axis) for axis in np.argsort(-np.abs(direction), kind="stable")]
    return "".join(_LETTERS[axis][int(direction[axis] > 0)] for axis in order if abs(direction[axis]) >= _OBLIQUE)


def _has_form(header: Any) -> bool:
    return bool(int(header["sform_code"]) or int(header["qform_code"]))


def _says_nothing(affine: np.ndarray, header: Any) -> bool:
    if header is None:
        return True
    if int(header["xyzt_units"]) & 7 or not (voxel_sizes(affine) == 1).all():
        return False
    plain = bool(np.isin(np.abs(affine[:3, :3]), (0, 1)).all()) and not affine[:3, 3].any()
    return plain or not _has_form(header)
