"""Inputs on a command line: files, folders and patterns, turned into the images or volumes that they name."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from segrl.data.dicom.files import is_dicom
from segrl.data.dicom.series import holds_dicom
from segrl.errors import DataError

__all__ = ["find_inputs"]

_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
_VOLUMES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".npy")


def find_inputs(names: Sequence[str], task: str) -> tuple[list[Path], int]:
    """Find the images or volumes that some names mean, in order, each once.

    A folder means the images in it, or the volumes: files, DICOM series in folders of their own, or the folder itself
    where it holds DICOM files. A name with `*`, `?` or `[` that is no file is a pattern, `**` meaning folders of any
    depth.

    Args:
        names: As they were typed.
        task: "images" or "volumes".

    Returns:
        Paths, and the number of files in the folders that are neither.

    Raises:
        DataError: No such file, a pattern without a match, a folder without inputs, or a file of the other task.

    Example:
        >>> for name in ("b.png", "a.png", "notes.txt"):
        ...     _ = Path(name).write_bytes(b"")
        >>> found, others = find_inputs(["*.png", "."], "images")
        >>> [path.name for path in found], others
        (['a.png', 'b.png'], 1)
        >>> find_inputs(["*.dcm"], "images")
        Traceback (most recent call last):
        segrl.errors.DataError: '*.dcm': no file matches the pattern; ...
    """
    found: dict[Path, None] = {}
    others = 0
    for name in names:
        path = Path(name)
        if path.exists():
            paths = [path]
        elif glob.has_magic(name):
            paths = sorted(Path(match) for match in glob.glob(name, recursive=True))
            paths = [match for match in paths if match.is_file() or task == "volumes"]
            if not paths:
                raise DataError(f"{name!r}: no file matches the pattern; correct it, or give the folder")
        else:
            raise DataError(f"{name}: no such file or folder; the question comes last, in quotes")
        for one in paths:
            inside, left_out = _inside(one, task) if one.is_dir() else ([_fitting(one, task)], 0)
            found.update(dict.fromkeys(inside))
            others += left_out
    seen: dict[Path, Path] = {}
    for path in found:
        seen.setdefault(path.resolve(), path)
    return list(seen.values()), others


def _inside(folder: Path, task: str) -> tuple[list[Path], int]:
    entries = sorted(folder.iterdir())
    if task == "volumes":
        if holds_dicom(folder):
            return [folder], 0
        inside = [entry for entry in entries if _is_volume(entry) or (entry.is_dir() and holds_dicom(entry))]
    else:
        inside = [entry for entry in entries if _is_image(entry)]
    if not inside:
        expected = "images (PNG, JPEG, TIFF, DICOM ...)" if task == "images" else "volumes (NIfTI, .npy, DICOM series)"
        raise DataError(f"{folder}: holds no {expected}; the run answers about {task}; give another folder, or files")
    return inside, sum(entry.is_file() for entry in entries) - sum(entry.is_file() for entry in inside)


def _fitting(path: Path, task: str) -> Path:
    if task == "images" and path.name.lower().endswith(_VOLUMES):
        raise DataError(f"{path}: is a volume, and the run answers about images; give an image, or a run on volumes")
    if task == "volumes" and path.suffix.lower() in _IMAGES:
        raise DataError(
            f"{path}: is an image, and the run answers about volumes; give NIfTI or a DICOM series, or a run on images"
        )
    return path


def _is_image(path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() in _IMAGES or is_dicom(path))


def _is_volume(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(_VOLUMES)
