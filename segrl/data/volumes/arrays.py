"""Volumes in numpy's formats, as in M3D-Seg: a dense `.npy` scan and a sparse `.npz` label.

Such files hold neither spacing nor orientation. Their axes are assumed to be those of a NIfTI file: (X, Y, Z), slices
last. If the last two axes are equal and the first one differs, slices come first, as in the scans of KiTS:
`(num_slices, height, width)`, https://github.com/neheller/kits19. Nothing is ever unpickled.
"""

# X/Y/Z voxels along the axes of a file, C channels of a sparse label, N = X * Y * Z

from __future__ import annotations

import os
import re
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from scipy import sparse

from segrl.data.volumes import limits
from segrl.errors import DataError

__all__ = ["array_affine", "open_npy", "sparse_label"]

_UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error),
    *(MemoryError, OverflowError, NotImplementedError, RuntimeError),  # zip: another compression, or encrypted
    *(SyntaxError, tokenize.TokenError),  # the header of an array is Python
)
_VOXEL_BYTES = 16  # of a sparse label in memory, at most: structures may overlap
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
    assert isinstance(array, np.memmap)
    expected, found = array.offset + array.nbytes, os.path.getsize(path)
    if found != expected:  # too few bytes were found before, by mapping them
        raise DataError(
            f"{path}: cannot be read as a numpy array (its header says that the file has {expected} bytes, and it has "
            f"{found}); replace the file"
        )
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    return array.reshape(array.shape[:3]) if array.ndim > 3 and set(array.shape[3:]) == {1} else array


def sparse_label(path: Path) -> tuple[tuple[int, int, int], sparse.csr_matrix]:
    """Read a sparse label.

    Args:
        path: A `.npz` file of `scipy.sparse.save_npz` with a matrix (C, N); its name ends in the shape `(C, X, Y, Z)`.

    Returns:
        (X, Y, Z), and the matrix (C, N).

    Raises:
        DataError: If the file or its name does not have that form, or it is larger than allowed.
    """
    channels, x, y, z = _shape_in_name(path)
    limits.check_size(path, (x, y, z))
    try:
        with path.open("rb") as opened:  # numpy leaves a broken file open
            with zipfile.ZipFile(opened) as members:
                declared = sum(member.file_size for member in members.infolist())
            if declared > _VOXEL_BYTES * limits.MAX_VOXELS:
                raise ValueError(f"its arrays would take {declared} bytes")
            matrix = sparse.csr_matrix(sparse.load_npz(opened))
        matrix.check_format(full_check=True)
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a scipy sparse matrix ({error}); replace the file") from error
    rows, columns = matrix.get_shape()
    if (rows, columns) != (channels, x * y * z):
        raise DataError(
            f"{path}: the matrix is {rows} x {columns}, but the name says {channels} channels of {x} x {y} x {z} "
            "voxels; give the file its own name back"
        )
    return (x, y, z), matrix


def _shape_in_name(path: Path) -> tuple[int, ...]:
    found = re.search(r"\((\d{1,6}(?:, ?\d{1,6}){3})\)\.npz$", path.name)
    shape = tuple(int(edge) for edge in found[1].split(",")) if found else ()
    if not shape or not all(shape):
        raise DataError(f"{path}: expected a name that ends in the shape of the label, as 'mask_(1, 512, 512, 96).npz'")
    return shape
