"""Corner cases that random examples reach only now and then: each kind of answer to each kind of ground truth."""

# D slices, H/W pixels

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from segrl.predictions.frames import Frame
from segrl.predictions.target import Target, VolumeTarget
from segrl.testing.answers import write_completion
from segrl.testing.subject import Property, Rows, Subject, Violation

__all__ = ["check_corners", "corners"]

EDGE, DEPTH, SLICE = 8, 3, 1  # pixels, slices, and the one with lesions
WHOLE, FIRST, SECOND, MOVED, APART = [0, 0, 8, 8], [1, 1, 4, 4], [5, 5, 7, 7], [2, 2, 5, 5], [6, 0, 8, 2]
# Edge of the image and boxes of the lesions: none, one, two, everything, and one that is tiny for its image.
LESIONS: tuple[tuple[int, list[list[int]]], ...] = (
    (EDGE, []),
    (EDGE, [FIRST]),
    (EDGE, [FIRST, SECOND]),
    (EDGE, [WHOLE]),
    (8 * EDGE, [FIRST]),
)
TEXTS: tuple[dict[str, str], ...] = (
    {},
    {"query": "Where is it?", "modality": "CT", "anatomy": "lung", "lesion": "nodule", "name": "scan_3"},
)
ANSWERS: tuple[list[list[int]], ...] = ([], [FIRST], [MOVED], [APART], [WHOLE], [FIRST, SECOND], [FIRST, FIRST])


def corners(subject: Subject) -> Iterator[Rows]:
    """Yield batches, one per completion format and ground truth.

    Their rows are all pairs of boxes and masks that find nothing, the lesion, a part of it, another place, everything,
    two places, or the same one twice; with and without a mask, its probabilities, and a slice; and invalid ones. Half
    of the ground truths have texts and flat voxels. With a group-relative reward each row is a group of equal answers.
    """
    size = subject.group_size or 1
    for completion_format in subject.formats:
        for number, (edge, lesions) in enumerate(LESIONS):
            frame = Frame("original_px", (edge, edge))
            target = _target(_mask(lesions, edge, subject.info.volume), TEXTS[number % 2])
            predictions = [completion_format.parse(text, frame) for text in ("", "No tags.", "<answer>None.</answer>")]
            for boxes in ANSWERS:
                slices = (SLICE, None) if subject.info.volume and boxes else (None,)
                texts = [write_completion(boxes, frame, completion_format, slice_index=k) for k in slices]
                for text in (*texts, f"{texts[0]} And more."):
                    said = completion_format.parse(text, frame)
                    shown = [_mask(shown, edge, subject.info.volume) for shown in ANSWERS]
                    shown.append(np.ones_like(shown[0]))
                    predictions += [said, *map(said.with_mask, shown)]
                predictions.append(said.with_mask(shown[1], shown[1].astype(np.float32)))
            rows = [prediction for prediction in predictions for _ in range(size)]
            groups = [number // size for number in range(len(rows))]
            yield Rows(rows, [target] * len(rows), list(groups))


def check_corners(subject: Subject, properties: list[Property]) -> tuple[int, tuple[str, Violation] | None]:
    """Test properties on all corner cases.

    Returns:
        The number of batches, and the name of the property that fails first with its violation, for one group of rows
        if it also fails for that alone; None if all hold.
    """
    tried = 0
    for rows in corners(subject):
        tried += 1
        for item in properties:
            try:
                item.holds(subject, rows)
            except Violation as violation:
                return tried, (item.name, _smallest(subject, item, rows) or violation)
    return tried, None


def _smallest(subject: Subject, item: Property, rows: Rows) -> Violation | None:
    for group in dict.fromkeys(rows.groups):
        members = [row for row, other in enumerate(rows.groups) if other == group]
        try:
            item.holds(subject, rows.some(members))
        except Violation as violation:
            return violation
    return None


def _target(mask: np.ndarray, texts: dict[str, str]) -> Target | VolumeTarget:
    if mask.ndim == 2:
        return Target.from_mask(mask, **texts)
    return VolumeTarget.from_mask(mask, (5.0, 0.5, 0.5) if texts else (1.0, 1.0, 1.0), **texts)


def _mask(boxes: list[list[int]], edge: int, volume: bool) -> np.ndarray:
    mask = np.zeros((edge, edge), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return np.stack([mask & (k == SLICE) for k in range(DEPTH)]) if volume else mask
