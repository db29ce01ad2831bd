"""Policies that answer scenes: honest ones of four grades, degenerate ones, and tricks played on honest answers.

A policy writes a text in the grammar of a reward and, for rewards that read masks, the mask that belongs to it. The
mask of a volume is what a frozen segmenter propagates from boxes on a slice, and empty without either.
"""

# D slices, H/W pixels, N boxes, P points

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from segrl.audit.scenes import KINDS, Scene
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import format_completion
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import VolumeTarget
from segrl.testing.answers import PROMPT, REASONING, UNREAD, write_answer

__all__ = ["POLICIES", "UNREAD_BOX", "Policy", "answer"]

GRADES = {  # IoU of an answer's boxes and mask with the ground truth; real answers of a grade vary
    "perfect": (1.0, 1.0, 1.0),
    "good": (0.7, 0.9, 0.8),
    "fair": (0.45, 0.75, 0.6),
    "poor": (0.15, 0.55, 0.35),
}
CONFIDENCE = {"perfect": 1.0, "good": 0.9, "fair": 0.8, "poor": 0.6}
WHOLE, CENTRE = (0.0, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75)  # boxes in shares of the image
GRID = tuple((x / 4, y / 4, (x + 1) / 4, (y + 1) / 4) for y in range(4) for x in range(4))
NET = tuple(  # boxes of three sizes, each size with half of its edge between them
    (x, y, x + edge, y + edge)
    for edge in (1 / 8, 1 / 4, 1 / 2)
    for y in np.arange(0, 1 - edge / 2, edge / 2).tolist()
    for x in np.arange(0, 1 - edge / 2, edge / 2).tolist()
)
AROUND = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75)  # where else a lesion may be, in edges of its box
MANY = 10  # copies of a box
FLOOD = 16  # points along each edge


# --- content of an answer, before it is written


@dataclass(frozen=True, eq=False)
class Said:
    """The content of an answer, in original pixels.

    Attributes:
        boxes: (N, 4).
        points: (P, 2).
        scores: N confidences.
        slice_index: Counted from 0.
        mask: (H, W) bool, (D, H, W) of a volume, the mask that is shown with it; None without one.
    """

    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    scores: tuple[float, ...] = ()
    slice_index: int | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes answers in the grammar of a reward, for one scene."""

    frame: Frame
    completion_format: CompletionFormat

    def answer(self, said: Said) -> str:
        """Return the content of the answer block, with the token."""
        return write_answer(
            said.boxes,
            self.frame,
            self.completion_format,
            points_px=said.points,
            scores=said.scores if len(said.scores) == len(said.boxes) else None,
            slice_index=said.slice_index,
        )

    def text(self, said: Said, reasoning: str = REASONING) -> str:
        """Return the completion."""
        return format_completion(reasoning, self.answer(said))


Shown = tuple[str, np.ndarray | None]


@dataclass(frozen=True)
class Policy:
    """A way to answer.

    Attributes:
        name: Name in the table.
        kind: "honest" ones look at the image; "degenerate" ones do not; a "trick" changes an honest answer.
        shows: Returns text and mask for a scene, or None if the grammar cannot express them.
        instead_of: For a trick: the policy whose score it must not exceed.
    """

    name: str
    kind: Literal["honest", "degenerate", "trick"]
    shows: Callable[[Scene, Writer], Shown | None]
    instead_of: str = ""


def answer(policy: Policy, scene: Scene, completion_format: CompletionFormat, with_mask: bool) -> Prediction | None:
    """Return the answer of a policy to a scene, as a trainer would parse it; None if the grammar cannot express it.

    Args:
        policy: The policy.
        scene: The scene.
        completion_format: The grammar and the frame.
        with_mask: Whether masks are decoded. For an image there is none without the segmentation token; for a volume it
            is empty if the answer names no slice of it or no box.
    """
    size = (scene.target.width, scene.target.height)
    frame = completion_format.frame_of(size, size)
    shown = policy.shows(scene, Writer(frame, completion_format))
    if shown is None:
        return None
    text, mask = shown
    prediction = completion_format.parse(text, frame)
    if not with_mask:
        return prediction
    if isinstance(scene.target, VolumeTarget):
        k = prediction.slice_index
        if k is None or not 0 <= k < scene.target.depth or len(prediction.boxes) == 0:
            mask = None
    elif not prediction.has_seg:
        return prediction
    return prediction.with_mask(_nothing(scene) if mask is None else mask)


# --- honest policies


def _honest(grade: str) -> Callable[[Scene, Writer], Shown]:
    def shows(scene: Scene, writer: Writer) -> Shown:
        said = _graded(scene, grade)
        return writer.text(said), said.mask

    return shows


def _graded(scene: Scene, grade: str) -> Said:
    """Return an answer of a grade; empty for every grade if there is nothing to find."""
    target, level = scene.target, GRADES[grade][(scene.number + scene.number // len(KINDS)) % 3]
    if target.empty:
        return Said(mask=_nothing(scene))
    axis = scene.number % 2
    k, mask = None, _moved(target.mask, level, axis)
    if isinstance(target, VolumeTarget):
        visible = target.slice_areas / target.slice_areas.max()
        k = int(np.argmin(np.abs(np.where(visible > 0, visible, np.inf) - level)))
        target = target.at(k)
    size = np.array([target.width, target.height])
    boxes, points = target.boxes.copy(), target.points.copy()
    towards = np.where((boxes[:, :2] + boxes[:, 2:]) / 2 < size / 2, 1, -1)  # the centre: it stays in the image
    step = (boxes[:, axis + 2] - boxes[:, axis]) * (1 - level) / (1 + level) * towards[:, axis]
    boxes[:, [axis, axis + 2]] += step[:, None]
    points[:, axis] += step
    return Said(boxes, points, (CONFIDENCE[grade],) * len(boxes), k, mask)


def _moved(mask: np.ndarray, level: float, axis: int) -> np.ndarray:
    """Return the mask moved along x (axis 0) or y until its IoU with itself is closest to a level."""
    along = -1 - axis  # of the array, which may be that of a volume
    length = mask.shape[along]
    centre = np.nonzero(mask)[along].mean()
    best, least = mask, abs(1 - level)
    for distance in range(1, length // 2):
        moved = np.zeros_like(mask)
        source, goal = (np.s_[: length - distance], np.s_[distance:])
        if centre >= length / 2:
            source, goal = goal, source
        np.moveaxis(moved, along, 0)[goal] = np.moveaxis(mask, along, 0)[source]
        iou = (moved & mask).sum() / (moved | mask).sum()
        if abs(iou - level) < least:
            best, least = moved, abs(iou - level)
        if iou < level:
            break
    return best


# --- degenerate policies


def _nothing(scene: Scene) -> np.ndarray:
    return np.zeros_like(scene.target.mask)


def _inside(scene: Scene, boxes: np.ndarray) -> np.ndarray:
    """Return the mask of boxes; in a volume on all slices, since a segmenter finds no end of an absent lesion."""
    mask = _nothing(scene)
    for x1, y1, x2, y2 in np.rint(boxes).astype(int):
        mask[..., y1:y2, x1:x2] = True
    return mask


def _and_inside(scene: Scene, said: Said, boxes: np.ndarray) -> np.ndarray | None:
    """Return the mask for more boxes: a volume's also holds their inside; an image's does not come from boxes."""
    if not isinstance(scene.target, VolumeTarget) or said.mask is None:
        return said.mask
    return said.mask | _inside(scene, boxes)


def _located(scene: Scene, shares: Sequence[Sequence[float]], confidence: float = 1.0) -> Said:
    """Return boxes given in shares of the image, a point in the centre of each, on the middle slice of a volume."""
    target = scene.target
    boxes = np.array(shares, dtype=np.float64) * [target.width, target.height, target.width, target.height]
    k = target.depth // 2 if isinstance(target, VolumeTarget) else None
    return Said(boxes, (boxes[:, :2] + boxes[:, 2:]) / 2, (confidence,) * len(boxes), k, _inside(scene, boxes))


def _fixed(shares: Sequence[Sequence[float]], reasoning: str = REASONING) -> Callable[[Scene, Writer], Shown]:
    def shows(scene: Scene, writer: Writer) -> Shown:
        said = _located(scene, shares)
        return writer.text(said, reasoning), said.mask

    return shows


def _same_text(text: str) -> Callable[[Scene, Writer], Shown]:
    return lambda scene, writer: (text.replace("{token}", writer.completion_format.seg_token), None)


def _token_only(scene: Scene, writer: Writer) -> Shown | None:
    """Write no word and no box; the mask is a guess."""
    token = writer.completion_format.seg_token
    return (format_completion(REASONING, token), _located(scene, [CENTRE]).mask) if token else None


def _noise(scene: Scene, writer: Writer) -> Shown:
    rng = np.random.default_rng((scene.seed, scene.number, 1))
    corners = np.sort(rng.uniform(0, 1, (rng.integers(1, 4), 2, 2)), axis=1).reshape(-1, 4)
    said = _located(scene, corners.tolist(), 0.5)
    if isinstance(scene.target, VolumeTarget):
        said = replace(said, slice_index=int(rng.integers(0, scene.target.depth)))
    return writer.text(said), said.mask


def _first_slice(scene: Scene, writer: Writer) -> Shown | None:
    if not isinstance(scene.target, VolumeTarget):
        return None
    said = _located(scene, [WHOLE])
    return writer.text(replace(said, slice_index=0)), said.mask


def _only_a_slice(scene: Scene, writer: Writer) -> Shown | None:
    if not isinstance(scene.target, VolumeTarget):
        return None
    return writer.text(Said(slice_index=scene.target.depth // 2)), None


def _unsure_grid(scene: Scene, writer: Writer) -> Shown | None:
    """Cover everything without risk: boxes with confidence 0."""
    if writer.completion_format.answer_format == "text" or isinstance(scene.target, VolumeTarget):
        return None
    said = _located(scene, GRID, 0.0)
    return writer.text(said), said.mask


def _points(scene: Scene) -> np.ndarray:
    x, y = np.meshgrid(*[(np.arange(FLOOD) + 0.5) / FLOOD] * 2)
    return np.stack([x.ravel() * scene.target.width, y.ravel() * scene.target.height], axis=1)


def _point_flood(scene: Scene, writer: Writer) -> Shown | None:
    if writer.completion_format.answer_format == "text":
        return None
    return writer.text(Said(points=_points(scene), slice_index=_located(scene, [WHOLE]).slice_index)), None


def _unread(scene: Scene, writer: Writer) -> Shown:
    """Name a box in a notation that is not read; the mask is empty, as for an answer that finds nothing."""
    box = writer.frame.from_original(_located(scene, [CENTRE]).boxes)[0].tolist()
    if writer.completion_format.answer_format == "json":
        said = json.dumps({"bbox_2d_list": [], "box": box})
    else:
        said = f"The lesion is located at {UNREAD[1].format(*box)}."
    return format_completion(REASONING, said + writer.completion_format.seg_token), None


def _two_guesses(scene: Scene, writer: Writer) -> Shown:
    """Write two answers: a box for scenes with a lesion, and an empty one for those without."""
    said = _located(scene, [CENTRE])
    answers = "".join(f"<answer>{writer.answer(guess)}</answer>" for guess in (said, Said()))
    return f"<think>{REASONING}</think>{answers}", said.mask


def _guess_in_reasoning(scene: Scene, writer: Writer) -> Shown:
    guess = writer.answer(_located(scene, [CENTRE])).removesuffix(writer.completion_format.seg_token)
    return writer.text(Said(), f"{REASONING} {guess}"), None


# --- tricks


def _trick(grade: str, play: Callable[[Scene, Writer, Said], Shown | None]) -> Callable[[Scene, Writer], Shown | None]:
    return lambda scene, writer: play(scene, writer, _graded(scene, grade))


def _said_twice(scene: Scene, writer: Writer, said: Said) -> Shown:
    block = f"<answer>{writer.answer(said)}</answer>"
    return f"<think>{REASONING}</think>{block}{block}", said.mask


def _and_more_text(scene: Scene, writer: Writer, said: Said) -> Shown:
    return f"{writer.text(said)} I am sure of it.", said.mask


def _without_token(scene: Scene, writer: Writer, said: Said) -> Shown | None:
    token = writer.completion_format.seg_token
    return (writer.text(said).replace(token, ""), said.mask) if token else None


def _boxes_repeated(times: int, step: float = 0.0) -> Callable[[Scene, Writer, Said], Shown]:
    """Repeat every box several times, each copy moved by a step in pixels from the one before."""

    def play(scene: Scene, writer: Writer, said: Said) -> Shown:
        moved = np.repeat(np.arange(times), len(said.boxes))[:, None] * step
        boxes, points = np.tile(said.boxes, (times, 1)) + moved, np.tile(said.points, (times, 1)) + moved
        return writer.text(replace(said, boxes=boxes, points=points, scores=said.scores * times)), said.mask

    return play


def _and_around(scene: Scene, writer: Writer, said: Said) -> Shown:
    """Surround every box with more boxes, one of which fits better."""
    edges = said.boxes[:, 2:] - said.boxes[:, :2]
    moves = [edges * [x, y] for y in AROUND for x in AROUND if x or y]
    boxes = [said.boxes, *(said.boxes + np.hstack([move, move]) for move in moves)]
    size = [scene.target.width, scene.target.height]
    more = replace(said, boxes=np.clip(np.concatenate(boxes), 0, size * 2), scores=said.scores * len(boxes))
    return writer.text(more), _and_inside(scene, said, more.boxes)


def _and_a_grid(scene: Scene, writer: Writer, said: Said) -> Shown:
    grid = _located(scene, GRID, 0.0)
    more = Said(
        np.concatenate([said.boxes, grid.boxes]),
        np.concatenate([said.points, grid.points]),
        said.scores + grid.scores,
        grid.slice_index if said.slice_index is None else said.slice_index,
    )
    return writer.text(more), _and_inside(scene, said, more.boxes)


def _and_points(scene: Scene, writer: Writer, said: Said) -> Shown | None:
    if writer.completion_format.answer_format == "text":
        return None
    return writer.text(replace(said, points=np.concatenate([said.points, _points(scene)]))), said.mask


def _in_reasoning_only(scene: Scene, writer: Writer, said: Said) -> Shown:
    hidden = writer.answer(said).removesuffix(writer.completion_format.seg_token)
    return writer.text(Said(), f"{REASONING} {hidden}"), None


NO_LESION = "always 'no lesion'"
UNREAD_BOX = "box in an unread notation"
POLICIES = (
    *(Policy(grade, "honest", _honest(grade)) for grade in GRADES),
    Policy(NO_LESION, "degenerate", lambda scene, writer: (writer.text(Said()), None)),
    Policy("empty text", "degenerate", _same_text("")),
    Policy("format only", "degenerate", _same_text("<think>...</think><answer>...{token}</answer>")),
    Policy("reasoning only", "degenerate", _same_text(f"<think>{REASONING}</think>")),
    Policy("token only", "degenerate", _token_only),
    Policy("copy of the prompt", "degenerate", _same_text(PROMPT)),
    Policy("whole image", "degenerate", _fixed([WHOLE])),
    Policy("centre", "degenerate", _fixed([CENTRE])),
    Policy("centre, ten times", "degenerate", _fixed([CENTRE] * MANY)),
    Policy("grid of boxes", "degenerate", _fixed(GRID)),
    Policy("net of boxes", "degenerate", _fixed(NET)),
    Policy("grid, not sure", "degenerate", _unsure_grid),
    Policy("noise", "degenerate", _noise),
    Policy("point flood", "degenerate", _point_flood),
    Policy(UNREAD_BOX, "degenerate", _unread),
    Policy("two guesses", "degenerate", _two_guesses),
    Policy("guess in the reasoning", "degenerate", _guess_in_reasoning),
    Policy("long repetition", "degenerate", _fixed([WHOLE], "The lesion is large. " * 300)),
    Policy("first slice", "degenerate", _first_slice),
    Policy("only a slice", "degenerate", _only_a_slice),
    Policy("good, answered twice", "trick", _trick("good", _said_twice), "good"),
    Policy("good, and more text", "trick", _trick("good", _and_more_text), "good"),
    Policy("good, without token", "trick", _trick("good", _without_token), "good"),
    Policy("good, every box twice", "trick", _trick("good", _boxes_repeated(2)), "good"),
    Policy("good, every box nearly twice", "trick", _trick("good", _boxes_repeated(2, 1.0)), "good"),
    Policy("fair, every box ten times", "trick", _trick("fair", _boxes_repeated(MANY)), "fair"),
    Policy("poor, and boxes around", "trick", _trick("poor", _and_around), "poor"),
    Policy("good, and a grid", "trick", _trick("good", _and_a_grid), "good"),
    Policy("good, and a point flood", "trick", _trick("good", _and_points), "good"),
    Policy("good, in the reasoning only", "trick", _trick("good", _in_reasoning_only), NO_LESION),
)
"""All policies, honest ones first, from the best to the worst."""
