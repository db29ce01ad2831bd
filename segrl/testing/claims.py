"""Properties that a reward claims when it is registered, and two of every reward that reads the ground truth."""

# D slices, H/W pixels, M lesions

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import NOT_SHOWN, Frame
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target, VolumeTarget
from segrl.testing import strategies
from segrl.testing.answers import broken_completions, write_completion
from segrl.testing.conformance import any_batch
from segrl.testing.subject import TOLERANCE, AnyTarget, Property, Rows, Subject, Violation, same

__all__ = ["CLAIMS"]

CELL = 12  # pixels of the square with one lesion and the answers to it
STEPS = 4  # from the first answer to the right one
_LOW = st.integers(1, CELL - 2)  # first pixel of a lesion, so that no lesion touches its neighbour
KEEPS_CONTENT = (  # names of `broken_completions` whose texts mostly have the content of the valid one
    "trailing text",
    "leading text",
    "text between",
    "two reasonings",
    "answer first",
    "no reasoning",
    "blank reasoning",
    "token twice",
    "token in the reasoning",
    "token behind the answer",
    "no token",
)


def _claims(kind: str, claim: str) -> Callable[[Subject], str | None]:
    return lambda subject: None if claim in getattr(subject.info, kind) else "not declared"


# --- invariance, on any batch


def _same_after(subject: Subject, rows: Rows, changed: Rows, how: str) -> None:
    first, second = subject.scores_of(rows), subject.score(changed)
    if not same(first, second):
        raise Violation(f"the same scores {how}, as declared", f"{first}, then {second}", rows)


def _box_order(subject: Subject, rows: Rows) -> None:
    def shuffle(prediction: Prediction, target: AnyTarget) -> tuple[Prediction, AnyTarget]:
        order = _order(len(prediction.boxes), rows.choice)
        paired = len(prediction.points) == len(prediction.boxes)
        shuffled = replace(
            prediction,
            boxes=prediction.boxes[order],
            points=prediction.points[order] if paired else prediction.points,
            scores=None if prediction.scores is None else prediction.scores[order],
        )
        if isinstance(target, Target):
            target = replace(target, boxes=target.boxes[_order(len(target.boxes), rows.choice)])
        return shuffled, target

    _same_after(subject, rows, rows.changed(shuffle), "for predicted and true boxes in another order")


def _order(count: int, choice: int) -> list[int]:
    order = list(range(count))[::-1]
    if choice > 1:
        random.Random(choice).shuffle(order)
    return order


def _flip(subject: Subject, rows: Rows) -> None:
    across, down = ((True, False), (False, True), (True, True))[rows.choice % 3]

    def mirror(prediction: Prediction, target: AnyTarget) -> tuple[Prediction, AnyTarget]:
        def pixels(array: np.ndarray) -> np.ndarray:
            array = array[..., ::-1] if across else array
            return np.ascontiguousarray(array[..., ::-1, :] if down else array)

        def corners(boxes: np.ndarray) -> np.ndarray:
            x1, y1, x2, y2 = boxes.T
            x1, x2 = (target.width - x2, target.width - x1) if across else (x1, x2)
            y1, y2 = (target.height - y2, target.height - y1) if down else (y1, y2)
            return np.stack([x1, y1, x2, y2], axis=1)

        return _moved(prediction, target, pixels, corners)

    _same_after(subject, rows, rows.changed(mirror), "for mirrored images, boxes, points and masks")


def _rescale(subject: Subject, rows: Rows) -> None:
    factor = 2 + rows.choice % 2

    def enlarge(prediction: Prediction, target: AnyTarget) -> tuple[Prediction, AnyTarget]:
        def pixels(array: np.ndarray) -> np.ndarray:
            return array.repeat(factor, axis=-1).repeat(factor, axis=-2)

        return _moved(prediction, target, pixels, lambda boxes: boxes * factor)

    _same_after(subject, rows, rows.changed(enlarge), f"for images, boxes, points and masks {factor} times as large")


def _moved(
    prediction: Prediction,
    target: AnyTarget,
    pixels: Callable[[np.ndarray], np.ndarray],
    corners: Callable[[np.ndarray], np.ndarray],
) -> tuple[Prediction, AnyTarget]:
    moved = replace(
        prediction,
        boxes=corners(prediction.boxes),
        points=corners(np.hstack([prediction.points, prediction.points]))[:, :2],
        mask=None if prediction.mask is None else pixels(prediction.mask),
        probability=None if prediction.probability is None else pixels(prediction.probability),
    )
    if isinstance(target, Target):
        return moved, replace(target, mask=pixels(target.mask), boxes=corners(target.boxes))
    return moved, replace(target, mask=pixels(target.mask))


# --- more overlap never scores less


@dataclass(eq=False)
class _Better:
    """Answers to one ground truth, each at least as close to it as the one before."""

    target: AnyTarget
    answers: list[Prediction]


def _never_falls(subject: Subject, example: _Better) -> None:
    scores = subject.score_group([(answer, example.target) for answer in example.answers])
    known = [(n, score) for n, score in enumerate(scores) if score is not None]
    for (n, before), (m, after) in pairwise(known):
        if after < before - TOLERANCE:
            raise Violation(
                "never less for more overlap, as declared",
                f"{before:g} for the first answer, {after:g} for the second, whose overlap is at least as large",
                Rows([example.answers[n], example.answers[m]], [example.target] * 2, [0, 0]),
            )


@st.composite
def _closer_boxes(draw: st.DrawFn, subject: Subject) -> _Better:
    """Draw boxes that are all too large, all too small or all moved, then less so, then right; one cell for each."""
    completion_format = draw(st.sampled_from(subject.formats))
    count = draw(st.integers(1, 3))
    mask = np.zeros((CELL, count * CELL), dtype=bool)
    kind = draw(st.sampled_from(["moved", "larger", "smaller"]))
    steps: list[list[list[int]]] = [[] for _ in range(STEPS + 1)]
    for n in range(count):
        (x1, x2), (y1, y2) = ((low, draw(st.integers(low + 1, CELL - 1))) for low in (draw(_LOW), draw(_LOW)))
        mask[y1:y2, n * CELL + x1 : n * CELL + x2] = True
        columns, rows = _closer_spans(draw, x1, x2, kind), _closer_spans(draw, y1, y2, kind)
        for found, (left, right), (top, bottom) in zip(steps, columns, rows, strict=True):
            found.append([n * CELL + left, top, n * CELL + right, bottom])
    target: AnyTarget = Target.from_mask(mask)
    slice_index, volume = None, subject.info.volume
    if volume:
        slice_index = draw(st.integers(0, 1))
        target = VolumeTarget.from_mask(np.stack([mask if k == slice_index else mask & False for k in range(2)]))
    frame = Frame("original_px", (count * CELL, CELL))
    answers = []
    for found in steps:
        text = write_completion(found, frame, completion_format, slice_index=slice_index, rounding=False)
        answer = completion_format.parse(text, frame)
        decoded = subject.info.needs_mask and (volume or answer.has_seg)
        answers.append(answer.with_mask(target.mask.copy()) if decoded else answer)
    return _Better(target, answers)


def _closer_spans(draw: st.DrawFn, low: int, high: int, kind: str) -> list[tuple[int, int]]:
    """Draw one side of a box inside its cell, wrong in one way, then less and less so, finally right."""
    if kind == "moved":
        moves = [draw(st.integers(-low, CELL - high))]
        for _ in range(STEPS - 1):
            moves.append(draw(st.integers(min(moves[-1], 0), max(moves[-1], 0))))
        return [(low + move, high + move) for move in (*moves, 0)]
    sign = 1 if kind == "larger" else -1
    before = [draw(st.integers(0, low if sign > 0 else high - low))]
    after = [draw(st.integers(0, CELL - high if sign > 0 else high - low - before[0]))]
    for _ in range(STEPS - 1):
        before.append(draw(st.integers(0, before[-1])))
        after.append(draw(st.integers(0, after[-1])))
    return [(low - sign * a, high + sign * b) for a, b in zip((*before, 0), (*after, 0), strict=True)]


@st.composite
def _closer_masks(draw: st.DrawFn, subject: Subject) -> _Better:
    """Draw a mask, then with more and more of its wrong pixels corrected, then right."""
    completion_format = draw(st.sampled_from(subject.formats))
    empty, volume = draw(st.sampled_from([False, None])), subject.info.volume
    target = draw((strategies.volume_targets if volume else strategies.targets)(empty=empty))
    steps = [draw((strategies.volumes if volume else strategies.masks)(near=target.mask))]
    for _ in range(STEPS):
        starts = [draw(st.integers(0, edge - 1)) for edge in target.mask.shape]
        part = tuple(slice(start, start + draw(st.integers(1, 4))) for start in starts)
        steps.append(steps[-1].copy())
        steps[-1][part] = target.mask[part]
    frame = Frame("original_px", (target.width, target.height))
    boxes, slice_index = _right(draw, target)
    text = write_completion(boxes, frame, completion_format, slice_index=slice_index, rounding=False)
    answer = completion_format.parse(text, frame)
    return _Better(target, [answer.with_mask(mask) for mask in (*steps, target.mask.copy())])


def _right(draw: st.DrawFn, target: AnyTarget) -> tuple[np.ndarray, int | None]:
    """Return the true boxes, of a volume those on a slice with foreground, if there is one."""
    if isinstance(target, Target):
        return target.boxes, None
    if target.empty:
        return np.zeros((0, 4)), None
    k = draw(st.sampled_from(np.flatnonzero(target.slice_areas).tolist()))
    return target.at(k).boxes, k


def _no_mask_claim(subject: Subject) -> str | None:
    if not subject.info.volume and not all(completion_format.seg_token for completion_format in subject.formats):
        return "not applicable: no mask can be asked for"
    return _claims("monotone", "mask")(subject)


# --- empty sides


@dataclass(eq=False)
class _Empty:
    """A ground truth with lesions and one without; an answer with findings and an empty one."""

    full: AnyTarget
    empty: AnyTarget
    finds: Prediction
    nothing: Prediction

    def side(self, side: str) -> tuple[Prediction, AnyTarget]:
        return {
            "both": (self.nothing, self.empty),
            "prediction": (self.nothing, self.full),
            "target": (self.finds, self.empty),
        }[side]


@st.composite
def _empty_sides(draw: st.DrawFn, subject: Subject) -> _Empty:
    needs_mask, volume = subject.info.needs_mask, subject.info.volume
    full = draw((strategies.volume_targets if volume else strategies.targets)(empty=False))
    completion_format = draw(st.sampled_from(subject.formats))
    finds = draw(
        strategies.predictions(full, valid=True, empty=False, mask=needs_mask, completion_format=completion_format)
    )
    frame = Frame("original_px", (full.width, full.height))
    # The same reasoning, so that a reward for its length or its words sees no difference.
    text = write_completion([], frame, completion_format, reasoning=finds.reasoning or "")
    nothing = completion_format.parse(text if finds.reasoning else text.partition("</think>")[2], frame)
    if needs_mask and (volume or nothing.has_seg):
        nothing = nothing.with_mask(np.zeros_like(full.mask))
    none = np.zeros_like(full.mask)
    empty = Target.from_mask(none) if isinstance(full, Target) else VolumeTarget.from_mask(none, full.spacing_mm)
    return _Empty(full, empty, finds, nothing)


def _as_declared(side: str) -> Callable[[Subject, _Empty], None]:
    sides = {"both": "both sides are", "prediction": "only the prediction is", "target": "only the ground truth is"}

    def holds(subject: Subject, example: _Empty) -> None:
        declared: Any = subject.info.empty
        pair = example.side(side)
        found = subject.score_group([pair])
        if not same(found, [declared[side]]):
            raise Violation(
                f"{declared[side]} for a valid answer where {sides[side]} empty, as declared",
                str(found[0]),
                Rows([pair[0]], [pair[1]], [0]),
            )

    return holds


def _undeclared_side(side: str) -> Callable[[Subject], str | None]:
    def skipped(subject: Subject) -> str | None:
        declared = subject.info.empty
        return None if not callable(declared) and side in (declared or {}) else "not declared"

    return skipped


def _honest(subject: Subject, example: _Empty) -> None:
    pairs = [example.side("both"), example.side("target")]
    nothing, finds = subject.score_group(pairs)
    if nothing is not None and finds is not None and nothing < finds - TOLERANCE:
        raise Violation(
            "where there is nothing to find, no less for an empty answer than for a finding (a reward that never reads "
            "the ground truth declares needs_target=False)",
            f"{nothing:g} for the right answer, {finds:g} for the hallucination",
            Rows([pair[0] for pair in pairs], [pair[1] for pair in pairs], [0, 0]),
        )


def _blind(subject: Subject) -> str | None:
    return None if subject.info.needs_target else "not applicable: it does not read the ground truth"


# --- invalid texts


@st.composite
def _broken_pairs(draw: st.DrawFn, subject: Subject) -> Rows:
    """Draw a valid answer, and an invalid text with the same content."""
    completion_format: CompletionFormat = draw(st.sampled_from(subject.formats))
    needs_mask, volume = subject.info.needs_mask, subject.info.volume
    target = draw((strategies.volume_targets if volume else strategies.targets)())
    valid = draw(strategies.predictions(target, valid=True, mask=needs_mask, completion_format=completion_format))
    texts = broken_completions(valid.reasoning or "One spot.", valid.answer or "", completion_format)
    # A slice that the volume does not have is not shown, if the valid text was read so.
    slices = range(target.mask.shape[0]) if valid.slice_index == NOT_SHOWN else None
    frame = Frame("original_px", (target.width, target.height), slices=None if slices is None else tuple(slices))
    broken_ones = [completion_format.parse(texts[name], frame) for name in KEEPS_CONTENT if name in texts]
    broken = draw(st.sampled_from([said for said in broken_ones if _says_the_same(said, valid)]))
    if needs_mask and (volume or broken.has_seg) and valid.mask is not None:
        broken = broken.with_mask(valid.mask, valid.probability)
    return Rows([valid, broken], [target, target], [0, 0])


def _says_the_same(first: Prediction, second: Prediction) -> bool:
    return first.slice_index == second.slice_index and all(
        np.array_equal(one, other) for one, other in ((first.boxes, second.boxes), (first.points, second.points))
    )


def _invalid_is_no_gain(subject: Subject, rows: Rows) -> None:
    valid, broken = subject.score_group(list(zip(rows.predictions, rows.targets, strict=True)))
    if valid is not None and broken is not None and broken > valid + TOLERANCE:
        raise Violation(
            "no more for an invalid text than for a valid one with the same content",
            f"{valid:g} for the valid one, {broken:g} for the one that is {rows.predictions[1].status.value}",
            rows,
        )


CLAIMS = (
    Property("order of boxes", any_batch, _box_order, _claims("invariant", "box_order")),
    Property("mirroring", any_batch, _flip, _claims("invariant", "flip")),
    Property("enlarging", any_batch, _rescale, _claims("invariant", "rescale")),
    Property("monotone in boxes", _closer_boxes, _never_falls, _claims("monotone", "boxes")),
    Property("monotone in the mask", _closer_masks, _never_falls, _no_mask_claim),
    *(
        Property(f"empty: {side}", _empty_sides, _as_declared(side), _undeclared_side(side))
        for side in ("both", "prediction", "target")
    ),
    Property("honest about nothing", _empty_sides, _honest, _blind),
    Property("invalid text", _broken_pairs, _invalid_is_no_gain, _blind),
)
