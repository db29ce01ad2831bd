"""The ground truth of one row, of an image (`Target`) or of a volume (`VolumeTarget`).

Legend: N boxes, D slices, H/W pixels of the original image. Boxes are xyxy, half-open, in original pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from segrl.errors import DataError
from segrl.geometry.boxes import validate_boxes
from segrl.geometry.mask_images import binarize
from segrl.geometry.masks import boxes_from_mask, deepest_points, foreground, mask_to_box

__all__ = [
    "METADATA_COLUMNS",
    "Metadata",
    "Target",
    "VolumeTarget",
    "answer_of",
    "check_mask",
    "check_spacing",
    "read_spacing",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Metadata:
    """Texts of a row besides its image and its mask.

    Attributes:
        query: What was asked.
        modality: Imaging modality, used to group results.
        anatomy: Body region, used to group results.
        lesion: Name of the lesion or structure.
        name: File name or row id, named in errors.

    Example:
        >>> Metadata.from_row({"lesion": "cyst", "modality": None, "image": "a.png"}).to_dict()
        {'query': '', 'modality': '', 'anatomy': '', 'lesion': 'cyst', 'name': ''}
    """

    query: str = ""
    modality: str = ""
    anatomy: str = ""
    lesion: str = ""
    name: str = ""

    @staticmethod
    def texts_of(row: Mapping[str, Any], **defaults: str) -> dict[str, str]:
        """The metadata columns of a data set row as texts; a missing or empty one gets its default, else "".

        Raises:
            DataError: A number or another value in place of a text; names the row.
        """
        try:
            texts = {column: text_of(row.get(column), column) for column in METADATA_COLUMNS}
        except DataError as error:
            name = row.get("name")
            raise error if name is None else DataError(f"{name}: {error}") from error
        return {column: text or defaults.get(column, "") for column, text in texts.items()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], **defaults: str) -> Metadata:
        """Read the metadata columns of a data set row; see `texts_of`."""
        return Metadata(**cls.texts_of(row, **defaults))

    def to_dict(self) -> dict[str, str]:
        """The texts by column."""
        return {column: getattr(self, column) for column in METADATA_COLUMNS}


def text_of(value: Any, column: str) -> str:
    """Return the text in a metadata column; "" for None.

    Raises:
        DataError: Something else than a text, such as the number of a class; a name may be a number.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if column == "name":
        return str(value)
    raise DataError(
        f"column {column!r}: {value!r:.100}, expected a text; write the name in place of a class number, as "
        "segrl.data.name_classes does for datasets.ClassLabel"
    )


def answer_of(name: str) -> str:
    """Return the name of the answer that a row is a mask of; "" for a row that is all of its answer.

    Names of rows that end in "#0", "#1", ... are masks of one answer, in the order in which they are given.

    Example:
        >>> answer_of("000042#3#1"), answer_of("images/a.png")
        ('000042#3', '')
    """
    answer, found, number = name.rpartition("#")
    return answer if found and number.isascii() and number.isdigit() else ""


METADATA_COLUMNS = tuple(item.name for item in fields(Metadata))
"""Names of the metadata columns of a data set, in the order of `Metadata`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GroundTruth(Metadata):
    """What targets of images and of volumes share: a mask, and pixels or voxels that do not count.

    Attributes:
        mask: (H, W) or (D, H, W) bool.
        ignored: The same shape, bool, what scores of an evaluation leave out, such as ReasonSeg's regions or the label
            "ignore" of nnU-Net; None for none. Rewards and losses count it: what is predicted there is wrong in
            training.
    """

    mask: np.ndarray
    ignored: np.ndarray | None = field(default=None, init=False)

    def ignoring(self, pixels: np.ndarray) -> Self:
        """Return the same target with pixels or voxels that scores of an evaluation leave out.

        Args:
            pixels: bool, of the shape of the mask.

        Raises:
            DataError: No bool array, or of another shape than the mask.

        Example:
            >>> target = Target.from_mask(np.ones((2, 2), dtype=bool)).ignoring(np.eye(2, dtype=bool))
            >>> int(target.ignored.sum())
            2
        """
        label = f"{type(self).__name__}.ignored" + (f" of {self.name!r}" if self.name else "")
        check_mask(pixels, label, self.mask.ndim)
        if pixels.shape != self.mask.shape:
            raise DataError(f"{label}: shape {pixels.shape}, expected that of the mask {self.mask.shape}")
        found = replace(self)
        object.__setattr__(found, "ignored", pixels)
        return found


@dataclass(frozen=True, eq=False)
class Target(GroundTruth):
    """The ground truth of an image, with the metadata of its row (see `Metadata`).

    Attributes:
        mask: (H, W) bool in original pixels; all False when the image holds nothing that was asked for.
        boxes: (N, 4) float64, one box per lesion; (0, 4) for an empty mask.
        ignored: See `ignoring`.
    """

    mask: np.ndarray
    boxes: np.ndarray

    def __post_init__(self) -> None:
        label = f" of {self.name!r}" if self.name else ""
        check_mask(self.mask, f"Target.mask{label}")
        object.__setattr__(self, "boxes", validate_boxes(self.boxes, f"Target.boxes{label}"))

    @classmethod
    def from_mask(cls, mask: Any, **fields: str) -> Target:
        """Build a target whose boxes are those of the mask's 8-connected components.

        Args:
            mask: (H, W) array or PIL image with at most two values, nonzero being foreground.
            **fields: Any of `query`, `modality`, `anatomy`, `lesion`, `name`.

        Raises:
            DataError: If the mask is not a binary single-channel mask.

        Example:
            >>> mask = np.zeros((4, 6), dtype=bool)
            >>> mask[1:3, 2:5] = True
            >>> Target.from_mask(mask, lesion="cyst").boxes.tolist()
            [[2.0, 1.0, 5.0, 3.0]]
        """
        foreground = binarize(mask, fields.get("name") or "mask")
        return cls(mask=foreground, boxes=boxes_from_mask(foreground), **fields)

    @property
    def height(self) -> int:
        """Rows of the mask, in original pixels."""
        return int(self.mask.shape[0])

    @property
    def width(self) -> int:
        """Columns of the mask, in original pixels."""
        return int(self.mask.shape[1])

    @cached_property
    def empty(self) -> bool:
        """Whether the mask has no foreground."""
        return not bool(self.mask.any())

    @cached_property
    def area(self) -> int:
        """Number of foreground pixels."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def mask_box(self) -> np.ndarray | None:
        """(4,) box around the whole foreground, or None without any; see `segrl.geometry.mask_to_box`."""
        return mask_to_box(self.mask)

    @cached_property
    def points(self) -> np.ndarray:
        """(N, 2) float64, one point inside each box's lesion; see `segrl.geometry.deepest_points`."""
        return deepest_points(self.mask, self.boxes)


@dataclass(frozen=True, eq=False)
class VolumeTarget(GroundTruth):
    """The ground truth of a volume, a stack of slices, with the metadata of its row (see `Metadata`).

    Attributes:
        mask: (D, H, W) bool in original pixels; the D slices of the whole volume, of which the model may see fewer.
        spacing_mm: Size of a voxel along D, H and W in millimetres; None if it is not known, and then no score has
            millimetres.
        ignored: See `ignoring`.
    """

    mask: np.ndarray
    spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        label = f" of {self.name!r}" if self.name else ""
        check_mask(self.mask, f"VolumeTarget.mask{label}", 3)
        check_spacing(self.spacing_mm, f"VolumeTarget.spacing_mm{label}")
        object.__setattr__(self, "_slices", {})

    @classmethod
    def from_mask(cls, mask: Any, spacing_mm: tuple[float, float, float] | None = None, **fields: str) -> VolumeTarget:
        """Build a target from a stored volume.

        Args:
            mask: (D, H, W) bool or integer array, nonzero being foreground.
            spacing_mm: Size of a voxel along D, H and W, millimetres; None if it is not known.
            **fields: Any of `query`, `modality`, `anatomy`, `lesion`, `name`.

        Raises:
            DataError: If the array is not a bool or integer volume.

        Example:
            >>> volume = np.zeros((3, 4, 6), dtype=np.uint8)
            >>> volume[1, 1:3, 2:5] = 1
            >>> VolumeTarget.from_mask(volume).slice_areas.tolist()
            [0, 6, 0]
        """
        return cls(foreground(mask, fields.get("name") or "mask", ndim=3), spacing_mm, **fields)

    @cached_property
    def slice_areas(self) -> np.ndarray:
        """(D,) int64: foreground pixels of each slice."""
        return np.array([np.count_nonzero(section) for section in self.mask], dtype=np.int64)

    @property
    def empty(self) -> bool:
        """Whether no slice has foreground."""
        return not bool(self.slice_areas.any())

    @property
    def depth(self) -> int:
        """Number of slices."""
        return int(self.mask.shape[0])

    @property
    def height(self) -> int:
        """Rows of a slice, in original pixels."""
        return int(self.mask.shape[1])

    @property
    def width(self) -> int:
        """Columns of a slice, in original pixels."""
        return int(self.mask.shape[2])

    def at(self, index: int) -> Target:
        """The truth on one slice, with the boxes of its 8-connected components; computed once per slice.

        Args:
            index: Slice, 0 <= index < depth.

        Raises:
            DataError: For an index outside the volume.
        """
        if not 0 <= index < self.depth:
            raise DataError(f"{self.name or 'volume'}: slice {index}; expected 0 <= slice < {self.depth}")
        known: dict[int, Target] = self._slices  # pyright: ignore[reportAttributeAccessIssue]
        if index not in known:
            known[index] = Target.from_mask(self.mask[index], **self.to_dict())
        return known[index]


def check_spacing(spacing_mm: Any, name: str) -> None:
    """Raise a DataError that begins with `name` unless this is None or three positive numbers."""
    if spacing_mm is None:
        return
    if len(spacing_mm) != 3 or not all(np.isfinite(edge) and edge > 0 for edge in spacing_mm):
        raise DataError(f"{name}: {spacing_mm}; expected three positive millimetres (z, y, x)")


def read_spacing(value: Any, name: str) -> tuple[float, float, float] | None:
    """Read the size of a voxel from a column: three numbers (z, y, x), also as JSON text; None and "" are None.

    Raises:
        DataError: It is anything else; begins with `name`.

    Example:
        >>> read_spacing("[5, 0.7, 0.7]", "spacing_mm"), read_spacing("", "spacing_mm")
        ((5.0, 0.7, 0.7), None)
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        z, y, x = (float(edge) for edge in (json.loads(value) if isinstance(value, str) else value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {value!r:.100}; expected millimetres [z, y, x], as [5.0, 0.7, 0.7]") from error
    check_spacing((z, y, x), name)
    return z, y, x


def check_mask(mask: object, name: str, ndim: int = 2) -> None:
    if not isinstance(mask, np.ndarray) or mask.ndim != ndim or mask.dtype != np.bool_:
        found = f"{mask.dtype} array of shape {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        expected = "an (H, W)" if ndim == 2 else "a (D, H, W)"
        raise DataError(
            f"{name} is a {found}; expected {expected} bool numpy array; threshold logits, or use Target.from_mask"
        )
