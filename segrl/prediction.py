"""What a model said and what is true: the two records that every reward, metric and report reads.

Legend: N boxes, H/W pixels of the original image. Boxes are xyxy, half-open, in original pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from segrl.boxes import validate_boxes
from segrl.errors import DataError
from segrl.masks import binarize, boxes_from_mask

__all__ = ["Prediction", "Status", "Target"]


class Status(StrEnum):
    """Whether a completion follows the grammar, and if not, the first rule that it breaks."""

    VALID = "valid"
    NO_REASONING = "no_reasoning"
    NO_ANSWER = "no_answer"
    EXTRA_TEXT = "extra_text"
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
        mask: (H, W) bool in original pixels, or None while no mask was decoded.
    """

    text: str
    reasoning: str | None
    answer: str | None
    boxes: np.ndarray
    status: Status
    has_seg: bool
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", validate_boxes(self.boxes, "Prediction.boxes"))
        if self.mask is not None:
            _check_mask(self.mask, "Prediction.mask")

    @property
    def valid(self) -> bool:
        """Whether the text follows the grammar."""
        return self.status is Status.VALID

    def with_mask(self, mask: np.ndarray) -> Prediction:
        """Return a copy that carries a decoded mask.

        Args:
            mask: (H, W) bool in original pixels; an all-False mask is a prediction of "nothing".

        Raises:
            DataError: If the mask is not a two-dimensional bool array (logits must be thresholded first).
        """
        return replace(self, mask=mask)


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

    @property
    def empty(self) -> bool:
        """Whether the mask has no foreground."""
        return not bool(self.mask.any())


def _check_mask(mask: object, name: str) -> None:
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype != np.bool_:
        found = f"{mask.dtype} array of shape {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise DataError(
            f"{name} is a {found}; expected an (H, W) bool numpy array; threshold logits, or use Target.from_mask"
        )
