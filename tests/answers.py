"""Answers in JSON, truths and hostile texts for the tests of rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from segrl.predictions import Frame, Prediction, Target, format_completion, parse_completion

WIDTH, HEIGHT = 40, 32
FRAME = Frame("original_px", (WIDTH, HEIGHT))
LEFT, RIGHT = [4, 4, 16, 14], [22, 18, 34, 28]
FAR = [36, 0, 40, 3]
MEGABYTE = 1_000_000


def mask_of(*boxes: Sequence[int]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def target_of(*boxes: Sequence[int]) -> Target:
    """A truth with exactly these boxes, also where they touch."""
    return Target(mask_of(*boxes), np.array(boxes, dtype=np.float64).reshape(-1, 4), name="scan_7.png")


def read(text: str, **options: Any) -> Prediction:
    return parse_completion(text, FRAME, **{"require_seg": False, "answer_format": "json", **options})


def says(
    *boxes: Sequence[float],
    points: Sequence[Sequence[float]] = (),
    scores: Sequence[float] = (),
    reasoning: str = "Dark.",
) -> Prediction:
    """The parsed answer with these boxes; points and confidences are paired with them in order."""
    objects: list[dict[str, Any]] = [{} for _ in range(max(len(boxes), len(points)))]
    for key, values in (("bbox_2d", list(map(list, boxes))), ("point_2d", list(map(list, points))), ("score", scores)):
        for item, value in zip(objects, values, strict=False):
            item[key] = value
    prediction = read(format_completion(reasoning, json.dumps(objects)))
    assert prediction.valid
    return prediction


def box_lists(unique: bool = False, max_size: int = 4) -> st.SearchStrategy[list[list[int]]]:
    @st.composite
    def box(draw: Callable[..., Any]) -> list[int]:
        x1, y1 = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
        return [x1, y1, draw(st.integers(x1 + 1, WIDTH)), draw(st.integers(y1 + 1, HEIGHT))]

    return st.lists(box(), max_size=max_size, unique_by=tuple if unique else None)


def slow_iou(a: Sequence[int], b: Sequence[int]) -> float:
    """IoU of two boxes from sets of pixels."""

    def cover(box: Sequence[int]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    return len(cover(a) & cover(b)) / len(cover(a) | cover(b))


def in_answer(content: str) -> str:
    return f"<think>Dark.</think><answer>{content}</answer>"


def hostile_texts(size: int) -> dict[str, str]:
    """Texts of about this size on which a careless pattern or parser is slow or fails."""
    units = {
        "letters": "a",
        "dots": ".",
        "exclamations": "!?",
        "spaces": " ",
        "line breaks": "\n",
        "words": "no lesion ",
        "brackets": "[",
        "objects": '{"a":',
        "open tags": "<think>",
        "closed tags": "</answer>",
        "angles": "<",
        "escapes": "\\",
        "quotes": '"',
        "nulls": "\0",
        "digits": "9",
        "pairs": "<think>a</think><answer>[]</answer>",
        "boxes": '{"bbox_2d":[1,2,3,4]},',
    }
    texts = {name: unit * (size // len(unit)) for name, unit in units.items()}
    many = ",".join(json.dumps({"bbox_2d": [n % 40, n % 32, 40, 32], "n": n}) for n in range(size // 36))
    return {
        **texts,
        **{f"{name} in the answer": in_answer(text) for name, text in texts.items()},
        "good JSON with many objects": in_answer(f"[{many}]"),
        "long reasoning": format_completion("".join(f"word{n % 7919} " for n in range(size // 8)), "[]"),
    }
