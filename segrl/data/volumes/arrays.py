"""Volumes in numpy's formats, as in M3D-Seg: a dense `.npy` scan and a sparse `.npz` label.

Such files hold neither spacing nor orientation. Their axes are assumed to be those of a NIfTI file: (X, Y, Z), slices
last. If the last two axes are equal and the first one differs, slices come first, as in the scans of KiTS:
`(num_slices, height, width)`, https://github.com/neheller/kits19. Nothing is ever unpickled.
"""

# X/Y/Z voxels along the axes of a file, C channels of a sparse label, N = X * Y * Z

from __future__ import annotations

import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
from scipy import sparse

from segrl.errors import DataError

__all__ = ["array_affine", "open_npy", "sparse_channels", "sparse_label"]

_UNREADABLE = (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error)
_SLICES_LAST = np.eye(4)
# As in KiTS: slices from the top of the patient, rows from the front, columns from the patient's right.
_SLICES_FIRST = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)


def array_affine(shape: tuple[int, ...]) -> np.ndarray:
    """Return the (4, 4) affine that an array without one gets: the order of its axes, with edges of 1."""
    first, second, third = shape
    return (_SLICES_FIRST if second == third != first else _SLICES_LAST).copy()


def open_npy(path: Path) -> np.ndarray:
    """Open the scan in a `.npy` file, (X, Y, Z), memory-mapped; a leading axis of length 1, as in M3D-Seg, is dropped.

    Raises:
        DataError: If the file is no numpy array or holds no volume of real numbers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a numpy array ({error}); replace the file") from error
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    return array.reshape(array.shape[:3]) if array.ndim > 3 and set(array.shape[3:]) == {1} else array


def sparse_label(path: Path, value: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Read one channel of a sparse label, or the union of all channels.

    Args:
        path: A `.npz` file of `scipy.sparse.save_npz` with a matrix (C, N); its name ends in the shape `(C, X, Y, Z)`.
        value: Number of the channel, from 1, or 0 for the union.

    Returns:
        bool (X, Y, Z), and the numbers of the channels that have foreground.

    Raises:
        DataError: If the file or its name does not have that form.
    """
    channels, *shape = _shape_in_name(path)
    try:
        with path.open("rb") as opened:  # numpy leaves a broken file open
            matrix = sparse.csr_matrix(sparse.load_npz(opened))
        matrix.eliminate_zeros()
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a scipy sparse matrix ({error}); replace the file") from error
    rows, columns = matrix.get_shape()
    if (rows, columns) != (channels, math.prod(shape)):
        raise DataError(
            f"{path}: the matrix is {rows} x {columns}, but the name says {channels} channels of "
            f"{' x '.join(map(str, shape))} voxels; give the file its own name back"
        )
    present = tuple((np.flatnonzero(np.diff(matrix.indptr)) + 1).tolist())
    mask = np.zeros(math.prod(shape), dtype=bool)
    if value > 0:
        mask[matrix[value - 1].indices if value <= channels else []] = True
    elif value == 0:
        mask[matrix.indices] = True
    return mask.reshape(shape), present


def sparse_channels(path: Path) -> tuple[int, ...]:
    """Return the numbers of the channels with entries, from 1; only the row pointers are read.

    Raises:
        DataError: If the file or its name does not have the form that `sparse_label` reads.
    """
    channels = _shape_in_name(path)[0]
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            rows = np.diff(file["indptr"])
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a scipy sparse matrix ({error}); replace the file") from error
    if len(rows) != channels:
        raise DataError(
            f"{path}: the matrix has {len(rows)} rows, but the name says {channels} channels; give the file its own "
            "name back"
        )
    return tuple((np.flatnonzero(rows) + 1).tolist())


def _shape_in_name(path: Path) -> tuple[int, ...]:
    found = re.search(r"\((\d{1,6}(?:, ?\d{1,6}){3})\)\.npz$", path.name)
    shape = tuple(int(edge) for edge in found[1].split(",")) if found else ()
    if not shape or not all(shape):
        raise DataError(f"{path}: expected a name that ends in the shape of the label, as 'mask_(1, 512, 512, 96).npz'")
    return shape
