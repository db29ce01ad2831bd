"""Formats of volumes that are not read: known by name, so that the error says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

__all__ = ["other_format"]

_SLICER = "export it as NIfTI (.nii.gz), as with 3D Slicer or SimpleITK.WriteImage"
_DICOM = "export it as NIfTI (.nii.gz), as with 3D Slicer or dcm2niix"
_ENDINGS = {
    **dict.fromkeys((".nrrd", ".nhdr"), f"is NRRD, which is not read; {_SLICER}"),
    **dict.fromkeys((".mha", ".mhd"), f"is MetaImage (MHA, MHD), which is not read; {_SLICER}"),
    **dict.fromkeys((".dcm", ".dicom", ".ima"), f"is DICOM, which is read as a scan only; {_DICOM}"),
}
_SEARCHED = 64  # files of a folder


def other_format(path: Path) -> str:
    """Name the format of a file or folder that is not NIfTI, with the fix; "" if it is not known.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "scan").write_bytes(b"NRRD0004 type: float")
        ...     other_format(Path(folder, "scan"))
        'is NRRD, which is not read; export it as NIfTI (.nii.gz), as with 3D Slicer or SimpleITK.WriteImage'
    """
    if path.is_dir():
        dicom = any(_by_content(file) == _ENDINGS[".dcm"] for file in islice(_files(path), _SEARCHED))
        return f"is a folder with DICOM files, which are read as a scan only; {_DICOM}" if dicom else ""
    return _by_content(path) or _ENDINGS.get(path.suffix.lower(), "")


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.is_file())


def _by_content(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(132)
    if start.startswith(b"NRRD"):
        return _ENDINGS[".nrrd"]
    if start.startswith((b"ObjectType", b"NDims")):
        return _ENDINGS[".mha"]
    return _ENDINGS[".dcm"] if start[128:] == b"DICM" else ""
