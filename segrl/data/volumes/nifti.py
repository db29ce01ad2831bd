"""Volumes from files and masks back into files, on the scan's own grid.

Files are turned to one order, (D, H, W) as `segrl.data.volumes.intensity` describes it, by the axes closest to the
patient's: slices of oblique scans are the scan's own, nothing is resampled. A written mask has
shape, affine, sform and qform of the scan's file, so any viewer shows it on its scan.
"""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import ArrayLike

from segrl.data.volumes.arrays import array_affine, open_npy, sparse_channels, sparse_label
from segrl.errors import DataError
from segrl.geometry.masks import foreground

__all__ = ["Volume", "label_values", "read_label", "read_volume", "write_mask", "write_volume"]

# What nibabel and gzip raise for broken files; a truncated .nii.gz gives EOFError, zlib.error or OSError.
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
_PATIENT_AXES = axcodes2ornt(("L", "P", "S"))  # of (W, H, D)
_MAX_SHIFT = 0.05  # voxels that label and scan may be apart, where they are furthest apart: headers round
_MAX_ROUNDING = 1e-4  # that a whole number in a scaled label file may be off
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's unit codes for metre and micron; all else is taken for millimetres
_LISTED = 20  # label values named in one error


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in memory, with what is needed to write a mask onto the grid of its file.

    Attributes:
        voxels: (D, H, W) float32.
        spacing_mm: Size of a voxel along D, H and W in millimetres.
        name: The file's path, or what the volume is called in errors.
        affine: (4, 4) of the file, voxel to world; None for a volume without a file, whose grid starts at the origin.
        file_shape: Shape of the file's array, with its trailing axes of length 1; None for a volume without a file.
        header: The file's NIfTI header; None where there is none.

    Raises:
        DataError: If the voxels are not (D, H, W), there are none, or the spacing is not three positive numbers.
    """

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    name: str = ""
    affine: np.ndarray | None = None
    file_shape: tuple[int, ...] | None = None
    header: nib.Nifti1Header | None = None

    def __post_init__(self) -> None:
        label = f" of {self.name!r}" if self.name else ""
        if self.voxels.ndim != 3 or not self.voxels.size:
            raise DataError(f"Volume.voxels{label}: shape {self.voxels.shape}; expected (D, H, W), none of them 0")
        if len(self.spacing_mm) != 3 or not all(np.isfinite(edge) and edge > 0 for edge in self.spacing_mm):
            raise DataError(f"Volume.spacing_mm{label}: {self.spacing_mm}; expected three positive numbers (z, y, x)")
        if self.affine is None:
            depth, height, width = self.voxels.shape
            z, y, x = self.spacing_mm
            object.__setattr__(self, "affine", np.diag([-x, -y, z, 1.0]))
            object.__setattr__(self, "file_shape", (width, height, depth))


def read_volume(path: str | Path) -> Volume:
    """Reads a scan from a NIfTI file (`.nii`, `.nii.gz`, `.hdr`/`.img`) or a numpy array (`.npy`).

    Slope and intercept of the header are applied. Trailing axes of length 1 are dropped. An array in `.npy` has no
    spacing: it gets 1 mm, and its axes are taken for those of a NIfTI file, slices last; slices come first when the
    first of the three axes is the one that differs. A leading axis of length 1, as in M3D-Seg, is dropped.

    Raises:
        DataError: With the file's name and what to do, if the file is missing, truncated or of another format, is not
            one 3D volume of real numbers, is empty, has NaN or infinite voxels, or has no usable affine.
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
    unit = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0) if header is not None else 1.0
    edges = voxel_sizes(affine) * unit
    x, y, z = (float(edges[axis]) for axis in _file_axes(affine))
    return Volume(_to_slices(voxels, affine), (z, y, x), str(path), affine, tuple(array.shape), header)


def read_label(
    path: str | Path, volume: Volume | None = None, value: int = 0, *, allow_empty: bool = False
) -> np.ndarray:
    """Reads the label of a scan: one of its values, or its whole foreground.

    Args:
        path: NIfTI file or `.npy` array of whole numbers, or sparse `.npz` file of M3D-Seg, where the value is the
            number of the channel, from 1.
        volume: The scan, to check that the label fits it; the order of the file's axes may differ.
        value: Label value that is foreground; 0 takes every value that is not zero.
        allow_empty: Whether a label without such voxels is an empty mask instead of an error.

    Returns:
        (D, H, W) bool.

    Raises:
        DataError: As `read_volume`, and if the label has values that are not whole numbers, lies elsewhere than the
            scan or has another shape, or has no foreground or not that value: then the error says which it has.

    Affines are compared where the two grids are furthest apart: at their corners, relative to the smallest edge of a
    voxel.
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
    if volume is not None:
        _check_fit(path, mask.shape, affine, volume)
    if not (allow_empty or mask.any()):
        listed = ", ".join(str(number) for number in (present or ())[:_LISTED]) or "no foreground"
        wanted = f"has no voxel with the value {value}, only {listed}" if value else "has no foreground"
        raise DataError(
            f"{path}: the label {wanted}; "
            + ("correct label_value, " if value else "")
            + "remove the row or set allow_empty=True"
        )
    return _to_slices(mask, affine)


def label_values(path: str | Path) -> tuple[int, ...]:
    """The values in a label file that are not zero, increasing; for a sparse `.npz` file its channels with foreground.

    Raises:
        DataError: As `read_label`.
    """
    path = Path(path)
    if path.suffix == ".npz":
        _must_exist(path, "label")
        return sparse_channels(path)
    return _present(_whole_numbers(path, _read(path, _open(path, "label")[0])))


def write_mask(path: str | Path, mask: ArrayLike, like: Volume) -> None:
    """Writes a mask as NIfTI, uint8 with the values 0 and 1, on the grid of its scan.

    Shape, affine, sform and qform with their codes, units and NIfTI version are the scan's; header extensions and texts
    are not copied, since they may name the patient.

    Args:
        path: Ends in `.nii` or `.nii.gz`; an existing file is replaced.
        mask: (D, H, W) bool or integer, nonzero being foreground, in the order of `like.voxels`.
        like: The scan.

    Raises:
        DataError: If the mask is not of the scan's shape, or the path has another ending or no folder.
    """
    array = foreground(mask, f"mask for {path}", ndim=3)
    if array.shape != like.voxels.shape:
        raise DataError(
            f"mask for {path}: shape {array.shape}, but the scan {like.name or 'in memory'} has {like.voxels.shape}; "
            "expected the same (D, H, W)"
        )
    _write(Path(path), array.astype(np.uint8), like)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Writes a volume as NIfTI, float32 on its own grid: what `read_volume` reads back.

    Raises:
        DataError: If the path does not end in `.nii` or `.nii.gz`, or has no folder.
    """
    _write(Path(path), volume.voxels.astype(np.float32, copy=False), volume)


def _write(path: Path, slices: np.ndarray, like: Volume) -> None:
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; create it first")
    assert like.affine is not None
    assert like.file_shape is not None
    axes = ornt_transform(_PATIENT_AXES, io_orientation(like.affine))
    array = apply_orientation(slices.transpose(2, 1, 0), axes).reshape(like.file_shape)
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
    if header is None:
        image.header.set_xyzt_units("mm")
    unfinished = path.with_name(f".{path.name}")  # a name that ends in .nii.gz, or it would not be compressed
    nib.save(image, unfinished)
    unfinished.replace(path)


def _open(path: Path, role: str) -> tuple[Any, np.ndarray, nib.Nifti1Header | None]:
    """The file's array, not yet read and with its trailing axes of length 1; its affine; its header."""
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
    """The voxels (X, Y, Z), scaled by the header, in the narrowest type or in `dtype`."""
    try:
        return np.asarray(array, dtype=dtype).reshape(array.shape[:3])
    except _UNREADABLE as error:
        raise DataError(
            f"{path}: the voxels cannot be read ({error}); the file is damaged or cut off, replace it"
        ) from error


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


def _check_fit(path: Path, shape: tuple[int, ...], affine: np.ndarray, volume: Volume) -> None:
    assert volume.affine is not None
    assert volume.file_shape is not None
    own, other = _slice_grid(shape, affine), _slice_grid(volume.file_shape[:3], volume.affine)
    scan = volume.name or "the scan"
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


def _slice_grid(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """(D, H, W) of a file's array in this order, and the affine of (W, H, D)."""
    axes = ornt_transform(io_orientation(affine), _PATIENT_AXES)
    turned = tuple(shape[axis] for axis in _file_axes(affine))
    return turned[::-1], affine @ inv_ornt_aff(axes, shape)


def _file_axes(affine: np.ndarray) -> list[int]:
    """The axes of the file that run along W, H and D."""
    return [int(axis) for axis in np.argsort(io_orientation(affine)[:, 0])]


def _to_slices(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(X, Y, Z) of a file as (D, H, W)."""
    axes = ornt_transform(io_orientation(affine), _PATIENT_AXES)
    return np.ascontiguousarray(apply_orientation(array, axes).transpose(2, 1, 0))
