"""The parsed completion that every reward, metric and report reads.

Legend: N boxes, P points, D slices, H/W pixels of the original image. Boxes are xyxy, half-open, in original pixels;
points are (x, y) in original pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from segrl.errors import DataError
from segrl.geometry.boxes import validate_boxes
from segrl.predictions.target import check_mask

__all__ = ["Prediction", "Status", "invalid_text"]


class Status(StrEnum):
    """Whether a completion follows the grammar, and if not, the first rule that it breaks.

    `segrl.predictions.parse_completion` defines the rules.

    Example:
        >>> Status("no_answer") is Status.NO_ANSWER, [status.value for status in Status][:2]
        (True, ['valid', 'no_reasoning'])
    """

    VALID = "valid"
    NO_REASONING = "no_reasoning"
    NO_ANSWER = "no_answer"
    EXTRA_TEXT = "extra_text"
    MALFORMED_JSON = "malformed_json"
    MALFORMED_BOXES = "malformed_boxes"
    NO_SEG_TOKEN = "no_seg_token"

    @property
    def reason(self) -> str:
        """The rule that a text of this status breaks, in words; "" for a valid one."""
        return _REASONS.get(self.value, "")


_REASONS = {
    "no_reasoning": "no closed <think> block with text in it",
    "no_answer": "no closed <answer> block with text in it",
    "extra_text": "text outside the blocks, or a block or the segmentation token repeated, nested or misplaced",
    "malformed_json": "the answer is not JSON in the schema",
    "malformed_boxes": "a bad box, or coordinates in a notation that is not read",
    "no_seg_token": "no segmentation token in the answer",
}


def invalid_text(statuses: Mapping[str, int]) -> str:
    """Say which share of answers is invalid, and why.

    Args:
        statuses: Number of answers by the value of their `Status`.

    Example:
        >>> invalid_text({"valid": 3, "no_answer": 1})
        '1 of 4 answers is invalid (25.0 %): 1 no_answer (no closed <answer> block with text in it)'
        >>> invalid_text({"valid": 3})
        '0 of 3 answers are invalid'
    """
    bad = {Status(name): count for name, count in statuses.items() if name != Status.VALID.value and count}
    n, total = sum(bad.values()), sum(statuses.values())
    text = f"{n} of {total} answers {'is' if n == 1 else 'are'} invalid"
    if not bad:
        return text
    reasons = "; ".join(f"{count} {status.value} ({status.reason})" for status, count in bad.items())
    return f"{text} ({n / total:.1%}): {reasons}".replace("%)", " %)", 1)


@dataclass(frozen=True, eq=False)
class Prediction:
    """One completion, parsed once by `segrl.predictions.parse_completion`; a mask head adds the mask.

    Attributes:
        text: The completion, unchanged apart from end tokens behind it, which are left out.
        reasoning: Text of the reasoning block, or None without one.
        answer: Text of the answer block, or None when there is none or more than one.
        boxes: (N, 4) float64, clipped to the image; (0, 4) when nothing was predicted. Duplicates are kept.
        status: `Status.VALID`, or what is wrong with the text.
        has_seg: Whether the answer holds the segmentation token.
        mask: (H, W) bool in original pixels, of a volume (D, H, W), or None while no mask was decoded.
        points: (P, 2) float64, clipped to the image; (0, 2) when none was given. If there are as many points as boxes,
            the n-th point belongs to the n-th box.
        scores: (N,) float64 in [0, 1], the confidence of each box, or None when the answer gave none.
        slice_index: Index in the whole volume of the slice that the answer names, counted from 0; -1
            (`segrl.predictions.NOT_SHOWN`) for one that was not shown, None if no slice is named. Without
            `Frame.slices` it may lie outside the volume.
        probability: Foreground probabilities of `mask`, same shape, float in [0, 1]; None unless they were requested.

    Raises:
        DataError: An array has the wrong shape, type or range.

    Example:
        >>> prediction = Prediction("A cyst.", None, None, boxes=[], status=Status.NO_ANSWER, has_seg=False)
        >>> prediction.boxes.shape, prediction.valid, prediction.mask
        ((0, 4), False, None)
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
            check_mask(self.mask, "Prediction.mask", 3 if np.ndim(self.mask) == 3 else 2)
        if self.probability is not None and (self.mask is None or self.probability.shape != self.mask.shape):
            shape = None if self.mask is None else self.mask.shape
            raise DataError(
                f"Prediction.probability: expected the shape of the mask {shape}, got {self.probability.shape}"
            )

    @property
    def valid(self) -> bool:
        """Return whether the text follows the grammar."""
        return self.status is Status.VALID

    def with_mask(self, mask: np.ndarray, probability: np.ndarray | None = None) -> Prediction:
        """Return a copy that carries a decoded mask.

        Args:
            mask: (H, W) bool in original pixels, (D, H, W) for a volume; all False is a prediction of "nothing".
            probability: Foreground probabilities of the same shape, for rewards that read them.

        Raises:
            DataError: If the mask is not a bool array (threshold logits first), or the shapes differ.

        Example:
            >>> text = Prediction("A cyst.", None, None, boxes=[], status=Status.NO_ANSWER, has_seg=False)
            >>> int(text.with_mask(np.ones((2, 3), dtype=bool)).mask.sum()), text.mask
            (6, None)
        """
        return replace(self, mask=mask, probability=probability)


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
