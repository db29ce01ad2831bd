"""One row as evaluators see it: the mask that was predicted, if any, the true one, and pixels that do not count."""

# H, W pixels of an image, D slices of a volume

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from segrl.errors import DataError
from segrl.geometry.masks import rle_to_mask

__all__ = ["KINDS", "Case", "Overlap", "cases_of"]

# kinds of rows about which evaluators disagree; the first that applies
KINDS = {
    "both empty": "there is nothing, and nothing was predicted",
    "false alarm": "there is nothing, and something was predicted",
    "no mask": "there is something, and there is no mask: the answer cannot be read, or names nothing",
    "empty mask": "there is something, and the mask is empty",
    "ignored pixels": "some pixels do not count",
    "plain": "all others",
}


@dataclass(frozen=True)
class Overlap:
    """Pixels of two masks.

    Attributes:
        predicted: Pixels of the predicted mask.
        true: Pixels of the true one.
        both: Pixels of both.
    """

    predicted: int
    true: int
    both: int

    @property
    def either(self) -> int:
        """Pixels of one of the two, or of both."""
        return self.predicted + self.true - self.both


@dataclass(frozen=True, eq=False)
class Case:
    """One row: a question about an image or a volume.

    Attributes:
        true: (H, W) or (D, H, W) bool.
        predicted: The same shape; None where there is no mask.
        ignored: The same shape, pixels that do not count, such as the label 255; None for none.
        valid: Whether the text of the answer can be read.
        name: Of the row, for errors.
        group: Class of what is asked for, over which some evaluators average.

    Raises:
        DataError: Masks of different shapes, or no bool arrays; names the row.

    Example:
        >>> case = Case(np.eye(4, dtype=bool), np.ones((4, 4), dtype=bool), ignored=np.tri(4, k=-1, dtype=bool))
        >>> case.kind, case.overlap.either, case.painted.either
        ('ignored pixels', 10, 16)
    """

    true: np.ndarray
    predicted: np.ndarray | None = None
    ignored: np.ndarray | None = None
    valid: bool = True
    name: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        for what in ("true", "predicted", "ignored"):
            mask = getattr(self, what)
            if mask is None and what != "true":
                continue
            if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != self.true.shape:
                found = f"{getattr(mask, 'dtype', type(mask).__name__)} {getattr(mask, 'shape', '')}".strip()
                shape = getattr(self.true, "shape", "")
                raise DataError(f"{self.name or 'case'}: {what} mask is {found}, expected bool {shape}")

    @cached_property
    def overlap(self) -> Overlap:
        """Counts with ignored pixels left out."""
        if self.ignored is None:
            return self._counted(self.true, self.predicted)
        keep = ~self.ignored
        return self._counted(self.true & keep, None if self.predicted is None else self.predicted & keep)

    @cached_property
    def painted(self) -> Overlap:
        """Counts with ignored pixels as background: what is predicted there is wrong."""
        true = self.true if self.ignored is None else self.true & ~self.ignored
        return self._counted(true, self.predicted)

    @cached_property
    def kind(self) -> str:
        """The first of `KINDS` that applies."""
        counts = self.overlap
        if not counts.true:
            return "false alarm" if counts.predicted else "both empty"
        if self.predicted is None:
            return "no mask"
        if not counts.predicted:
            return "empty mask"
        return "plain" if self.ignored is None or not self.ignored.any() else "ignored pixels"

    @property
    def traits(self) -> frozenset[str]:
        """All of `KINDS` that apply, for conventions that state no rule for one of them."""
        missing = {"no mask"} if self.predicted is None else set()
        ignored = {"ignored pixels"} if self.ignored is not None and self.ignored.any() else set()
        return frozenset({self.kind} | missing | ignored)

    @staticmethod
    def _counted(true: np.ndarray, predicted: np.ndarray | None) -> Overlap:
        count = int(np.count_nonzero(true))
        if predicted is None:
            return Overlap(0, count, 0)
        return Overlap(int(np.count_nonzero(predicted)), count, int(np.count_nonzero(predicted & true)))


def cases_of(records: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Return the cases of records of images, see `segrl.evaluation.overlap_record`.

    Raises:
        DataError: A record without masks, such as one of a volume.

    Example:
        >>> from segrl.geometry import mask_to_rle
        >>> record = {"predicted_mask": None, "target_mask": mask_to_rle(np.eye(2, dtype=bool)), "status": "no_answer"}
        >>> cases_of([record])[0].kind
        'no mask'
    """
    found = []
    for number, record in enumerate(records):
        name = str(record.get("name") or f"record {number}")
        if "target_mask" not in record:
            raise DataError(f"{name}: holds no masks; evaluate the run again, and on images")
        masks = {
            key: None if record.get(key) is None else rle_to_mask(record[key], f"{key} of {name}")
            for key in ("target_mask", "predicted_mask", "ignored_mask")
        }
        true = masks["target_mask"]
        assert true is not None
        valid = record.get("status", "valid") == "valid"
        group = str(record.get("lesion") or "")
        found.append(Case(true, masks["predicted_mask"], masks["ignored_mask"], valid, name, group))
    return found
