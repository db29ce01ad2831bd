"""Read volumes from files, and write masks on the grid of their scan.

The axes of a file are reordered to (D, H, W), see `segrl.data.volumes.intensity`, by the axes of the patient that they
are closest to. Nothing is resampled: slices of an oblique scan stay oblique. A written mask has shape, affine, sform
and qform of the scan's file, so any viewer shows it on its scan.
"""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import ArrayLike

from segrl.data.volumes.arrays import array_affine, open_npy, sparse_channels, sparse_label
from segrl.data.volumes.grids import (
    axes_like,
    file_spacing,
    knows_orientation,
    patient_axes,
    slice_grid,
    to_file,
    to_slices,
)
from segrl.data.volumes.volume import Volume
from segrl.errors import DataError
from segrl.geometry.masks import foreground
from segrl.predictions.target import read_spacing

__all__ = ["label_values", "read_label", "read_volume", "write_mask", "write_volume"]

# nibabel and gzip raise these for broken files; a truncated .nii.gz gives EOFError, zlib.error or OSError.
# Dimensions that a damaged header invents do not fit into memory, or not into an integer.
_UNREADABLE = (
    *(OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError),
    *(MemoryError, OverflowError),
)
_MAX_SHIFT = 0.05  # largest distance of label and scan in voxels, where they are furthest apart: headers are rounded
_MAX_ROUNDING = 1e-4  # largest distance of a value in a scaled label file from a whole number
_LISTED = 20  # label values named in one error


def read_volume(path: str | Path, spacing_mm: Any = None) -> Volume:
    """Read a scan from a NIfTI file (`.nii`, `.nii.gz`, `.hdr`/`.img`) or a numpy array (`.npy`).

    Slope and intercept of the header are applied. Trailing axes of length 1 are dropped. An array in `.npy` has neither
    spacing nor orientation, and neither has a NIfTI file whose affine is the unit matrix and that names no unit. The
    axes of an array are read as those of a NIfTI file, slices last, unless the last two axes are equal and the first
    one differs: then slices come first. A leading axis of length 1, as in M3D-Seg, is dropped.

    Args:
        path: The file.
        spacing_mm: Size of a voxel along D, H and W in millimetres, for a file that does not say it, also as JSON text;
            None or "" if nobody knows. A file that says it is believed.

    Raises:
        DataError: With the file's name and the fix, if the file is missing, truncated or of another format, is not one
            3D volume of real numbers, is empty, has NaN or infinite voxels, or has no usable affine.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "scan.npy"), np.arange(24.0).reshape(4, 3, 2))  # (X, Y, Z)
        ...     volume = read_volume(Path(folder, "scan.npy"))
        >>> volume.voxels.shape, volume.spacing_mm
        ((2, 3, 4), None)
    """
    path = Path(path)
    array, affine, header = _open(path, "scan")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and reported as such
        voxels = _read(path, array, np.float32)
    bad = sum(int(np.count_nonzero(~np.isfinite(section))) for section in voxels)
    if bad:
        raise DataError(
            f"{path}: {bad} of {voxels.size} voxels are NaN or infinite; fix the conversion, or replace them with "
            "numpy.nan_to_num and save the scan again"
        )
    spacing = file_spacing(affine, header) or read_spacing(spacing_mm, f"{path}: spacing_mm")
    oriented = knows_orientation(affine, header)
    slices = to_slices(voxels, patient_axes(affine))
    return Volume(slices, spacing, str(path), affine, tuple(array.shape), header, oriented)


def read_label(
    path: str | Path, volume: Volume | str | Path | None = None, value: int = 0, *, allow_empty: bool = False
) -> np.ndarray:
    """Read the label of a scan: one of its values, or its whole foreground.

    The affines of label and scan are compared where the two grids are furthest apart, at their corners, relative to the
    smallest edge of a voxel. The axes of the label are turned as those of its scan, also where slices are near 45
    degrees and the two affines, each by itself, would be turned differently.

    Args:
        path: NIfTI file or `.npy` array of whole numbers, or sparse `.npz` file of M3D-Seg, where the value is the
            number of the channel, from 1.
        volume: The scan, or the path of its file, of which only the header is read. The label must fit it; the order of
            the file's axes may differ. None turns the label by its own affine and checks nothing.
        value: Label value of the foreground; 0 takes every value that is not zero.
        allow_empty: Return an empty mask for a label without such voxels, instead of raising.

    Returns:
        (D, H, W) bool.

    Raises:
        DataError: As `read_volume`, and if the label has values that are not whole numbers, another position or shape
            than the scan, no foreground, or not that value: then the error lists those it has.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "label.npy"), np.array([[[0, 1]], [[2, 2]]]))
        ...     [int(read_label(Path(folder, "label.npy"), value=value).sum()) for value in (0, 1, 2)]
        [3, 1, 2]
    """
    path = Path(path)
    if path.suffix == ".npz":
        _must_exist(path, "label")
        mask, present = sparse_label(path, value)
        affine = array_affine(mask.shape)
    else:
        array, affine, _ = _open(path, "label")
        values = _whole_numbers(path, _read(path, array))
        mask = values != 0 if value == 0 else values == value
        present = None if mask.any() else _present(values)
    axes = patient_axes(affine) if volume is None else _axes_on_scan(path, mask.shape, affine, volume)
    if not (allow_empty or mask.any()):
        listed = ", ".join(str(number) for number in (present or ())[:_LISTED]) or "no foreground"
        wanted = f"has no voxel with the value {value}, only {listed}" if value else "has no foreground"
        raise DataError(
            f"{path}: the label {wanted}; "
            + ("correct label_value, " if value else "")
            + "remove the row or set allow_empty=True"
        )
    return to_slices(mask, axes)


def label_values(path: str | Path) -> tuple[int, ...]:
    """Return the nonzero values in a label file, increasing; for a sparse `.npz` its channels with foreground.

    Raises:
        DataError: As `read_label`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "label.npy"), np.array([[[0, 4]], [[2, 2]]]))
        ...     label_values(Path(folder, "label.npy"))
        (2, 4)
    """
    path = Path(path)
    if path.suffix == ".npz":
        _must_exist(path, "label")
        return sparse_channels(path)
    return _present(_whole_numbers(path, _read(path, _open(path, "label")[0])))


def write_mask(path: str | Path, mask: ArrayLike, like: Volume) -> None:
    """Write a mask as NIfTI, uint8 with the values 0 and 1, on the grid of its scan.

    Shape, affine, sform and qform with their codes, units and NIfTI version are those of the scan. Header extensions
    and texts are not copied, since they may name the patient.

    Args:
        path: Ends in `.nii` or `.nii.gz`; an existing file is replaced.
        mask: (D, H, W) bool or integer, nonzero being foreground, in the order of `like.voxels`.
        like: The scan.

    Raises:
        DataError: If the mask does not have the scan's shape, or the path has another ending or no folder.

    Example:
        >>> import tempfile
        >>> scan = Volume(np.zeros((2, 3, 4), dtype=np.float32))
        >>> mask = np.arange(24).reshape(2, 3, 4) < 5
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_mask(Path(folder, "mask.nii.gz"), mask, scan)
        ...     bool((read_label(Path(folder, "mask.nii.gz"), scan) == mask).all())
        True
    """
    array = foreground(mask, f"mask for {path}", ndim=3)
    if array.shape != like.voxels.shape:
        raise DataError(
            f"mask for {path}: shape {array.shape}, but the scan {like.name or 'in memory'} has {like.voxels.shape}; "
            "expected the same (D, H, W)"
        )
    _write(Path(path), array.astype(np.uint8), like)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write a volume as NIfTI, float32 on its own grid; `read_volume` reads it back.

    Raises:
        DataError: If the path does not end in `.nii` or `.nii.gz`, or has no folder.

    Example:
        >>> import tempfile
        >>> volume = Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4), spacing_mm=(5.0, 1.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_volume(Path(folder, "scan.nii.gz"), volume)
        ...     again = read_volume(Path(folder, "scan.nii.gz"))
        >>> bool((again.voxels == volume.voxels).all()), again.spacing_mm
        (True, (5.0, 1.0, 1.0))
    """
    _write(Path(path), volume.voxels.astype(np.float32, copy=False), volume)


def _write(path: Path, slices: np.ndarray, like: Volume) -> None:
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; create it first")
    assert like.affine is not None
    assert like.file_shape is not None
    array = to_file(slices, like.affine).reshape(like.file_shape)
    header = None
    if like.header is not None:
        header = like.header.copy()
        header.extensions.clear()
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            if field in header:
                header[field] = b""
        header["intent_code"] = header["cal_min"] = header["cal_max"] = 0
        header.set_data_dtype(slices.dtype)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(array, like.affine, header)
    if header is None and like.spacing_mm is not None:
        image.header.set_xyzt_units("mm")
    unfinished = path.with_name(f".{path.name}")  # a name that ends in .nii.gz, or it would not be compressed
    nib.save(image, unfinished)
    unfinished.replace(path)


def _open(path: Path, role: str) -> tuple[Any, np.ndarray, nib.Nifti1Header | None]:
    """Return the file's array, not yet read and with its trailing axes of length 1, its affine, and its header."""
    _must_exist(path, role)
    header = None
    if path.suffix == ".npy":
        array = open_npy(path)
    else:
        try:
            image = nib.load(path)
        except _UNREADABLE as error:
            raise DataError(
                f"{path}: cannot be read as NIfTI ({error}): damaged, cut off, or another format; replace the file, or "
                "convert it (DICOM: dcm2niix)"
            ) from error
        if not isinstance(image, nib.Nifti1Pair):
            raise DataError(f"{path}: is {type(image).__name__}, expected NIfTI; convert it to .nii.gz")
        array: Any = image.dataobj
        header = image.header
    shape = tuple(array.shape)
    if np.dtype(array.dtype).kind not in "buif":
        raise DataError(f"{path}: has {array.dtype} voxels, expected one real number each; convert it to grey values")
    if len(shape) < 3:
        raise DataError(f"{path}: has the shape {shape}, expected three axes; save one slice as (X, Y, 1)")
    if any(edge != 1 for edge in shape[3:]):
        raise DataError(f"{path}: has the shape {shape}, expected 3D; save one of its volumes, as image.slicer[..., 0]")
    if 0 in shape:
        raise DataError(f"{path}: has the shape {shape}, so it has no voxels; replace the file")
    if header is None:
        return array, array_affine(shape[:3]), None
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if (
        not np.isfinite(affine).all()
        or abs(np.linalg.det(affine[:3, :3])) < 1e-12
        or np.isnan(io_orientation(affine)).any()
    ):
        raise DataError(f"{path}: the affine {affine.tolist()} has no inverse; set sform or qform of the header")
    return array, affine, header


def _must_exist(path: Path, role: str) -> None:
    if path.is_dir():
        raise DataError(f"{path}: is a folder, expected a {role} file; convert a DICOM series with dcm2niix")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of the {role}")


def _read(path: Path, array: Any, dtype: Any = None) -> np.ndarray:
    """Read the voxels (X, Y, Z), scaled by the header, in the narrowest type or in `dtype`."""
    try:
        return _voxels(path, array, dtype).reshape(array.shape[:3])
    except _UNREADABLE as error:
        raise DataError(
            f"{path}: the voxels cannot be read ({error}); the file is damaged or cut off, replace it"
        ) from error


def _voxels(path: Path, array: Any, dtype: Any) -> np.ndarray:
    """Read a file's array; a compressed one to the end of its stream, where length and checksum are.

    nibabel stops at the last voxel, and so accepts voxels that are not those that were written.
    """
    if not isinstance(array, ArrayProxy) or path.suffix != ".gz":
        return np.asarray(array, dtype=dtype)
    header = (array.shape, array.dtype, array.offset, array.slope, array.inter)
    with gzip.open(path, "rb") as stream:
        values = np.asarray(ArrayProxy(stream, header, mmap=False), dtype=dtype)
        while stream.read(2**20):
            pass
    return values


def _whole_numbers(path: Path, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    whole = np.rint(values)
    with np.errstate(invalid="ignore"):  # infinite minus infinite
        bad = ~(np.abs(values - whole) <= _MAX_ROUNDING)
    if bad.any():
        raise DataError(
            f"{path}: {np.count_nonzero(bad)} voxels of the label are not whole numbers, such as {values[bad][0]:g}; "
            "save the label without interpolation, or threshold it"
        )
    return whole


def _present(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.unique(values) if value)


def _axes_on_scan(path: Path, shape: tuple[int, ...], affine: np.ndarray, volume: Volume | str | Path) -> np.ndarray:
    """Return the turn of a label's axes to the slices of its scan, which the label must fit."""
    if isinstance(volume, Volume):
        scan, scan_shape, scan_affine = volume.name or "the scan", volume.file_shape, volume.affine
    else:
        array, scan_affine, _ = _open(Path(volume), "scan")
        scan, scan_shape = str(volume), array.shape
    assert scan_shape is not None
    assert scan_affine is not None
    other = slice_grid(scan_shape[:3], scan_affine)
    axes = axes_like(affine, other[1])
    own = slice_grid(shape, affine, axes)
    if own[0] != other[0]:
        raise DataError(
            f"{path}: the label has the shape {own[0]} as (D, H, W), {scan} has {other[0]}; expected the same; save "
            "the label on the grid of its scan"
        )
    corners = np.array(np.meshgrid(*[(0, edge - 1) for edge in own[0][::-1]])).reshape(3, -1)
    apart = (own[1] - other[1])[:3]
    shift = np.linalg.norm(apart[:, :3] @ corners + apart[:, 3:], axis=0).max()
    shift /= voxel_sizes(other[1]).min()
    if shift > _MAX_SHIFT:
        raise DataError(
            f"{path}: the label lies up to {shift:.3g} voxels away from {scan}: their affines differ; expected the "
            "same grid; copy the affine of the scan if only the header is wrong, else resample the label to the scan"
        )
    return axes
