"""Rows that every reader of a format yields, and the folder with a manifest that is written of it."""

# H, W pixels of an image, D slices of a scan

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from segrl.data.dicom.series import open_dicom_series
from segrl.data.manifest import write_manifest
from segrl.errors import DataError
from segrl.geometry.mask_images import write_mask_image

__all__ = ["FormatRow", "ScanRow", "empty_folder", "free_name", "plain_name", "write_rows"]

_KEPT = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")  # files of images that are copied as they are


@dataclass
class FormatRow:
    """One question about an image.

    Attributes:
        image: Its file, or the image.
        mask: (H, W) bool.
        name: Of the image; rows of one image share it.
        split: For example "train".
        texts: Columns of the manifest, such as lesion, query, modality, anatomy, source and reasoning.
        ignored: (H, W) bool, pixels that scores leave out; None for none.

    Example:
        >>> FormatRow(Path("a.png"), np.eye(2, dtype=bool), "a", "train", {"lesion": "cyst"}).texts["lesion"]
        'cyst'
    """

    image: Path | Image.Image
    mask: np.ndarray
    name: str
    split: str
    texts: Mapping[str, str] = field(default_factory=dict)
    ignored: np.ndarray | None = None


@dataclass
class ScanRow:
    """One question about a scan, whose label file stays as it is.

    Attributes:
        scan: Its file, or the folder of a DICOM series.
        label: The file of its label, on the same grid.
        label_value: The value of the structure in it, as text.
        split: For example "train".
        texts: Columns of the manifest.
        ignored_value: Values in the label, as text, of voxels that scores leave out; "" for none.
        slices: Files of a DICOM series; () for all DICOM files of its folder.

    Example:
        >>> ScanRow(Path("ct.nii.gz"), Path("label.nii.gz"), "2", "test").label_value
        '2'
    """

    scan: Path
    label: Path
    label_value: str
    split: str
    texts: Mapping[str, str] = field(default_factory=dict)
    ignored_value: str = ""
    slices: tuple[Path, ...] = ()


def write_rows(
    rows: Iterable[FormatRow | ScanRow], folder: str | Path, *, hardlink: bool = False, title: str = "convert"
) -> dict[str, int]:
    """Write rows as a folder with `manifest.csv` that the trainers read; images or scans, not both.

    Files of images and scans are copied once, however many rows are about them; other images become PNG.

    Args:
        rows: From the reader of a format.
        folder: A new folder.
        hardlink: Link files instead of copying them, where source and folder are on one disk.
        title: Of the progress bar.

    Returns:
        Number of rows of each split.

    Raises:
        DataError: The folder is not empty, there are no rows, a file cannot be copied or linked, or what the reader
            raises; nothing is left behind then.

    Example:
        >>> square = np.eye(4, dtype=bool)
        >>> row = FormatRow(Image.new("RGB", (4, 4)), square, "a", "train", {"lesion": "cyst"})
        >>> write_rows([row], "mine")
        convert ... 100% ...
        {'train': 1}
        >>> from segrl.data import load_folder
        >>> load_folder("mine", "train")["query"][0]
        'Segment the cyst in this image.'
    """
    with empty_folder(folder) as home:
        writer = _Writer(home, hardlink)
        lines = [writer.line(row) for row in track(rows, title)]
        if not lines:
            raise DataError(f"{home}: nothing to write, the source has no rows")
        names = list(dict.fromkeys(name for line in lines for name in line))
        write_manifest(home, [{name: line.get(name, "") for name in names} for line in lines])
    return dict(sorted(Counter(line["split"] for line in lines).items()))


@contextmanager
def empty_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a folder to write into; after an error it is as empty as before, since half a data set looks whole.

    Raises:
        DataError: The folder is not empty.

    Example:
        >>> with empty_folder("new") as home:
        ...     _ = (home / "a.txt").write_text("a")
        >>> with empty_folder("new"):
        ...     pass
        Traceback (most recent call last):
        segrl.errors.DataError: new is not an empty folder; pass a new one
    """
    home = Path(folder)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise DataError(f"{home} is not an empty folder; pass a new one")
    made = not home.exists()
    home.mkdir(parents=True, exist_ok=True)
    try:
        yield home
    except BaseException:
        for path in home.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if made:
            home.rmdir()
        raise


def plain_name(stem: str) -> str:
    """Return the name of a file for a stem of another data set: letters, digits and ``_.+-`` only.

    Example:
        >>> plain_name("../case 1 (left)")
        'case_1_left'
    """
    return re.sub(r"[^\w.+-]+", "_", stem).strip("._") or "row"


def free_name(taken: set[str], stem: str, wanted: str = "{}") -> str:
    """Return `wanted` with the plain name of a stem, and with a number where that is taken, whatever the capitals.

    Example:
        >>> taken = set()
        >>> free_name(taken, "a b", "{}.png"), free_name(taken, "A_B", "{}.png")
        ('a_b.png', 'A_B_1.png')
    """
    plain, number = plain_name(stem), 1
    name = wanted.format(plain)
    while name.casefold() in taken:
        name, number = wanted.format(f"{plain}_{number}"), number + 1
    taken.add(name.casefold())
    return name


class _Writer:
    def __init__(self, home: Path, hardlink: bool) -> None:
        self.home, self.hardlink = home, hardlink
        self.files: dict[Any, str] = {}  # what was copied, by its source
        self.taken: set[str] = set()

    def line(self, row: FormatRow | ScanRow) -> dict[str, str]:
        if isinstance(row, ScanRow):
            scan = self._series(row) if row.slices or row.scan.is_dir() else self._copied(row.scan, "images")
            files = {"image": scan, "label": self._copied(row.label, "labels")}
            ignored = {"ignored_value": row.ignored_value} if row.ignored_value else {}
            return {**files, "label_value": row.label_value, **ignored, "split": row.split, **row.texts}
        if isinstance(row.image, Path) and row.image.suffix.lower() in _KEPT:
            image = self._copied(row.image, "images")
        else:
            image = self._drawn(row)
        mask = self._place("masks", Path(image).stem, ".png")
        write_mask_image(self.home / mask, row.mask)
        line = {"image": image, "mask": mask, "split": row.split, **row.texts}
        if row.ignored is not None and row.ignored.any():
            line["ignored"] = self._place("ignored", Path(image).stem, ".png")
            write_mask_image(self.home / line["ignored"], row.ignored)
        return line

    def _place(self, part: str, stem: str, suffix: str) -> str:
        """A path in the folder that is not taken."""
        (self.home / part).mkdir(parents=True, exist_ok=True)
        return free_name(self.taken, stem, f"{part}/{{}}{suffix}")

    def _copied(self, source: Path, part: str) -> str:
        key = (part, source.absolute())
        if key not in self.files:
            suffix = ".nii.gz" if source.name.lower().endswith(".nii.gz") else source.suffix
            path = self._place(part, source.name[: len(source.name) - len(suffix)], suffix)
            self._copy(source, self.home / path)
            self.files[key] = path
        return self.files[key]

    def _series(self, row: ScanRow) -> str:
        """Copy a DICOM series into a folder of its own, whose files are named by their place in it."""
        slices = row.slices or open_dicom_series(row.scan).files
        key = tuple(path.absolute() for path in slices)
        if key not in self.files:
            path = self._place("images", row.scan.name, "")
            (self.home / path).mkdir()
            for number, file in enumerate(slices):
                self._copy(file, self.home / path / f"{number:04d}.dcm")
            self.files[key] = path
        return self.files[key]

    def _copy(self, source: Path, target: Path) -> None:
        try:
            if self.hardlink:
                os.link(source, target)
            else:
                shutil.copyfile(source, target)
        except OSError as error:
            fix = "; leave --hardlink out" if self.hardlink else ""
            raise DataError(f"{source}: cannot be copied: {error.strerror or error}{fix}") from error

    def _drawn(self, row: FormatRow) -> str:
        key = row.image if isinstance(row.image, Path) else (row.split, row.name)
        if key not in self.files:
            path = self._place("images", Path(row.name).stem, ".png")
            image = row.image
            if isinstance(image, Path):
                with Image.open(image) as opened:
                    opened.convert("RGB").save(self.home / path)
            else:
                image.save(self.home / path)
            self.files[key] = path
        return self.files[key]
