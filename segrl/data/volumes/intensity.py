"""Intensity scaling: from voxels to grey values.

A volume is an array (D, H, W): D axial slices from inferior to superior, H rows from anterior to posterior, W columns
from the patient's right to left. `segrl.data.read_volume` brings files into this order.
"""

# D slices, H/W pixels of a slice

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError
from segrl.predictions.modalities import modality_kind

__all__ = ["CT_WINDOW", "Intensity", "check_intensity", "intensity_for", "scale_intensity", "scaling_note"]

IntensityKind = Literal["window", "percentile"]


@dataclass(frozen=True)
class Intensity:
    """A scaling of voxels to grey values: `low` and below become black, `high` and above white.

    Attributes:
        kind: `window`: low and high are voxel values (Hounsfield units for CT); `percentile`: they are percentiles,
            0 to 100, of the voxels that are not zero: zero is the empty space around an MR scan.
        low: Lower end.
        high: Upper end, above `low`.

    Raises:
        DataError: For an unknown kind, ends that are not finite or not in order, or a percentile outside 0 to 100.

    Example:
        >>> str(Intensity("window", -160, 240))
        'window:-160:240'
        >>> Intensity("window", 240, -160)
        Traceback (most recent call last):
        segrl.errors.DataError: intensity window:240:-160: expected two finite numbers, the lower one first
    """

    kind: IntensityKind
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(IntensityKind):
            raise DataError(f"intensity kind {self.kind!r}: expected 'window' or 'percentile'")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise DataError(f"intensity {self}: expected two finite numbers, the lower one first")
        if self.kind == "percentile" and not (self.low >= 0 and self.high <= 100):
            raise DataError(f"intensity {self}: expected percentiles from 0 to 100, as in 'percentile:0.5:99.5'")

    @classmethod
    def parse(cls, text: str) -> Intensity:
        """Read the text form, the inverse of `str`.

        Args:
            text: `window:<low>:<high>` in voxel values, or `percentile:<low>:<high>`.

        Raises:
            DataError: If the text has neither form.

        Example:
            >>> Intensity.parse("percentile:0.5:99.5")
            Intensity(kind='percentile', low=0.5, high=99.5)
        """
        kind, *ends = text.strip().split(":")
        try:
            low, high = (float(end) for end in ends)
        except ValueError:
            raise DataError(
                f"intensity {text!r}: expected 'window:<low>:<high>' or 'percentile:<low>:<high>', for example "
                "'window:-160:240'"
            ) from None
        return cls(kind.strip(), low, high)  # pyright: ignore[reportArgumentType]  (checked in __post_init__)

    def __str__(self) -> str:
        return ":".join([str(self.kind), *(str(float(end)).removesuffix(".0") for end in (self.low, self.high))])


CT_WINDOW = Intensity("window", -160, 240)
"""The soft tissue window of CT: level 40, width 400 Hounsfield units."""
_BYTES = Intensity("window", 0, 255)
_UNIT = Intensity("window", 0, 1)
_PERCENTILE = Intensity("percentile", 0.5, 99.5)
_WHOLE = Intensity("percentile", 0, 100)
_FEW = 16  # grey levels below which a scaling may have blanked a scan
_SAMPLE = 2**18  # voxels that are looked at first


def intensity_for(modality: str, voxels: ArrayLike) -> Intensity:
    """Choose the scaling from the modality and the voxels, by what is left of them.

    A CT in Hounsfield units has negative voxels (air is -1000, fat -100) and gets the soft tissue window, `CT_WINDOW`.
    A CT without negative voxels has been windowed before and keeps its range if that is 0 to 1 or 0 to 255. Everything
    else has no fixed unit and is scaled between the percentiles 0.5 and 99.5. So is a CT of which these ranges would
    leave fewer than 16 grey levels, although it has more: it was divided by 1000 or standardised, or shows only air.
    `scaling_note` says in words what was chosen.

    Args:
        modality: For example "CT", "CT scan", "Computed tomography", "MRI"; may be empty.
        voxels: (D, H, W), any real type.

    Raises:
        DataError: If the volume is not (D, H, W) with voxels, or has NaN or infinite ones.

    Example:
        >>> [str(intensity_for(modality, [[[-1000, 60]]])) for modality in ("CT", "MRI")]
        ['window:-160:240', 'percentile:0.5:99.5']
        >>> str(intensity_for("CT", np.linspace(-1, 3, 99).reshape(1, 9, 11)))
        'percentile:0.5:99.5'
    """
    volume = _volume(voxels)
    low, high = _range(volume)
    choices = [_PERCENTILE, _WHOLE]
    if modality_kind(modality) == "ct":
        choices.insert(0, CT_WINDOW if low < 0 else _UNIT if high <= 1 else _BYTES if high <= 255 else _PERCENTILE)
    return next((choice for choice in choices if _enough_levels(volume, choice)), choices[0])


def scaling_note(modality: str, voxels: ArrayLike, intensity: Intensity) -> str:
    """Say why a scan that has no scaling of its own is not scaled as others of its modality; "" if it is.

    Args:
        modality: As in `intensity_for`.
        voxels: (D, H, W).
        intensity: What `intensity_for` chose.

    Example:
        >>> voxels = np.linspace(-1, 3, 99).reshape(1, 9, 11)
        >>> scaling_note("CT", voxels, intensity_for("CT", voxels))
        'a CT with voxels from -1 to 3, not in Hounsfield units: scaled by percentile:0.5:99.5'
    """
    low, high = _range(_volume(voxels))
    if modality_kind(modality) == "ct":
        reason = "" if intensity == CT_WINDOW else f"a CT with voxels from {low:g} to {high:g}, not in Hounsfield units"
    else:
        reason = "" if intensity == _PERCENTILE else f"{_PERCENTILE} leaves few grey levels of {low:g} to {high:g}"
    return reason and f"{reason}: scaled by {intensity}"


def check_intensity(voxels: ArrayLike, intensity: Intensity) -> None:
    """Check that a given scaling does not blank a volume.

    Raises:
        DataError: It leaves fewer than 16 grey levels, although the volume has more than twice as many.

    Example:
        >>> check_intensity(np.linspace(-1, 1, 99).reshape(1, 9, 11), CT_WINDOW)
        Traceback (most recent call last):
        segrl.errors.DataError: intensity window:-160:240: leaves 3 grey levels of voxels from -1 to 1; ...
    """
    volume = _volume(voxels)
    if not _enough_levels(volume, intensity):
        low, high = _range(volume)
        left = _levels(volume, intensity)
        raise DataError(
            f"intensity {intensity}: leaves {left} grey levels of voxels from {low:g} to {high:g}; "
            f"expected at least {_FEW}; give a range of these voxels, such as {str(_PERCENTILE)!r}"
        )


def scale_intensity(voxels: ArrayLike, intensity: Intensity) -> np.ndarray:
    """Scale voxels to grey values.

    Args:
        voxels: (D, H, W), any real type; only percentiles copy the whole volume.
        intensity: The range that becomes 0 to 255; values beyond are clipped.

    Returns:
        (D, H, W) uint8. With percentiles a constant volume is black; if all voxels that are not zero are equal, as in a
        binary volume, minimum and maximum replace the percentiles.

    Raises:
        DataError: If the volume is not (D, H, W) with voxels, or has NaN or infinite ones.

    Example:
        >>> scale_intensity([[[-1000, -160, 40, 240, 3000]]], CT_WINDOW).tolist()
        [[[0, 0, 128, 255, 255]]]
    """
    volume = _volume(voxels)
    low, high = intensity.low, intensity.high
    smallest, largest = _range(volume)
    grey = np.zeros(volume.shape, dtype=np.uint8)
    if intensity.kind == "percentile":
        if smallest == largest:
            return grey
        low, high = (float(end) for end in np.percentile(volume[volume != 0], (low, high), overwrite_input=True))
        if low == high:
            low, high = smallest, largest
    for section, shade in zip(volume, grey, strict=True):
        share = (section.astype(np.float64) - low) / (high - low)
        shade[...] = np.clip(share, 0, 1) * 255 + 0.5
    return grey


def _enough_levels(volume: np.ndarray, intensity: Intensity) -> bool:
    """Return whether a scaling keeps 16 grey levels, or half of those that other scalings keep."""
    sample = volume.reshape(1, 1, -1)[..., :: max(1, volume.size // _SAMPLE)]
    if _levels(sample, intensity) >= _FEW:
        return True
    return 2 * _levels(volume, intensity) >= max(_levels(volume, choice) for choice in (_PERCENTILE, _WHOLE))


def _levels(volume: np.ndarray, intensity: Intensity) -> int:
    return len(np.unique(scale_intensity(volume, intensity)))


def _volume(voxels: ArrayLike) -> np.ndarray:
    volume = np.asarray(voxels)
    if volume.ndim != 3 or not volume.size or volume.dtype.kind not in "buif":
        raise DataError(
            f"voxels {volume.dtype} {volume.shape}: expected real numbers of the shape (D, H, W), not empty"
        )
    return volume


def _range(volume: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest voxel, one of which is not finite if any voxel is not."""
    low, high = float(volume.min()), float(volume.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        count = sum(int(np.count_nonzero(~np.isfinite(section))) for section in volume)
        raise DataError(f"voxels: {count} of {volume.size} are NaN or infinite; replace them, as with numpy.nan_to_num")
    return low, high
