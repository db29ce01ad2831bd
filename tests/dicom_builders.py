"""DICOM files that tests write: pydicom's own small CT with other pixels, positions and syntaxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian, generate_uid


def file_of(name: str) -> Path:
    """A file that pydicom brings along."""
    found = get_testdata_file(name, download=False)
    assert found is not None, name
    return Path(str(found))


def dataset(pixels: np.ndarray, **changes: Any) -> Any:
    """A CT of these pixels, (H, W) of an integer type, with other values of some tags; None deletes a tag."""
    made = pydicom.dcmread(file_of("CT_small.dcm"))
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.Rows, made.Columns = pixels.shape
    bits = 8 * pixels.dtype.itemsize
    made.BitsAllocated = made.BitsStored = bits
    made.HighBit, made.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    made["PixelData"].VR = "OB" if bits == 8 else "OW"
    for tag in ("DataSetTrailingPadding", "PixelPaddingValue"):
        if tag in made:
            delattr(made, tag)
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    for name, value in changes.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    return made


def write(path: Path, pixels: np.ndarray, **changes: Any) -> Path:
    """Write one file; see `dataset`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(pixels, **changes).save_as(path)
    return path


def write_series(
    folder: Path,
    voxels: np.ndarray,
    *,
    spacing: tuple[float, float, float] = (5.0, 2.0, 1.0),
    directions: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    origin: tuple[float, float, float] = (-10.0, -20.0, 30.0),
    order: Any = None,
    **changes: Any,
) -> list[Path]:
    """Write a series of int16 slices (Z, Y, X), the first one at the origin, with shuffled names.

    Args:
        folder: Where to.
        voxels: Stored values.
        spacing: Between slices, rows and columns, millimetres.
        directions: Of rows and columns, in the patient (LPS).
        origin: Of the first voxel.
        order: Numbers in the names of the files.
        changes: Other values of tags.
    """
    uid = changes.pop("SeriesInstanceUID", None) or generate_uid()
    normal = np.cross(directions[:3], directions[3:])
    numbers = np.random.default_rng(0).permutation(len(voxels)) if order is None else order
    files = []
    for n, pixels in enumerate(voxels):
        position = np.array(origin) + n * spacing[0] * normal
        known = {
            "SeriesInstanceUID": uid,
            "ImagePositionPatient": [float(value) for value in position],
            "ImageOrientationPatient": list(directions),
            "PixelSpacing": [spacing[1], spacing[2]],
            "SliceThickness": spacing[0],
            "InstanceNumber": n + 1,
        }
        files.append(write(folder / f"IM{numbers[n]:03d}.dcm", pixels, **{**known, **changes}))
    return files
