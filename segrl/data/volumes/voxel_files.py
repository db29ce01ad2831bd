"""Files of voxels: judged by their header, then read once, in sections, to the end, where length and checksum are.

Neither a whole file nor its decompressed bytes are ever in memory: only the array that is filled and one section.
"""

# X/Y/Z voxels along the axes of a file

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError

from segrl.data.dicom.series import DicomSeries, holds_dicom, open_dicom_series
from segrl.data.volumes.arrays import array_affine, open_npy
from segrl.data.volumes.limits import check_size
from segrl.data.volumes.other_formats import other_format
from segrl.errors import DataError

__all__ = ["VoxelFile", "must_exist", "open_voxels"]

# nibabel and gzip raise these for broken files; a truncated .nii.gz gives EOFError, zlib.error or OSError.
# Dimensions that a damaged header invents do not fit into memory, or not into an integer.
_UNREADABLE = (
    *(OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError),
    *(MemoryError, OverflowError),
)
_SECTION_BYTES = 2**23
_DEFLATE = 1032  # bytes that one byte of a gzip file can hold at most
_AS_IN_FILE = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, eq=False)
class VoxelFile:
    """The header of a scan's or label's file; its voxels are not yet read.

    Attributes:
        path: The file.
        array: nibabel's proxy of the voxels, a memory-mapped array, or a DICOM series.
        affine: (4, 4), voxel of the file to world.
        header: NIfTI header; None for an array. A DICOM series gets one that says its unit and orientation.
        source: The file that holds the voxels, which is another one for `.hdr`/`.img`.
    """

    path: Path
    array: Any
    affine: np.ndarray
    header: nib.Nifti1Header | None
    source: Path

    @property
    def of_dicom(self) -> bool:
        """Whether it is a DICOM series."""
        return isinstance(self.array, DicomSeries)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the file's array, with its trailing axes of length 1."""
        return tuple(int(edge) for edge in self.array.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        x, y, z = self.file_shape[:3]
        return x, y, z

    def read(self, axes: np.ndarray, dtype: Any, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Read all voxels into one array (D, H, W).

        Args:
            axes: Turn of the file's axes to (W, H, D), see `segrl.data.volumes.grids`.
            dtype: Type of the array; it is widened if `convert` returns a wider one.
            convert: From a section of the file, scaled by the header, to the values that are kept.

        Raises:
            DataError: The file is damaged, shorter or longer than its header says, or does not fit into memory.
        """
        try:
            slices = np.empty([self.shape[int(axis)] for axis in np.argsort(axes[:, 0])[::-1]], dtype)
            for where, section in self._sections():
                values = convert(section)
                if values.dtype.itemsize > slices.dtype.itemsize:
                    slices = slices.astype(values.dtype)
                # A view in the order of the file: what is assigned to it lands in the slices.
                apply_orientation(slices.transpose(2, 1, 0), ornt_transform(_AS_IN_FILE, axes))[where] = values
        except MemoryError as error:
            raise DataError(
                f"{self.path}: not enough memory for {' x '.join(map(str, self.shape))} voxels ({error}); crop or "
                "resample it, or leave it out"
            ) from error
        except _UNREADABLE as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self.path}: the voxels cannot be read ({error}); the file is damaged or cut off, replace it"
            ) from error
        return slices

    def _sections(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Yield the voxels, scaled by the header, with their place in (X, Y, Z)."""
        if self.of_dicom:
            for number, values in enumerate(self.array.slices()):
                yield np.s_[:, :, number : number + 1], values[..., np.newaxis]
            return
        if not isinstance(self.array, ArrayProxy):
            voxels = self.array.reshape(self.shape)
            # Along the axis that changes slowest, so that a section is one piece of the file.
            slowest = 2 if voxels.flags.f_contiguous else 0
            for first, last in _steps(voxels.shape[slowest], voxels.nbytes):
                where = tuple(slice(first, last) if axis == slowest else slice(None) for axis in range(3))
                yield where, np.asarray(voxels[where])
            return
        proxy, (x, y, z) = self.array, self.shape
        with _decompressed(self.source) as stream:
            _skip(stream, int(proxy.offset))
            for first, last in _steps(z, math.prod(self.shape) * proxy.dtype.itemsize):
                section = np.empty(x * y * (last - first), proxy.dtype)
                _fill(stream, section)
                scaled = apply_read_scaling(section.reshape((x, y, -1), order="F"), proxy.slope, proxy.inter)
                yield np.s_[:, :, first:last], scaled
            if stream.read(1):  # at the end of the stream gzip compares its checksum
                raise DataError(
                    f"{self.path}: goes on behind the {math.prod(self.shape)} voxels of its header; the header or the "
                    "file is damaged, replace it"
                )


def open_voxels(path: str | Path, role: str) -> VoxelFile:
    """Read the header of a NIfTI file, of a `.npy` array or, for a scan, of a DICOM series, and check what it says.

    Args:
        path: The file; of a DICOM series the folder, or one of its files.
        role: "scan" or "label", for errors.

    Raises:
        DataError: No such file, another format, no single 3D volume of real numbers, no usable affine, more voxels than
            `segrl.data.volumes.limits.MAX_VOXELS`, or a size that does not fit the file's.
    """
    path = Path(path)
    if role == "scan" and holds_dicom(path):
        return _series(path)
    must_exist(path, role)
    if path.suffix == ".npy":
        array: Any = open_npy(path)
        _check_shape(path, tuple(array.shape), array.dtype)
        return VoxelFile(path, array, array_affine(array.shape[:3]), None, path)
    try:
        image = nib.load(path)
        _read_header_to_end(image)
    except _UNREADABLE as error:
        found = other_format(path)
        raise DataError(
            f"{path}: {found}"
            if found
            else f"{path}: cannot be read as NIfTI ({error}): damaged, cut off, or another format; replace the file, "
            "or export it as NIfTI"
        ) from error
    if not isinstance(image, nib.Nifti1Pair):
        raise DataError(f"{path}: is {type(image).__name__}, expected NIfTI; convert it to .nii.gz")
    proxy: Any = image.dataobj
    _check_shape(path, tuple(proxy.shape), proxy.dtype)
    source = Path(str(image.file_map["image"].filename))
    must_exist(source, role)
    _check_length(path, source, int(proxy.offset) + math.prod(proxy.shape) * proxy.dtype.itemsize)
    return VoxelFile(path, proxy, _usable_affine(path, image.header), image.header, source)


def _series(path: Path) -> VoxelFile:
    series = open_dicom_series(path)
    check_size(path, series.shape)
    if not _turns_back(series.affine):
        raise DataError(
            f"{path}: the grid {series.affine.tolist()} has no inverse; the headers of the series are wrong"
        )
    header = nib.Nifti1Header()
    header.set_data_shape(series.shape)
    header.set_xyzt_units("mm")
    header.set_sform(series.affine, code=1)  # scanner coordinates
    header.set_qform(series.affine, code=1, strip_shears=True)
    return VoxelFile(path, series, series.affine, header, path)


def _read_header_to_end(image: Any) -> None:
    """Compare the checksum of a compressed header in a file of its own; others are read with their voxels."""
    names = {kind: Path(str(holder.filename)) for kind, holder in image.file_map.items()}
    header = names.get("header", names.get("image"))
    if header is not None and header != names.get("image") and _ending(header) == ".gz":
        with _decompressed(header) as stream:
            while stream.read(_SECTION_BYTES):
                pass


def must_exist(path: Path, role: str) -> None:
    """Raise `DataError` unless the path is that of a regular file."""
    if path.is_dir():
        series = " or the folder of a DICOM series" if role == "scan" else ""
        plain = f"is a folder without DICOM files, expected a {role} file{series}"
        raise DataError(f"{path}: {other_format(path) or plain}")
    if not path.exists():
        raise DataError(f"{path}: no such file; give the path of the {role}")
    if not path.is_file():  # a FIFO would be waited for
        raise DataError(f"{path}: is no regular file; give the path of the {role}")


def _check_shape(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if np.dtype(dtype).kind not in "buif":
        raise DataError(f"{path}: has {dtype} voxels, expected one real number each; convert it to grey values")
    if len(shape) < 3:
        raise DataError(f"{path}: has the shape {shape}, expected three axes; save one slice as (X, Y, 1)")
    if any(edge != 1 for edge in shape[3:]):
        longer = tuple(edge for edge in shape if edge != 1)
        if len(longer) <= 3 and min(shape) > 0:
            raise DataError(
                f"{path}: has the shape {shape}, with an axis of length 1 before the last; expected (X, Y, Z); save "
                f"numpy.squeeze of the array, {longer}, with the affine of these axes"
            )
        raise DataError(f"{path}: has the shape {shape}, expected 3D; save one of its volumes, as image.slicer[..., 0]")
    if min(shape) < 1:
        raise DataError(f"{path}: has the shape {shape}, so it has no voxels; replace the file")
    check_size(path, shape)


def _check_length(path: Path, source: Path, expected: int) -> None:
    """Compare the bytes that the header asks for with those of the file, before any memory is asked for."""
    found = source.stat().st_size
    if _ending(source) in (".nii", ".img", ".hdr"):
        if found != expected:
            raise DataError(
                f"{path}: the voxels cannot be read (the header says that the file has {expected} bytes, and it has "
                f"{found}); the file is damaged or cut off, replace it"
            )
    elif _ending(source) == ".gz" and expected > _DEFLATE * found + 2**16:
        raise DataError(
            f"{path}: the voxels cannot be read (the header asks for {expected} bytes, which {found} compressed ones "
            "cannot hold); the file is damaged or cut off, replace it"
        )


def _usable_affine(path: Path, header: Any) -> np.ndarray:
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if _turns_back(affine):
        return affine
    fix = "set sform or qform of the header"
    if int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0 and _turns_back(np.asarray(header.get_qform())):
        fix = (
            "the qform beside it is valid: use it, with image.set_sform(None, 0) and nibabel.save(image, path), or "
            "copy it, with image.set_sform(image.get_qform())"
        )
    raise DataError(f"{path}: the affine {affine.tolist()} has no inverse; {fix}")


def _turns_back(affine: np.ndarray) -> bool:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return False
    return not np.isnan(io_orientation(affine)).any()


def _decompressed(path: Path) -> Any:
    """Open a file of voxels; gzip by the standard library, which compares checksums, whatever nibabel would take."""
    return gzip.open(path, "rb") if _ending(path) == ".gz" else ImageOpener(str(path), "rb")


def _ending(path: Path) -> str:
    return path.suffix.lower()


def _steps(length: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of sections of about `_SECTION_BYTES` along an axis."""
    step = max(1, _SECTION_BYTES * length // max(1, nbytes))
    for first in range(0, length, step):
        yield first, min(first + step, length)


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0:
        found = len(stream.read(min(count, _SECTION_BYTES)))
        if not found:
            raise EOFError("the file ends before its voxels")
        count -= found


def _fill(stream: BinaryIO, section: np.ndarray) -> None:
    rest = memoryview(section.view(np.uint8))  # pyright: ignore[reportArgumentType]
    while rest:
        found = stream.readinto(rest)  # type: ignore[attr-defined]
        if not found:
            raise EOFError("the file ends within its voxels")
        rest = rest[found:]
