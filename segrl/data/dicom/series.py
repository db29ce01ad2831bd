"""A DICOM series as a volume: its files in order, and the grid that they lie on."""

# X/Y/Z voxels along columns, rows and slices of a series

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segrl.data.dicom.files import decoded, is_dicom, pydicom_module, quiet_pydicom, read_dataset, shown_inverted
from segrl.errors import DataError

__all__ = ["DicomSeries", "holds_dicom", "open_dicom_series", "open_dicom_volumes"]

_SEARCHED = 64  # files of a folder that are looked at to see whether it holds DICOM
_APART = 0.05  # largest deviation of a distance between slices, as a fraction of their step: headers are rounded
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """Files of one series of single-frame grey images, sorted along the normal of their slices.

    Attributes:
        files: One for each slice.
        shape: (X, Y, Z): columns, rows and slices.
        affine: (4, 4), voxel to NIfTI's world (RAS), millimetres.
        modality: Code of the files, such as "CT".
        inverted: Whether low values are shown white (MONOCHROME1).
        derived: Whether the voxels were computed from others, such as maps of enhancement and subtractions.
        study: UID of the study, one visit.

    Example:
        >>> DicomSeries((Path("1.dcm"),), (512, 512, 1), np.eye(4), "CT").dtype
        dtype('float32')
    """

    files: tuple[Path, ...]
    shape: tuple[int, int, int]
    affine: np.ndarray
    modality: str
    inverted: bool = False
    derived: bool = False
    study: str = ""

    dtype = np.dtype(np.float32)

    def slices(self) -> Iterator[np.ndarray]:
        """Yield the slices in order, (X, Y) float32, rescaled as their files say.

        Raises:
            DataError: Pixels cannot be decoded; names the file.
        """
        for path in self.files:
            yield decoded(read_dataset(path, pixels=True), path).T


def holds_dicom(path: str | os.PathLike) -> bool:
    """Return whether a path is a DICOM file, or a folder with at least one.

    Example:
        >>> holds_dicom("."), holds_dicom("nowhere")
        (False, False)
    """
    path = Path(path)
    if path.is_dir():
        return any(is_dicom(file) for file in _files(path)[:_SEARCHED])
    return is_dicom(path)


def open_dicom_series(path: str | os.PathLike) -> DicomSeries:
    """Read the headers of a series; pixels are decoded when slices are read.

    Args:
        path: A folder with the files of one series, or one file of a series, whose other files lie beside it. Files
            that are no DICOM, and a DICOMDIR, are left out.

    Raises:
        DataError: No series or several, files without a position, with several frames or in colour, slices of different
            size or direction, two slices at one position, or slices that are missing; names files and fix.
        SegRLError: pydicom is not installed.

    Example:
        >>> open_dicom_series("nowhere")
        Traceback (most recent call last):
        segrl.errors.DataError: nowhere: no such file or folder; give a DICOM series
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a DICOM series")
    return _on_grid(_one_series(path), path)


def open_dicom_volumes(folder: str | os.PathLike) -> tuple[list[DicomSeries], list[str]]:
    """Read the headers of all volumes in a folder and its subfolders, such as those of one patient.

    A series that holds several volumes at one position, such as the phases of a contrast agent, is divided: files at
    one position are ordered by the identifier of their temporal position, acquisition number and time, and instance
    number, and each volume has one of each position.

    Args:
        folder: Files that are no DICOM image of one grey frame (segmentations, reports) are left out.

    Returns:
        The volumes in the order in which they were taken (date and time of the study, time, number of the series,
        phase), and why series are no volume.

    Raises:
        SegRLError: pydicom is not installed.

    Example:
        >>> open_dicom_volumes("nowhere")
        ([], [])
    """
    found: dict[str, dict[Path, Any]] = {}
    for file in sorted(path for path in Path(folder).rglob("*") if path.name != "DICOMDIR" and is_dicom(path)):
        try:
            header = read_dataset(file, pixels=False)
        except DataError:
            continue
        found.setdefault(str(header.get("SeriesInstanceUID", "")), {})[file] = header
    volumes, problems = [], []
    for headers in found.values():
        where = next(iter(headers)).parent
        try:
            for number, phase in enumerate(_phases(headers, where)):
                volumes.append(((*_taken(next(iter(phase.values()))), number), _on_grid(phase, where)))
        except DataError as error:
            problems.append(str(error))
    return [volume for _, volume in sorted(volumes, key=lambda known: known[0])], problems


def _on_grid(headers: dict[Path, Any], path: Path) -> DicomSeries:
    """Return the volume that files with these headers are, in order."""
    first = next(iter(headers.values()))
    shape = int(first.Columns), int(first.Rows), len(headers)
    directions = _numbers(first, "ImageOrientationPatient", 6, path)
    normal = np.cross(directions[:3], directions[3:])
    for file, header in headers.items():
        _check_alike(header, file, first, next(iter(headers)), directions)
    positions = {file: _numbers(header, "ImagePositionPatient", 3, file) for file, header in headers.items()}
    ordered = sorted(headers, key=lambda file: float(positions[file] @ normal))
    step = _step([positions[file] for file in ordered], ordered, first, normal)
    down, across = _numbers(first, "PixelSpacing", 2, path)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = directions[:3] * across, directions[3:] * down
    affine[:3, 2], affine[:3, 3] = step, positions[ordered[0]]
    return DicomSeries(
        tuple(ordered),
        shape,
        _LPS_TO_RAS @ affine,
        str(first.get("Modality", "") or ""),
        shown_inverted(first),
        "DERIVED" in list(first.get("ImageType") or []),
        str(first.get("StudyInstanceUID", "")),
    )


def _phases(headers: dict[Path, Any], where: Path) -> list[dict[Path, Any]]:
    """Divide files into volumes that have one of each position."""
    at: dict[tuple[float, ...], list[Path]] = {}
    for file, header in headers.items():
        position = _numbers(header, "ImagePositionPatient", 3, file)
        at.setdefault(tuple(np.round(position, 2).tolist()), []).append(file)
    counts = sorted({len(files) for files in at.values()})
    if len(counts) > 1:
        raise DataError(f"{where}: some positions of the series have {counts[0]} slices and some {counts[-1]}")
    ordered = [sorted(files, key=lambda file: _phase(headers[file])) for files in at.values()]
    return [{files[n]: headers[files[n]] for files in ordered} for n in range(counts[0])]


def _phase(header: Any) -> tuple[Any, ...]:
    """Return what orders the files at one position."""
    whole = [_whole(header, name) for name in ("TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber")]
    return *whole[:2], str(header.get("AcquisitionTime") or ""), whole[2]


def _taken(header: Any) -> tuple[Any, ...]:
    names = ("StudyDate", "StudyTime", "AcquisitionTime")
    return *(str(header.get(name) or "") for name in names), _whole(header, "SeriesNumber")


def _whole(header: Any, name: str) -> int:
    return int(header.get(name) or 0)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.name != "DICOMDIR" and file.is_file()]


def _one_series(path: Path) -> dict[Path, Any]:
    """Return the headers of the series that a path names, by file."""
    wanted = None
    if path.is_file():
        wanted = str(read_dataset(path, pixels=False).get("SeriesInstanceUID", ""))
    found: dict[str, dict[Path, Any]] = {}
    for file in _files(path if path.is_dir() else path.parent):
        if not is_dicom(file):
            continue
        if wanted is not None and _series_of(file) != wanted:
            continue
        header = read_dataset(file, pixels=False)
        found.setdefault(str(header.get("SeriesInstanceUID", "")), {})[file] = header
    if not found:
        raise DataError(f"{path}: holds no DICOM files; give the folder of one series")
    if len(found) > 1:
        listed = [
            f"{next(iter(headers.values())).get('SeriesDescription', '') or 'without a description'!r} "
            f"({len(headers)} files, such as {next(iter(headers)).name})"
            for headers in found.values()
        ]
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise DataError(
            f"{path}: holds {len(found)} series, expected one: {', '.join(listed[:5])}{more}; give one file of the "
            "series that is meant, or a folder of its own"
        )
    return next(iter(found.values()))


def _series_of(file: Path) -> str | None:
    """Return the series of a file, read in part; None for one that cannot be read, which is of another series."""
    pydicom = pydicom_module()
    try:
        tags = ["SeriesInstanceUID"]
        with quiet_pydicom():
            found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
            return str(found.SeriesInstanceUID)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, AttributeError, KeyError):
        return None


def _numbers(header: Any, name: str, count: int, where: Path) -> np.ndarray:
    try:
        values = np.array([float(value) for value in header.get(name) or []])
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise DataError(
            f"{where}: {name} is {header.get(name)!r}, expected {count} numbers: without them the file lies in no "
            "volume; ask about it as an image, or convert the series to NIfTI (dcm2niix)"
        )
    return values


def _check_alike(header: Any, file: Path, first: Any, other: Path, directions: np.ndarray) -> None:
    size = int(header.Columns), int(header.Rows)
    if size != (int(first.Columns), int(first.Rows)):
        raise DataError(
            f"{file}: has {size[0]} x {size[1]} px, and {other.name} {first.Columns} x {first.Rows}; expected one "
            "size; leave out localizers and other images"
        )
    turned = np.abs(_numbers(header, "ImageOrientationPatient", 6, file) - directions).max() > 1e-3
    spaced = np.abs(_numbers(header, "PixelSpacing", 2, file) - _numbers(first, "PixelSpacing", 2, other)).max() > 1e-4
    if shown_inverted(header) != shown_inverted(first):
        raise DataError(
            f"{file}: is {header.PhotometricInterpretation}, and {other.name} {first.PhotometricInterpretation}: low "
            "values are white in one of them only; give each kind a folder of its own"
        )
    if turned or spaced:
        what = "direction" if turned else "pixel spacing"
        raise DataError(
            f"{file}: has another {what} than {other.name}; expected parallel slices of one grid; give each of the two "
            "a folder of its own"
        )


def _step(positions: list[np.ndarray], files: list[Path], first: Any, normal: np.ndarray) -> np.ndarray:
    """Return the way from a slice to the next one."""
    if len(positions) == 1:
        given = first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0
        return normal * abs(float(given) or 1.0)
    ways = np.diff(positions, axis=0)
    lengths = np.linalg.norm(ways, axis=1)
    usual = np.median(ways, axis=0)
    length = float(np.linalg.norm(usual))
    if (same := np.flatnonzero(lengths < 1e-3)).size:
        one, other = files[same[0]].name, files[same[0] + 1].name
        raise DataError(
            f"{files[0].parent}: {one} and {other} lie at one position, so the series holds several volumes (phases, "
            f"echoes) or copies; give each a folder of its own ({len(same)} such pairs)"
        )
    odd = np.flatnonzero(np.linalg.norm(ways - usual, axis=1) > max(_APART * length, 1e-2))
    if odd.size:
        n = int(odd[0])
        raise DataError(
            f"{files[0].parent}: {files[n].name} and {files[n + 1].name} are {lengths[n]:.4g} mm apart, most "
            f"neighbours {length:.4g} mm; slices are missing or "
            "belong elsewhere; complete the series, or resample it to NIfTI"
        )
    return (positions[-1] - positions[0]) / (len(positions) - 1)
