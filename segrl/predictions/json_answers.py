"""Answers written as JSON: boxes, points, confidences and a key slice. A bad value never hides the good ones.

The schema: one object, or a list of objects, each with any of these keys::

    {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y], "score": 0.9}
    {"slice": 12, "bbox_2d_list": [[x1, y1, x2, y2], ...]}

Other keys, such as "label", are ignored unless they hold coordinates: those are malformed, since an answer must not say
where something is in a way that is not read.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from segrl.predictions.coordinates import names_coordinates

__all__ = ["Answer", "read_json_answer"]

BOX_KEYS = frozenset({"bbox_2d", "bbox"})
POINT_KEYS = frozenset({"point_2d", "point", "points_1", "points_2"})
SCORE_KEYS = frozenset({"score", "confidence"})
BOX_LIST_KEY, SLICE_KEY = "bbox_2d_list", "slice"
KNOWN_KEYS = BOX_KEYS | POINT_KEYS | SCORE_KEYS | {BOX_LIST_KEY, SLICE_KEY}
# Names under which a number, or two of them, are a place.
_AXIS_KEY = re.compile(r"(?i)[xy](?:[-_]?(?:\d|min|max|c(?:ent(?:er|re))?))?|c[xy]|(?:min|max)[-_]?[xy]|top|bottom")
_PLACE_KEY = re.compile(r"(?i)box|bound|coord|corner|cent(?:er|re)|point|rect|poly|contour|locat|posit|region")
_FENCE = "```"
_LANGUAGE = re.compile(r"[\w+-]{0,20}")  # of a fence, such as json


@dataclass
class Answer:
    """The content of an answer, in the model's frame.

    Attributes:
        boxes: xyxy boxes in order.
        points: (x, y) points in order.
        scores: One confidence in [0, 1] per box, or empty.
        slice_index: Index of the named slice, counted from 0, or None.
        objects: The objects of a JSON answer in order; None replaces one that is not well formed.
        well_formed: Whether the whole answer follows its format.

    Example:
        >>> Answer(boxes=[[1, 2, 9, 8]])
        Answer(boxes=[[1, 2, 9, 8]], points=[], scores=[], slice_index=None, objects=[], well_formed=True)
    """

    boxes: list[list[float]] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    slice_index: int | None = None
    objects: list[dict[str, Any] | None] = field(default_factory=list)
    well_formed: bool = True


def read_json_answer(text: str, largest: float) -> Answer:
    """Read an answer. Never raises, and takes linear time.

    An object is bad if it holds a key twice, none of the known keys, a value that the schema does not allow, both a box
    and a list of boxes, or coordinates under another key. Bad values are dropped and the others are kept.

    Args:
        text: The answer without the segmentation token; one code fence around the whole of it is taken off. `[]` and
            `{}` are well formed: nothing was found.
        largest: Coordinates beyond this are bad.

    Returns:
        The answer. Confidences are kept only if every box has one, and a slice only if all objects that name one agree.

    Example:
        >>> answer = read_json_answer('[{"bbox_2d": [1, 2, 9, 8], "score": 0.5}, {"bbox_2d": [3]}]', 1e6)
        >>> answer.boxes, answer.scores, answer.well_formed
        ([[1.0, 2.0, 9.0, 8.0]], [0.5], False)
    """
    answer = Answer()
    try:
        value = json.loads(_unfenced(text), object_pairs_hook=_object)
    except (ValueError, RecursionError):
        answer.well_formed = False
        return answer
    if value == {}:
        return answer
    slices: set[int] = set()
    for item in value if isinstance(value, list) else [value]:
        good = isinstance(item, dict) and _read_object(item, answer, slices, largest)
        answer.objects.append(item if isinstance(item, dict) and good else None)
        answer.well_formed = answer.well_formed and good
    if answer.scores and len(answer.scores) != len(answer.boxes):
        answer.scores, answer.well_formed = [], False
    if len(slices) > 1:
        answer.well_formed = False
    elif slices:
        answer.slice_index = slices.pop()
    return answer


def _unfenced(text: str) -> str:
    """Return the inside of a code fence around a whole text, or else the text."""
    body = text.strip()
    if not body.startswith(_FENCE) or not body.endswith(_FENCE) or len(body) < 2 * len(_FENCE):
        return text
    inside = body[len(_FENCE) : -len(_FENCE)]
    language = _LANGUAGE.match(inside)
    return inside[language.end() :] if language else inside


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    found = dict(pairs)
    return found if len(found) == len(pairs) else None  # a key that occurs twice is ambiguous


def _read_object(item: dict[str, Any], answer: Answer, slices: set[int], largest: float) -> bool:
    boxes = [value for key, value in item.items() if key in BOX_KEYS]
    listed = item.get(BOX_LIST_KEY, [])
    points = [value for key, value in item.items() if key in POINT_KEYS]
    scores = [value for key, value in item.items() if key in SCORE_KEYS]
    known = bool(boxes or points) or BOX_LIST_KEY in item or SLICE_KEY in item
    good = known and len(boxes) <= 1 and len(scores) <= len(boxes) and isinstance(listed, list)
    good = good and not (boxes and BOX_LIST_KEY in item)
    read_boxes = [_numbers(box, 4, largest) for box in [*boxes[:1], *(listed if isinstance(listed, list) else [])]]
    read_points = [_numbers(point, 2, largest) for point in points]
    read_scores = [_number(score, 1.0) for score in scores[:1]]
    answer.boxes += [box for box in read_boxes if box is not None]
    answer.points += [point for point in read_points if point is not None]
    if boxes and read_boxes[0] is not None:
        answer.scores += [score for score in read_scores if score is not None and score >= 0]
    if SLICE_KEY in item:
        index = item[SLICE_KEY]
        if isinstance(index, int) and not isinstance(index, bool) and 1 <= index <= largest:
            slices.add(index - 1)
        else:
            good = False
    good = good and not _hides_a_place(item)
    bad_scores = any(score is None or score < 0 for score in read_scores)
    return good and None not in read_boxes and None not in read_points and not bad_scores


def _hides_a_place(item: dict[str, Any]) -> bool:
    """Return whether keys that the schema does not know hold coordinates."""
    for key, value in item.items():
        if key in KNOWN_KEYS:
            continue
        texts, numbers, nested_keys = _leaves(value)
        is_place = bool(_PLACE_KEY.search(key)) and not isinstance(value, int | float)
        if (
            numbers >= (2 if is_place else 4)
            or (numbers and any(_AXIS_KEY.fullmatch(name) for name in (key, *nested_keys)))
            or any(map(names_coordinates, texts))
        ):
            return True
    return False


def _leaves(value: Any) -> tuple[list[str], int, list[str]]:
    """Return the texts, the number of numbers, and the keys inside a value, without recursion: JSON may be deep."""
    texts, keys, numbers, left = [], [], 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            keys += item
            left += item.values()
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str):
            texts.append(item)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            numbers += 1
    return texts, numbers, keys


def _numbers(value: Any, count: int, largest: float) -> list[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    numbers = [_number(item, largest) for item in value]
    if any(number is None for number in numbers):
        return None
    found = [number for number in numbers if number is not None]
    return None if count == 4 and (found[0] > found[2] or found[1] > found[3]) else found


def _number(value: Any, largest: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= largest and math.isfinite(value) else None
