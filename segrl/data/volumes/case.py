"""One case of a data set of volumes: the scan's grey values and its label, read once for all who ask."""

# D slices, H/W pixels of a slice

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from segrl.caching.content import content_key
from segrl.data.volumes.intensity import Intensity, check_intensity, intensity_for, scale_intensity, scaling_note
from segrl.data.volumes.labels import Labels, ignored_values, read_labels
from segrl.data.volumes.nifti import read_volume
from segrl.data.volumes.volume import Volume
from segrl.errors import DataError
from segrl.predictions.modalities import modality_kind
from segrl.predictions.target import VolumeTarget, read_spacing

__all__ = [
    "Case",
    "CaseReader",
    "case_of",
    "choose_scaling",
    "grey_values",
    "read_case",
    "read_grey",
    "say_note",
    "shades",
]

_LOG = logging.getLogger("segrl.data")


@dataclass(frozen=True, eq=False)
class Case:
    """One row of a data set of volumes, read.

    Attributes:
        scan: The scan with its grey values as `voxels`, (D, H, W) uint8.
        key: Content key of the grey values: equal scans have equal keys.
        mask: (D, H, W) bool, the row's structure; all False where the label has none. None if no label was asked for.
        ignored: (D, H, W) bool, voxels that scores leave out; None for none.
        intensity: Text form of the scaling that made the grey values; "" if it is not known.

    Example:
        >>> from segrl.data import Volume
        >>> Case(Volume(np.zeros((2, 3, 4), np.uint8)), "key").grey.shape
        (2, 3, 4)
    """

    scan: Volume
    key: str
    mask: np.ndarray | None = None
    intensity: str = ""
    ignored: np.ndarray | None = None

    @property
    def grey(self) -> np.ndarray:
        """(D, H, W) uint8, what a segmenter sees."""
        return self.scan.voxels

    def target(self, row: Mapping[str, Any]) -> VolumeTarget:
        """The ground truth, with the metadata of the row."""
        assert self.mask is not None
        target = VolumeTarget(self.mask, self.scan.spacing_mm, **VolumeTarget.texts_of(row))
        return target if self.ignored is None else target.ignoring(self.ignored)


class CaseReader:
    """Read rows of `segrl.data.load_volumes`; a scan is read once per path and scaling, a label once.

    Args:
        memory_bytes: Scans and labels read last are kept within this budget, the last ones in any case.

    Example:
        >>> from segrl.data import make_synthetic_volumes
        >>> read, (row,) = CaseReader(), list(make_synthetic_volumes(1, "volumes", depth=4, size=32))
        >>> read(row).scan is read({**row, "label_value": 1}).scan
        True
    """

    def __init__(self, memory_bytes: int = 2**31) -> None:
        self.memory_bytes = memory_bytes
        self._scans: OrderedDict[tuple[str, ...], Case] = OrderedDict()
        self._labels: OrderedDict[tuple[str, str], Labels] = OrderedDict()
        self._said: set[str] = set()

    def __call__(self, row: Mapping[str, Any], *, label: bool = True, allow_empty: bool = False) -> Case:
        """Read one row.

        Args:
            row: The columns `scan`, `modality` and `intensity`, for a label also `label`, `label_value` and perhaps
                `ignored_value`, and `name`.
                `spacing_mm`, if there, is read for a scan whose file does not say it, see `segrl.data.read_volume`.
            label: Whether the label is read.
            allow_empty: Whether a label without such voxels is an empty mask instead of an error.

        Raises:
            DataError: A missing value, or a file that cannot be read or does not fit; names the file.
        """
        where = row.get("name") or row.get("scan") or "row"
        missing = [column for column in ("scan", *(("label",) if label else ())) if not row.get(column)]
        if missing:
            raise DataError(f"{where}: no {missing[0]}; expected a path in the column {missing[0]!r}")
        path, modality, intensity = (str(row.get(column) or "") for column in ("scan", "modality", "intensity"))
        known = (path, intensity or modality_kind(modality))
        if known not in self._scans:
            self._scans[known], note = _scale(read_volume(path), modality, intensity)
            kind = note.partition(":")[2]
            if note and kind not in self._said:
                self._said.add(kind)
                say_note(f"{path!r}: {note} (other scans of this data set are not named)")
        self._scans.move_to_end(known)
        case, mask, ignored = self._scans[known], None, None
        scan = case.scan
        if scan.spacing_mm is None:
            scan = replace(scan, spacing_mm=read_spacing(row.get("spacing_mm"), f"{where}: spacing_mm"))
        if label:
            pair = str(row["label"]), path
            if pair not in self._labels:
                self._labels[pair] = read_labels(pair[0], scan)
            self._labels.move_to_end(pair)
            mask = self._labels[pair].mask(row.get("label_value"), allow_empty=allow_empty)
            if values := ignored_values(row.get("ignored_value")):
                ignored = self._labels[pair].mask(values, allow_empty=True)
        self._forget()
        return replace(case, scan=scan, mask=mask, ignored=ignored)

    def _forget(self) -> None:
        """Keep what fits, the newest in any case."""
        for kept in (self._labels, self._scans):
            while len(kept) > 1 and self.nbytes > self.memory_bytes:
                kept.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(case.grey.nbytes for case in self._scans.values()) + sum(n.nbytes for n in self._labels.values())


def read_case(row: Mapping[str, Any], *, label: bool = True, allow_empty: bool = False) -> Case:
    """Read one row of `segrl.data.load_volumes` and keep nothing; see `CaseReader`.

    Example:
        >>> from segrl.data import make_synthetic_volumes
        >>> (row,) = list(make_synthetic_volumes(1, "volumes", depth=4, size=32))
        >>> case = read_case(row)
        >>> case.grey.shape, bool(case.mask.any()), case.target(row).lesion == row["lesion"]
        ((4, 32, 32), True, True)
    """
    return CaseReader(0)(row, label=label, allow_empty=allow_empty)


def read_grey(path: str, *, modality: str = "", intensity: str = "") -> tuple[Volume, np.ndarray]:
    """Read a scan and its grey values.

    Args:
        path: NIfTI file or array, see `segrl.data.read_volume`.
        modality: Decides the scaling where `intensity` is empty, see `segrl.data.intensity_for`.
        intensity: Text form of an `Intensity`, such as "window:-160:240".

    Returns:
        The volume, and (D, H, W) uint8.

    Raises:
        DataError: As `read_volume`, or for an intensity that is none; both name the file.

    Example:
        >>> from segrl.data import Volume, write_volume
        >>> write_volume("scan.nii.gz", Volume(np.array([[[0.0, 5.0, 10.0]]])))
        >>> read_grey("scan.nii.gz", intensity="window:0:10")[1].tolist()
        [[[0, 128, 255]]]
    """
    volume = read_volume(path)
    return volume, grey_values(volume, modality=modality, intensity=intensity)


def case_of(volume: Volume, *, modality: str = "", intensity: str = "") -> Case:
    """Build the case of a volume in memory, without a label; see `grey_values`.

    Example:
        >>> from segrl.data import Volume
        >>> case_of(Volume(np.array([[[-160.0, 40.0, 240.0]]])), intensity="window:-160:240").intensity
        'window:-160:240'
    """
    case, note = _scale(volume, modality, intensity)
    if note:
        say_note(f"{volume.name or 'volume'!r}: {note}")
    return case


def grey_values(volume: Volume, *, modality: str = "", intensity: str = "") -> np.ndarray:
    """Scale a volume in memory to grey values, (D, H, W) uint8; see `read_grey`.

    Raises:
        DataError: An intensity that is none, or voxels that are NaN or infinite; names the volume.

    Example:
        >>> import numpy as np
        >>> from segrl.data import Volume
        >>> grey_values(Volume(np.array([[[-160.0, 40.0, 240.0]]])), intensity="window:-160:240").tolist()
        [[[0, 128, 255]]]
    """
    return case_of(volume, modality=modality, intensity=intensity).grey


def choose_scaling(volume: Volume, modality: str = "", intensity: str = "") -> tuple[Intensity, str]:
    """Return the scaling of a volume, and a note if it is another than its modality suggests, else "".

    Without a modality that of its file counts. The windows of a DICOM series are not followed, other than that of a
    single image: slices of one series may have different ones.

    Raises:
        DataError: An intensity that is none or blanks the volume, or voxels that are NaN or infinite; names the volume.
    """
    try:
        if intensity:
            given = Intensity.parse(intensity)
            check_intensity(volume.voxels, given)
            return given, ""
        modality = modality or volume.modality
        chosen = intensity_for(modality, volume.voxels)
        return chosen, scaling_note(modality, volume.voxels, chosen)
    except DataError as error:
        raise DataError(f"{volume.name or 'volume'}: {error}") from error


def shades(volume: Volume, modality: str = "", intensity: str = "") -> tuple[np.ndarray, Intensity, str]:
    """Return the grey values of a volume as it is shown, (D, H, W) uint8, their scaling, and its note.

    Images with more than 8 bits are read through it, too, as volumes of one slice.

    Raises:
        DataError: As `choose_scaling`.

    Example:
        >>> from segrl.data import Volume
        >>> shades(Volume(np.array([[[0.0, 10.0]]]), inverted=True), intensity="window:0:10")[0].tolist()
        [[[255, 0]]]
    """
    scaling, note = choose_scaling(volume, modality, intensity)
    grey = scale_intensity(volume.voxels, scaling)
    return (255 - grey if volume.inverted else grey), scaling, note


@functools.cache
def say_note(text: str) -> None:
    """Log a line, once in a process: a remark about files that are read well."""
    _LOG.warning("%s", text)


def _scale(volume: Volume, modality: str, intensity: str) -> tuple[Case, str]:
    grey, scaling, note = shades(volume, modality, intensity)
    return Case(replace(volume, voxels=grey, inverted=False), content_key(grey), intensity=str(scaling)), note
