"""What a model said and what is true: the records that every reward, metric and report reads.

Legend: N boxes, P points, D slices, H/W pixels of the original image. Boxes are xyxy, half-open, in original pixels;
points are (x, y) in original pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from segrl.boxes import validate_boxes
from segrl.errors import DataError
from segrl.masks import binarize, boxes_from_mask, deepest_points, foreground, mask_to_box

__all__ = ["Prediction", "Status", "Target", "VolumeTarget"]


class Status(StrEnum):
    """Whether a completion follows the grammar, and if not, the first rule that it breaks."""

    VALID = "valid"
    NO_REASONING = "no_reasoning"
    NO_ANSWER = "no_answer"
    EXTRA_TEXT = "extra_text"
    MALFORMED_JSON = "malformed_json"
    MALFORMED_BOXES = "malformed_boxes"
    NO_SEG_TOKEN = "no_seg_token"


@dataclass(frozen=True, eq=False)
class Prediction:
    """One completion, parsed once; `segrl.parsing.parse_completion` makes it, a mask head adds the mask.

    Attributes:
        text: The completion as it came.
        reasoning: Text of the reasoning block, or None without one.
        answer: Text of the answer block, or None when there is none or it is ambiguous which one counts.
        boxes: (N, 4) float64, clipped to the image; (0, 4) when nothing was predicted. Duplicates are kept.
        status: `Status.VALID`, or what is wrong with the text.
        has_seg: Whether the answer holds the segmentation token.
        mask: (H, W) bool in original pixels, of a volume (D, H, W), or None while no mask was decoded.
        points: (P, 2) float64, clipped to the image; (0, 2) when none was given. With as many points as boxes, the
            n-th point belongs to the n-th box.
        scores: (N,) float64 in [0, 1], the confidence of each box, or None when the answer gave none.
        slice_index: Index in the whole volume of the slice that the answer names, counted from 0; -1
            (`segrl.frames.NOT_SHOWN`) for one that was not shown, None where none is named. Without `Frame.slices` it
            may lie outside the volume.
        probability: Foreground probabilities of `mask`, same shape, float in [0, 1]; None unless they were asked for.
    """

    text: str
    reasoning: str | None
    answer: str | None
    boxes: np.ndarray
    status: Status
    has_seg: bool
    mask: np.ndarray | None = None
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    scores: np.ndarray | None = None
    slice_index: int | None = None
    probability: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", validate_boxes(self.boxes, "Prediction.boxes"))
        object.__setattr__(self, "points", _check_points(self.points))
        if self.scores is not None:
            object.__setattr__(self, "scores", _check_scores(self.scores, len(self.boxes)))
        if self.mask is not None:
            _check_mask(self.mask, "Prediction.mask", 3 if np.ndim(self.mask) == 3 else 2)
        if self.probability is not None and (self.mask is None or self.probability.shape != self.mask.shape):
            shape = None if self.mask is None else self.mask.shape
            raise DataError(
                f"Prediction.probability: expected the shape of the mask {shape}, got {self.probability.shape}"
            )

    @property
    def valid(self) -> bool:
        """Whether the text follows the grammar."""
        return self.status is Status.VALID

    def with_mask(self, mask: np.ndarray, probability: np.ndarray | None = None) -> Prediction:
        """Return a copy that carries a decoded mask.

        Args:
            mask: (H, W) bool in original pixels, (D, H, W) for a volume; all False is a prediction of "nothing".
            probability: Foreground probabilities of the same shape, for rewards that read them.

        Raises:
            DataError: If the mask is not a bool array (logits must be thresholded first), or the shapes differ.
        """
        return replace(self, mask=mask, probability=probability)


@dataclass(frozen=True, eq=False)
class Target:
    """The truth for one row.

    Attributes:
        mask: (H, W) bool in original pixels; all False when the image holds nothing that was asked for.
        boxes: (N, 4) float64, one box per lesion; (0, 4) for an empty mask.
        query: What was asked.
        modality: Imaging modality, used to group results.
        anatomy: Body region, used to group results.
        lesion: Name of the lesion.
        name: File name or row id, named in errors.
    """

    mask: np.ndarray
    boxes: np.ndarray
    query: str = ""
    modality: str = ""
    anatomy: str = ""
    lesion: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        label = f" of {self.name!r}" if self.name else ""
        _check_mask(self.mask, f"Target.mask{label}")
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
        foreground = binarize(np.asarray(mask), fields.get("name") or "mask")
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
        """(4,) box around the whole foreground, or None without any; see `segrl.masks.mask_to_box`."""
        return mask_to_box(self.mask)

    @cached_property
    def points(self) -> np.ndarray:
        """(N, 2) float64, one point inside each box's lesion; see `segrl.masks.deepest_points`."""
        return deepest_points(self.mask, self.boxes)


@dataclass(frozen=True, eq=False)
class VolumeTarget:
    """The truth for one volume: a stack of slices of which an answer names one.

    Attributes:
        mask: (D, H, W) bool in original pixels; the D slices of the whole volume, of which the model may see fewer.
        spacing_mm: Size of a voxel along D, H and W in millimetres.
        query: What was asked, as the rest: see `Target`.
        modality: Imaging modality.
        anatomy: Body region.
        lesion: Name of the lesion or structure.
        name: File name or row id, named in errors.
    """

    mask: np.ndarray
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    query: str = ""
    modality: str = ""
    anatomy: str = ""
    lesion: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        label = f" of {self.name!r}" if self.name else ""
        _check_mask(self.mask, f"VolumeTarget.mask{label}", 3)
        if len(self.spacing_mm) != 3 or not all(np.isfinite(edge) and edge > 0 for edge in self.spacing_mm):
            raise DataError(
                f"VolumeTarget.spacing_mm{label}: {self.spacing_mm}; expected three positive millimetres (z, y, x)"
            )
        object.__setattr__(self, "_slices", {})

    @classmethod
    def from_mask(
        cls, mask: Any, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0), **fields: str
    ) -> VolumeTarget:
        """Build a target from a stored volume.

        Args:
            mask: (D, H, W) bool or integer array, nonzero being foreground.
            spacing_mm: Size of a voxel along D, H and W.
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
            fields = {key: getattr(self, key) for key in ("query", "modality", "anatomy", "lesion", "name")}
            known[index] = Target.from_mask(self.mask[index], **fields)
        return known[index]


def _check_mask(mask: object, name: str, ndim: int = 2) -> None:
    if not isinstance(mask, np.ndarray) or mask.ndim != ndim or mask.dtype != np.bool_:
        found = f"{mask.dtype} array of shape {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        expected = "an (H, W)" if ndim == 2 else "a (D, H, W)"
        raise DataError(
            f"{name} is a {found}; expected {expected} bool numpy array; threshold logits, or use Target.from_mask"
        )


def _check_points(points: object) -> np.ndarray:
    array = np.asarray(points, dtype=np.float64)
    if array.shape == (0,):
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise DataError(f"Prediction.points: expected finite numbers of shape (P, 2), got {points!r:.200}")
    return array


def _check_scores(scores: object, boxes: int) -> np.ndarray:
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (boxes,) or not ((array >= 0) & (array <= 1)).all():
        raise DataError(f"Prediction.scores: expected {boxes} numbers in [0, 1], one per box, got {scores!r:.200}")
    return array
