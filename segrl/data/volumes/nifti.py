"""Read volumes from files, and write masks on the grid of their scan.

The axes of a file are reordered to (D, H, W), see `segrl.data.volumes.intensity`, by the axes of the patient that they
are closest to. Nothing is resampled: slices of an oblique scan stay oblique. A written mask has shape, affine, sform
and qform of the scan's file, so any viewer shows it on its scan.
"""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import ArrayLike

from segrl.data.volumes.grids import (
    axes_like,
    file_spacing,
    knows_orientation,
    patient_axes,
    slice_grid,
    to_file,
)
from segrl.data.volumes.volume import Volume
from segrl.data.volumes.voxel_files import open_voxels
from segrl.errors import DataError
from segrl.files.whole import whole_file
from segrl.geometry.masks import foreground
from segrl.predictions.target import read_spacing

__all__ = ["axes_on_scan", "lies_on", "read_volume", "write_mask", "write_volume"]

_MAX_SHIFT = 0.05  # largest distance of label and scan in voxels, where they are furthest apart: headers are rounded


def read_volume(path: str | Path, spacing_mm: Any = None) -> Volume:
    """Read a scan from a NIfTI file (`.nii`, `.nii.gz`, `.hdr`/`.img`), a numpy array (`.npy`) or a DICOM series.

    Slope and intercept of the header are applied. Trailing axes of length 1 are dropped. An array in `.npy` has neither
    spacing nor orientation, and neither has a NIfTI file whose affine is the unit matrix and that names no unit. The
    axes of an array are read as those of a NIfTI file, slices last, unless the last two axes are equal and the first
    one differs: then slices come first. A leading axis of length 1, as in M3D-Seg, is dropped.

    Args:
        path: The file; of a DICOM series its folder, or one of its files, see `segrl.data.dicom.open_dicom_series`.
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
    file = open_voxels(path, "scan")
    bad = 0

    def finite(section: np.ndarray) -> np.ndarray:
        nonlocal bad
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and reported as such
            section = section.astype(np.float32, copy=False)
        bad += section.size - int(np.count_nonzero(np.isfinite(section)))
        return section

    slices = file.read(patient_axes(file.affine), np.float32, finite)
    if bad:
        raise DataError(
            f"{path}: {bad} of {slices.size} voxels are NaN or infinite; fix the conversion, or replace them with "
            "numpy.nan_to_num and save the scan again"
        )
    spacing = file_spacing(file.affine, file.header) or read_spacing(spacing_mm, f"{path}: spacing_mm")
    oriented = knows_orientation(file.affine, file.header)
    shown = {"modality": file.array.modality, "inverted": file.array.inverted} if file.of_dicom else {}
    return Volume(slices, spacing, str(path), file.affine, file.file_shape, file.header, oriented, **shown)


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
        ...     bool((read_volume(Path(folder, "mask.nii.gz")).voxels == mask).all())
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
        DataError: If the path does not end in `.nii` or `.nii.gz`, or has no folder; or low values are shown white,
            which NIfTI cannot say.

    Example:
        >>> import tempfile
        >>> volume = Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4), spacing_mm=(5.0, 1.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_volume(Path(folder, "scan.nii.gz"), volume)
        ...     again = read_volume(Path(folder, "scan.nii.gz"))
        >>> bool((again.voxels == volume.voxels).all()), again.spacing_mm
        (True, (5.0, 1.0, 1.0))
    """
    if volume.inverted:
        raise DataError(
            f"{path}: low values of {volume.name or 'the volume'} are shown white (MONOCHROME1), which NIfTI cannot "
            "say; write dataclasses.replace(volume, voxels=-volume.voxels, inverted=False)"
        )
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
    with whole_file(path, suffix="".join(path.suffixes[-2:])) as unfinished:  # .gz, or it would not be compressed
        nib.save(image, unfinished)


def axes_on_scan(path: Path, shape: tuple[int, ...], affine: np.ndarray, volume: Volume | str | Path) -> np.ndarray:
    """Return the turn of a label's axes to the slices of its scan, which the label must fit.

    Raises:
        DataError: Another shape, or another position.
    """
    if isinstance(volume, Volume):
        scan, scan_shape, scan_affine = volume.name or "the scan", volume.file_shape, volume.affine
    else:
        file = open_voxels(volume, "scan")
        scan, scan_shape, scan_affine = str(volume), file.shape, file.affine
    assert scan_shape is not None
    assert scan_affine is not None
    axes, own, other, shift = _compared(shape, affine, scan_shape[:3], scan_affine)
    if own != other:
        raise DataError(
            f"{path}: the label has the shape {own} as (D, H, W), {scan} has {other}; expected the same; save "
            "the label on the grid of its scan"
        )
    if shift > _MAX_SHIFT:
        raise DataError(
            f"{path}: the label lies up to {shift:.3g} voxels away from {scan}: their affines differ; expected the "
            "same grid; copy the affine of the scan if only the header is wrong, else resample the label to the scan"
        )
    return axes


def lies_on(shape: tuple[int, ...], affine: np.ndarray, scan_shape: tuple[int, ...], scan_affine: np.ndarray) -> bool:
    """Return whether a label with this grid fits a scan with that one, whatever the order of their axes.

    Example:
        >>> lies_on((2, 3, 4), np.eye(4), (2, 3, 4), np.eye(4)), lies_on((2, 3, 4), np.eye(4), (2, 3, 5), np.eye(4))
        (True, False)
    """
    _, own, other, shift = _compared(shape, affine, scan_shape, scan_affine)
    return own == other and shift <= _MAX_SHIFT


def _compared(
    shape: tuple[int, ...], affine: np.ndarray, scan_shape: tuple[int, ...], scan_affine: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...], float]:
    """Return the turn of a label's axes to the slices of its scan, both shapes as (D, H, W), and their distance there.

    The distance is that of the corners that are furthest apart, in voxels; it is infinite for other shapes.
    """
    other = slice_grid(scan_shape, scan_affine)
    axes = axes_like(affine, other[1])
    own = slice_grid(shape, affine, axes)
    if own[0] != other[0]:
        return axes, own[0], other[0], np.inf
    corners = np.array(np.meshgrid(*[(0, edge - 1) for edge in own[0][::-1]])).reshape(3, -1)
    apart = (own[1] - other[1])[:3]
    shift = np.linalg.norm(apart[:, :3] @ corners + apart[:, 3:], axis=0).max()
    return axes, own[0], other[0], float(shift / voxel_sizes(other[1]).min())
