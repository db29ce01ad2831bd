"""A mask as a DICOM Segmentation object, on the images that it was drawn on."""

# H/W pixels of an image; X/Y/Z voxels of a series

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from segrl._version import __version__
from segrl.data.dicom.files import quiet_pydicom, read_dataset
from segrl.errors import DataError, SegRLError
from segrl.files.whole import whole_file
from segrl.geometry.masks import foreground

__all__ = ["highdicom_modules", "write_dicom_seg"]

_LABEL = 64  # characters of a segment's label (LO)


def write_dicom_seg(
    path: str | os.PathLike, mask: ArrayLike, sources: Sequence[str | os.PathLike], *, label: str = "segmentation"
) -> None:
    """Write a mask as a binary DICOM Segmentation object that refers to its source images.

    Patient, study and frame of reference are those of the sources, so that a viewer shows it on them; the series and
    object are new. An empty mask is written with all its frames.

    Args:
        path: An existing file is replaced, but no source.
        mask: (H, W) of one image, or (Z, H, W) with a frame for each source, nonzero being foreground; rows and columns
            are those of the files.
        sources: The DICOM files that the mask was drawn on, in its order.
        label: Of the segment, such as the question; at most 64 characters are kept.

    Raises:
        DataError: Another number or size of frames than sources, a path that is a source, a source that cannot be
            read, or sources without what a segmentation has to repeat of them; names the fix.
        SegRLError: highdicom is not installed.

    Example:
        >>> write_dicom_seg("mask.dcm", np.zeros((2, 2), dtype=bool), [])
        Traceback (most recent call last):
        segrl.errors.DataError: mask.dcm: a mask with 1 frame for 0 source images; expected one frame each
    """
    frames = foreground(mask, f"mask for {os.fspath(path)}", ndim=None)
    frames = frames[np.newaxis] if frames.ndim == 2 else frames
    if len(frames) != len(sources):
        few = "1 frame" if len(frames) == 1 else f"{len(frames)} frames"
        raise DataError(
            f"{os.fspath(path)}: a mask with {few} for {len(sources)} source images; expected one frame each"
        )
    if Path(path).exists() and any(Path(source).exists() and Path(path).samefile(source) for source in sources):
        raise DataError(f"{os.fspath(path)}: is a source image, and nothing replaces an input; pass another name")
    headers = [read_dataset(Path(source), pixels=False) for source in sources]
    for header, source, frame in zip(headers, sources, frames, strict=True):
        if frame.shape != (int(header.Rows), int(header.Columns)):
            raise DataError(
                f"{os.fspath(path)}: a frame of {frame.shape[1]} x {frame.shape[0]} px, and {os.fspath(source)} has "
                f"{header.Columns} x {header.Rows}; put the mask on the grid of the image"
            )
    with quiet_pydicom():
        made = _segmentation(path, frames, headers, label)
    with whole_file(path) as unfinished:
        made.save_as(unfinished)


def highdicom_modules() -> tuple[ModuleType, ModuleType, Any]:
    """Import highdicom, its module of segmentations, and pydicom's codes.

    Raises:
        SegRLError: It is not installed.
    """
    try:
        import highdicom
        import highdicom.seg
        from pydicom.sr.codedict import codes
    except ImportError as error:
        raise SegRLError(
            f'DICOM-SEG needs highdicom, which cannot be imported ({error}): pip install "segrl[dicom]"'
        ) from error
    return highdicom, highdicom.seg, codes


def _segmentation(path: Any, frames: np.ndarray, headers: Sequence[Any], label: str) -> Any:
    highdicom, seg, codes = highdicom_modules()
    plain = " ".join(label.replace("\\", " ").split())[:_LABEL] or "segmentation"
    described = seg.SegmentDescription(
        segment_number=1,
        segment_label=plain,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="segrl", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
    try:
        return seg.Segmentation(
            source_images=list(headers),
            pixel_array=frames.astype(np.uint8),
            segmentation_type="BINARY",
            segment_descriptions=[described],
            series_instance_uid=highdicom.UID(),
            series_number=max(1, int(headers[0].get("SeriesNumber") or 0) + 1000),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="segrl",
            manufacturer_model_name="segrl",
            software_versions=__version__,
            device_serial_number="none",
            omit_empty_frames=bool(frames.any()),
        )
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{os.fspath(path)}: the source images lack what a segmentation has to repeat ({reason}); write NIfTI or "
            "PNG instead, or complete their headers"
        ) from error
