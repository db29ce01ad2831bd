"""Labels of scans: files of whole numbers or sparse channels, of which a structure is one value or several."""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file, C channels of a sparse label

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segrl.data.volumes.arrays import array_affine, sparse_label
from segrl.data.volumes.grids import patient_axes, to_slices
from segrl.data.volumes.nifti import axes_on_scan
from segrl.data.volumes.volume import Volume
from segrl.data.volumes.voxel_files import must_exist, open_voxels
from segrl.errors import DataError

__all__ = ["Labels", "ignored_values", "label_text", "label_values", "read_label", "read_labels", "wanted_values"]

_MAX_ROUNDING = 1e-4  # largest distance of a value in a scaled label file from a whole number
_LISTED = 20  # label values named in one error


@dataclass(frozen=True, eq=False)
class Labels:
    """All structures of a label file, read once.

    Attributes:
        name: Path of the file.
        values: (D, H, W) of the narrowest unsigned type; None for a sparse label.
        channels: Foreground of each channel of a sparse label, as positions in (X, Y, Z) in C order.
        shape: (X, Y, Z) of a sparse label.
        axes: Turn of the file's axes to (W, H, D).

    Example:
        >>> labels = Labels("label.nii.gz", np.array([[[0, 1, 2, 2, 7]]], dtype=np.uint8))
        >>> labels.present, labels.mask("1,7").tolist()
        ((1, 2, 7), [[[False, True, False, False, True]]])
    """

    name: str
    values: np.ndarray | None = None
    channels: Sequence[np.ndarray] = ()
    shape: tuple[int, int, int] = (0, 0, 0)
    axes: np.ndarray = field(default_factory=lambda: np.empty((3, 2)))

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(array.nbytes for array in (*self.channels, *(() if self.values is None else (self.values,))))

    @property
    def present(self) -> tuple[int, ...]:
        """Values with foreground, increasing; of a sparse label the numbers of its channels, from 1."""
        if self.values is None:
            return tuple(number for number, channel in enumerate(self.channels, start=1) if len(channel))
        found: set[int] = set()
        for section in self.values:
            found.update(np.unique(section).tolist())
        return tuple(sorted(found - {0}))

    def mask(self, value: Any = 0, *, allow_empty: bool = False) -> np.ndarray:
        """Return the foreground of a structure, (D, H, W) bool; see `read_label`."""
        wanted = wanted_values(value)
        mask = self._sparse(wanted) if self.values is None else self._dense(wanted)
        if allow_empty or mask.any():
            return mask
        listed = ", ".join(map(str, self.present[:_LISTED])) or "no foreground"
        named = f"value{'s' if len(wanted) > 1 else ''} {', '.join(map(str, wanted))}"
        raise DataError(
            f"{self.name}: the label "
            + (
                f"has no voxel with the {named}, only {listed}; correct label_value, "
                if wanted
                else "has no foreground; "
            )
            + "remove the row, or set allow_empty=True (--allow_empty) if there is nothing to find"
        )

    def _dense(self, wanted: tuple[int, ...]) -> np.ndarray:
        assert self.values is not None
        if not wanted:
            return self.values != 0
        mask = self.values == wanted[0]
        for value in wanted[1:]:
            for section, inside in zip(self.values, mask, strict=True):
                inside |= section == value
        return mask

    def _sparse(self, wanted: tuple[int, ...]) -> np.ndarray:
        x, y, z = self.shape
        mask = np.zeros(x * y * z, dtype=bool)
        for number in wanted or range(1, len(self.channels) + 1):
            if number <= len(self.channels):
                mask[self.channels[number - 1]] = True
        return to_slices(mask.reshape(self.shape), self.axes)


def read_labels(path: str | Path, volume: Volume | str | Path | None = None) -> Labels:
    """Read a label file, to take several structures from it; see `read_label`.

    Only one section of the file is in memory beside the values, which take one byte a voxel up to 255.

    Args:
        path: See `read_label`.
        volume: See `read_label`.

    Raises:
        DataError: As `read_label`, except for absent values.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "label.npy"), np.array([[[0, 1]], [[2, 3]]]))
        ...     labels = read_labels(Path(folder, "label.npy"))
        >>> labels.present, int(labels.mask([1, 2]).sum())
        ((1, 2, 3), 2)
    """
    path = Path(path)
    if path.suffix == ".npz":
        must_exist(path, "label")
        shape, matrix = sparse_label(path)
        axes = _turn(path, shape, array_affine(shape), volume)
        faults = _Faults(path)
        faults.count(matrix.data)
        faults.raise_any()
        matrix.eliminate_zeros()
        # Copies, since a view of one channel would keep all of them.
        channels = [matrix.indices[start:end].copy() for start, end in itertools.pairwise(matrix.indptr)]
        return Labels(str(path), channels=channels, shape=shape, axes=axes)
    file = open_voxels(path, "label")
    axes = _turn(path, file.shape, file.affine, volume)
    faults = _Faults(path)
    values = file.read(axes, np.uint8, faults.count)
    faults.raise_any()
    return Labels(str(path), values)


def read_label(
    path: str | Path,
    volume: Volume | str | Path | None = None,
    value: int | str | Sequence[int] = 0,
    *,
    allow_empty: bool = False,
) -> np.ndarray:
    """Read the label of a scan: one of its values, the union of several, or its whole foreground.

    The affines of label and scan are compared where the two grids are furthest apart, at their corners, relative to the
    smallest edge of a voxel. The axes of the label are turned as those of its scan, also where slices are near 45
    degrees and the two affines, each by itself, would be turned differently.

    Args:
        path: NIfTI file or `.npy` array of whole numbers, or sparse `.npz` file of M3D-Seg, where the value is the
            number of the channel, from 1.
        volume: The scan, or the path of its file, of which only the header is read. The label must fit it; the order of
            the file's axes may differ. None turns the label by its own affine and checks nothing.
        value: Label value of the foreground; 0 takes every value that is not zero. Several values, as [1, 2] or "1,2",
            are one structure.
        allow_empty: Return an empty mask for a label without such voxels, instead of raising.

    Returns:
        (D, H, W) bool.

    Raises:
        DataError: As `read_volume`, and if the label has values that are negative or not whole numbers, another
            position or shape than the scan, no foreground, or none of these values: then the error lists those it has.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "label.npy"), np.array([[[0, 1]], [[2, 3]]]))
        ...     [int(read_label(Path(folder, "label.npy"), value=value).sum()) for value in (0, 1, "1,3")]
        [3, 1, 2]
    """
    wanted = wanted_values(value)
    return read_labels(path, volume).mask(wanted, allow_empty=allow_empty)


def label_values(path: str | Path) -> tuple[int, ...]:
    """Return the nonzero values in a label file, increasing; for a sparse `.npz` its channels with foreground.

    Raises:
        DataError: As `read_label`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder, "label.npy"), np.array([[[0, 4]], [[2, 2]]]))
        ...     label_values(Path(folder, "label.npy"))
        (2, 4)
    """
    return read_labels(path).present


def wanted_values(value: Any) -> tuple[int, ...]:
    """Read a label value: a whole number, or several as a list or as text.

    Args:
        value: Such as 1, "1", "1.0", "1,2,3" or [1, 2, 3]; None, "" and 0 mean every value that is not zero.

    Returns:
        The values, increasing; () for every value that is not zero.

    Raises:
        DataError: If it is anything else, or 0 is one of several.

    Example:
        >>> wanted_values("3, 1"), wanted_values([2]), wanted_values(0)
        ((1, 3), (2,), ())
    """
    several = value if isinstance(value, list | tuple | np.ndarray) else re.split(r"[,;]", str(value or 0))
    texts = [str(part).strip() for part in several]
    try:
        numbers = [float(text) for text in texts or ["0"]]
    except ValueError:
        numbers = [-1.0]
    if not all(number >= 0 and number.is_integer() for number in numbers) or (len(numbers) > 1 and 0 in numbers):
        raise DataError(
            f"label_value {value!r}: expected a whole number, 0 for every voxel that is not zero, or several such as "
            "'1,2,3'"
        )
    return tuple(sorted({int(number) for number in numbers} - {0}))


def ignored_values(value: Any) -> tuple[int, ...]:
    """Read the values of voxels that scores leave out, such as 255 or "254,255"; None and "" are none.

    Raises:
        DataError: As `wanted_values`, or 0, which would be every structure.

    Example:
        >>> ignored_values("255"), ignored_values("")
        ((255,), ())
    """
    if value is None or not str(value).strip():
        return ()
    try:
        found = wanted_values(value)
    except DataError:
        found = ()
    if not found:
        raise DataError(f"ignored_value {value!r}: expected a whole number above 0, such as 255, or several: '254,255'")
    return found


def label_text(value: Any) -> str:
    """Return a label value as the column of a data set holds it, such as "0", "3" or "1,2,3".

    Raises:
        DataError: As `wanted_values`.
    """
    return ",".join(map(str, wanted_values(value))) or "0"


def _turn(
    path: Path, shape: tuple[int, int, int], affine: np.ndarray, volume: Volume | str | Path | None
) -> np.ndarray:
    return patient_axes(affine) if volume is None else axes_on_scan(path, shape, affine, volume)


class _Faults:
    """Values that name no structure, counted over the sections of a file: fractions, and numbers below zero."""

    def __init__(self, path: Path) -> None:
        self.path, self.fractions, self.fraction, self.negatives, self.lowest = path, 0, 0.0, 0, 0

    def count(self, values: np.ndarray) -> np.ndarray:
        """Return the values in the narrowest unsigned type, those that are faulty as 0."""
        if values.dtype.kind == "f":
            whole = np.rint(values)
            with np.errstate(invalid="ignore"):  # infinite minus infinite
                bad = ~(np.abs(values - whole) <= _MAX_ROUNDING)
            if bad.any():
                self.fraction = self.fraction if self.fractions else float(values[bad][0])
                self.fractions += int(np.count_nonzero(bad))
                whole[bad] = 0
            values = whole
        if values.dtype.kind in "if" and values.size and values.min() < 0:
            below = values < 0
            self.negatives += int(np.count_nonzero(below))
            self.lowest = min(self.lowest, int(values.min()))
            values = np.where(below, 0, values)
        return values.astype(np.min_scalar_type(int(values.max(initial=0))), copy=False)

    def raise_any(self) -> None:
        if self.fractions:
            raise DataError(
                f"{self.path}: {self.fractions} voxels of the label are not whole numbers, such as {self.fraction:g}; "
                "save the label without interpolation, or threshold it"
            )
        if self.negatives:
            raise DataError(
                f"{self.path}: {self.negatives} voxels of the label are negative, down to {self.lowest}; expected 0 "
                "for the background and a positive number for each structure; set them to 0 if they mark nothing"
            )
