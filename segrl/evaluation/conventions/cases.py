"""One row as evaluators see it: the mask that was predicted, if any, the true one, and pixels that do not count."""

# H, W pixels of an image, D slices of a volume

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from segrl.errors import DataError
from segrl.geometry.masks import rle_to_mask
from segrl.predictions.target import answer_of, read_spacing

__all__ = ["KINDS", "VOLUMES", "Case", "Overlap", "cases_of"]

# kinds of rows about which evaluators disagree; the first that applies
KINDS = {
    "both empty": "there is nothing, and nothing was predicted",
    "false alarm": "there is nothing, and something was predicted",
    "no mask": "there is something, and there is no mask: the answer cannot be read, or names nothing",
    "empty mask": "there is something, and the mask is empty",
    "ignored pixels": "some pixels do not count",
    "plain": "all others",
}
VOLUMES = "volumes"  # of rows that are none of images, for conventions that state no rule for them


@dataclass(frozen=True)
class Overlap:
    """Pixels, or voxels, of two masks.

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


Masks = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Case:
    """One row: a question about an image or a volume. `Case.of` makes one of masks.

    Attributes:
        masks: Returns the true mask, the predicted one and the pixels that do not count, (H, W) or (D, H, W) bool, the
            last two None where there are none.
        overlap: Counts with ignored pixels left out.
        painted: Counts with ignored pixels as background: what is predicted there is wrong.
        filled: Counts with ignored pixels as part of the target.
        answered: Whether there is a mask, be it empty.
        ignores: Whether some pixels do not count.
        valid: Whether the text of the answer can be read.
        name: Of the row, for errors.
        group: Class of what is asked for, over which some evaluators average.
        volume: Whether the masks are those of a volume.
        spacing_mm: Of a volume, (z, y, x), millimetres; None if it is not known.
        others: Of one of several masks of an answer, whose names end in "#0", "#1", ...: whether the answer has any of
            the others.

    Example:
        >>> ignored = np.tri(4, k=-1, dtype=bool)
        >>> case = Case.of(np.eye(4, dtype=bool), np.ones((4, 4), dtype=bool), ignored)
        >>> case.kind, case.overlap.either, case.painted.either
        ('ignored pixels', 10, 16)
    """

    masks: Callable[[], Masks]
    overlap: Overlap
    painted: Overlap
    filled: Overlap
    answered: bool
    ignores: bool
    valid: bool = True
    name: str = ""
    group: str = ""
    volume: bool = False
    spacing_mm: tuple[float, float, float] | None = None
    others: bool = False

    @classmethod
    def of(
        cls,
        true: np.ndarray,
        predicted: np.ndarray | None = None,
        ignored: np.ndarray | None = None,
        *,
        valid: bool = True,
        name: str = "",
        group: str = "",
        spacing_mm: tuple[float, float, float] | None = None,
        others: bool = False,
        keep: Callable[[], Masks] | None = None,
    ) -> Case:
        """Make a case of masks.

        Args:
            true: (H, W) or (D, H, W) bool.
            predicted: The same shape; None where there is no mask.
            ignored: The same shape, pixels that do not count, such as the label 255; None for none.
            valid: See the class.
            name: See the class.
            group: See the class.
            spacing_mm: See the class.
            others: See the class.
            keep: Returns the masks again, so that they are not kept in memory; None keeps them.

        Raises:
            DataError: Masks of different shapes, or no bool arrays; names the row.
        """
        for what, mask in (("true", true), ("predicted", predicted), ("ignored", ignored)):
            if mask is None and what != "true":
                continue
            if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != true.shape:
                found = f"{getattr(mask, 'dtype', type(mask).__name__)} {getattr(mask, 'shape', '')}".strip()
                shape = getattr(true, "shape", "")
                raise DataError(f"{name or 'case'}: {what} mask is {found}, expected bool {shape}")
        ignores = ignored is not None and bool(ignored.any())
        counts = painted = filled = _counted(true, predicted)
        if ignores:
            assert ignored is not None
            kept = ~ignored
            filled = _counted(true | ignored, predicted)
            painted = _counted(true & kept, predicted)
            counts = _counted(true & kept, None if predicted is None else predicted & kept)
        masks = keep or (lambda: (true, predicted, ignored))
        known = {"valid": valid, "name": name, "group": group, "volume": true.ndim == 3, "spacing_mm": spacing_mm}
        return cls(masks, counts, painted, filled, predicted is not None, ignores, **known, others=others)

    @property
    def kind(self) -> str:
        """The first of `KINDS` that applies."""
        if not self.overlap.true:
            return "false alarm" if self.overlap.predicted else "both empty"
        if not self.answered:
            return "no mask"
        if not self.overlap.predicted:
            return "empty mask"
        return "ignored pixels" if self.ignores else "plain"

    @property
    def traits(self) -> frozenset[str]:
        """All of `KINDS` that apply, and `VOLUMES`, for conventions that state no rule for one of them."""
        missing = set() if self.answered else {"no mask"}
        ignored = {"ignored pixels"} if self.ignores else set()
        return frozenset({self.kind} | missing | ignored | ({VOLUMES} if self.volume else set()))


def _counted(true: np.ndarray, predicted: np.ndarray | None) -> Overlap:
    count = int(np.count_nonzero(true))
    if predicted is None:
        return Overlap(0, count, 0)
    return Overlap(int(np.count_nonzero(predicted)), count, int(np.count_nonzero(predicted & true)))


def _stored(record: Mapping[str, Any], name: str) -> Masks:
    masks = [
        None if record.get(key) is None else rle_to_mask(record[key], f"{key} of {name}")
        for key in ("target_mask", "predicted_mask", "ignored_mask")
    ]
    true, predicted, ignored = masks
    assert true is not None
    return true, predicted, ignored


def _own(record: Mapping[str, Any]) -> tuple[Any, Any]:
    return record.get("target_mask"), record.get("predicted_mask")


def cases_of(records: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Return the cases of records of images or volumes, see `segrl.evaluation.overlap_record`.

    Raises:
        DataError: A record without masks, such as one that an earlier version wrote of a volume, masks of different
            shapes, or several masks for one question about one image.

    Example:
        >>> from segrl.geometry import mask_to_rle
        >>> record = {"predicted_mask": None, "target_mask": mask_to_rle(np.eye(2, dtype=bool)), "status": "no_answer"}
        >>> cases_of([record])[0].kind
        'no mask'
    """
    found: list[Case] = []
    given = Counter(_answer(record) for record in records if record.get("predicted_mask") is not None)
    masks: dict[tuple[str, ...], tuple[Any, Any]] = {}
    for number, record in enumerate(records):
        name = str(record.get("name") or f"record {number}")
        if record.get("target_mask") is None:
            raise DataError(f"{name}: holds no masks; evaluate the run again, with this version of segrl")
        valid, group = record.get("status", "valid") == "valid", str(record.get("lesion") or "")
        key = tuple(str(record.get(column) or "") for column in ("name", "query", "lesion"))
        if any(key) and masks.setdefault(key, _own(record)) != _own(record):
            raise DataError(f"{name}: several records with different masks answer {key[1] or key[2]!r}; keep one")
        spacing = read_spacing(record.get("spacing_mm"), f"spacing_mm of {name}")
        keep = partial(_stored, record, name)  # a thousand masks of 512 x 512 px are a quarter of a gigabyte
        others = _answer(record) is not None and given[_answer(record)] > (record.get("predicted_mask") is not None)
        known = {"valid": valid, "name": name, "group": group, "spacing_mm": spacing}
        found.append(Case.of(*keep(), **known, others=others, keep=keep))
    return found


def _answer(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Question and answer of a record that is one mask of several."""
    answer = answer_of(str(record.get("name") or ""))
    return (str(record.get("query") or ""), answer) if answer else None
