"""Texts for rewards: right answers in the grammar of `segrl.predictions.parsing`, broken ones, and long hostile ones.

`check_reward`, the strategies and the audit give them to rewards; nothing here needs hypothesis.
"""

# N boxes, P points

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import format_answer, format_completion

__all__ = ["HOSTILE", "NOTATIONS", "PROMPT", "UNREAD", "broken_completions", "write_answer", "write_completion"]

PROMPT = (
    "Segment the lesion in this image. Write <think> reasoning </think><answer>The lesion is located at "
    "[x1, y1, x2, y2].<seg></answer>"
)
REASONING = "One region differs from the tissue around it."
Notation = Literal["brackets", "corners", "tokens", "fence"]
NOTATIONS: dict[str, tuple[Notation, ...]] = {"text": ("brackets", "corners", "tokens"), "json": ("brackets", "fence")}
"""Notations that are read, by answer format: Qwen's corners, those between its tokens, and JSON in a code fence."""
_PLACES = {
    "brackets": "[{}, {}, {}, {}]",
    "corners": "({},{}),({},{})",
    "tokens": "<|object_ref_start|>it<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>",
}
UNREAD = (
    "({}, {}, {}, {})",
    "{{{}, {}, {}, {}}}",
    "{}, {}, {}, {}",
    "x1={}, y1={}, x2={}, y2={}",
    "xmin: {}, ymin: {}, xmax: {}, ymax: {}",
    "<box>{} {} {} {}</box>",
    "<|box_start|>{},{},{},{}<|box_end|>",
    "<loc{}><loc{}><loc{}><loc{}>",
    "({}, {}) to ({}, {})",
    "left: {}, top: {}, right: {}, bottom: {}",
)
"""Notations of a box that are not read and make an answer in words malformed, as templates of x1, y1, x2, y2."""


def write_answer(
    boxes_px: ArrayLike,
    frame: Frame,
    completion_format: CompletionFormat | None = None,
    *,
    points_px: ArrayLike = (),
    scores: Sequence[float] | None = None,
    slice_index: int | None = None,
    lesion: str = "lesion",
    rounding: bool = True,
    notation: Notation = "brackets",
) -> str:
    """Write what an answer block holds, segmentation token included.

    Args:
        boxes_px: (N, 4) boxes in original pixels.
        frame: The frame in which the model writes.
        completion_format: Its `answer_format` and `seg_token` are used; `CompletionFormat()` by default.
        points_px: (P, 2) points in original pixels. Like confidences and slice, only JSON can hold them: an answer in
            words leaves them out.
        scores: N confidences in [0, 1].
        slice_index: Slice that the answer names, counted from 0.
        lesion: Name used in words.
        rounding: Round to whole numbers of the frame, as models write them.
        notation: One of `NOTATIONS` of the answer format.

    Returns:
        The answer, which `segrl.predictions.parse_completion` reads back.

    Example:
        >>> frame = Frame("original_px", (64, 64))
        >>> write_answer([[1, 2, 9, 8]], frame, CompletionFormat(answer_format="json"), points_px=[[4, 5]])
        '[{"bbox_2d": [1, 2, 9, 8], "point_2d": [4, 5]}]<seg>'
    """
    completion_format = completion_format or CompletionFormat()
    if completion_format.answer_format == "text":
        if rounding and notation == "brackets":
            return format_answer(lesion, boxes_px, frame, completion_format.seg_token)
        boxes = [_plain(box) for box in frame.from_original(boxes_px, rounding=rounding)]
        places = ", ".join(_PLACES[notation].format(*map(json.dumps, box)) for box in boxes)
        text = f"The {lesion} is located at {places}." if places else f"No {lesion} is visible."
        return text + completion_format.seg_token
    corners = np.asarray(points_px, dtype=np.float64).reshape(-1, 2)
    boxes = [_plain(box) for box in frame.from_original(boxes_px, rounding=rounding)]
    points = [_plain(box[:2]) for box in frame.from_original(np.hstack([corners, corners]), rounding=rounding)]
    value: Any
    if slice_index is not None:
        value = {"slice": slice_index + 1, "bbox_2d_list": boxes}
        if points:
            value = [value, *({"point_2d": point} for point in points)]
    else:
        value = []
        for box, point, score in zip_longest(boxes, points, scores if scores is not None else ()):
            item = {"bbox_2d": box, "point_2d": point, "score": score}
            value.append({key: found for key, found in item.items() if found is not None})
    text = json.dumps(value)
    return (f"```json\n{text}\n```" if notation == "fence" else text) + completion_format.seg_token


def write_completion(
    boxes_px: ArrayLike,
    frame: Frame,
    completion_format: CompletionFormat | None = None,
    *,
    reasoning: str = REASONING,
    **answer: Any,
) -> str:
    """Write a valid completion.

    Args:
        boxes_px: (N, 4) boxes in original pixels.
        frame: The frame in which the model writes.
        completion_format: How the completion will be parsed.
        reasoning: Text of the reasoning block.
        **answer: Keyword arguments of `write_answer`.

    Example:
        >>> write_completion([], Frame("original_px", (64, 64)), reasoning="Nothing stands out.")
        '<think>Nothing stands out.</think><answer>No lesion is visible.<seg></answer>'
    """
    return format_completion(reasoning, write_answer(boxes_px, frame, completion_format, **answer))


def broken_completions(
    reasoning: str, answer: str, completion_format: CompletionFormat | None = None
) -> dict[str, str]:
    """Return invalid texts with this reasoning and answer that published systems have accepted.

    Args:
        reasoning: Text of the reasoning block.
        answer: Text of the answer block, with the segmentation token at its end, see `write_answer`.
        completion_format: How the completion will be parsed; a text that is valid in it is left out.

    Returns:
        Texts by the name of the trap.

    Example:
        >>> broken_completions("A spot.", "No cyst is visible.<seg>")["two answers"]
        '<think>A spot.</think><answer>No cyst is visible.<seg></answer><answer>No cyst is visible.<seg></answer>'
    """
    completion_format = completion_format or CompletionFormat()
    token = completion_format.seg_token
    said = answer.removesuffix(token) if token else answer
    think, block = f"<think>{reasoning}</think>", f"<answer>{answer}</answer>"
    texts = {
        "trailing text": f"{think}{block} I hope this helps.",
        "leading text": f"Sure! {think}{block}",
        "text between": f"{think} So: {block}",
        "two answers": f"{think}{block}{block}",
        "two reasonings": f"{think}{think}{block}",
        "answer first": f"{block}{think}",
        "answer inside the reasoning": f"<think>{reasoning}{block}</think>",
        "nested answer": f"{think}<answer>{block}</answer>",
        "reasoning left open": f"<think>{reasoning}{block}",
        "answer left open": f"{think}<answer>{answer}",
        "no tags": f"{reasoning} {answer}",
        "only reasoning": think,
        "blank answer": f"{think}<answer> \n</answer>",
        "invisible answer": f"{think}<answer>\u200b\u2060\u115f</answer>",
        "empty": "",
        "blank": " \n\t",
        "capital tags": f"<THINK>{reasoning}</THINK><ANSWER>{answer}</ANSWER>",
        "zero-width space in a tag": f"{think}<ans\u200bwer>{answer}</ans\u200bwer>",
        "prompt copied": PROMPT,
        "prompt before the answer": f"{PROMPT}\n{think}{block}",
    }
    if token:
        texts["token twice"] = f"{think}<answer>{answer}{token}</answer>"
        texts["token in the reasoning"] = f"<think>{reasoning}{token}</think>{block}"
        texts["token behind the answer"] = f"{think}<answer>{said}</answer>{token}"
    if token and completion_format.require_seg:
        texts["no token"] = f"{think}<answer>{said or 'None.'}</answer>"
        texts["token in the reasoning only"] = f"<think>{reasoning}{token}</think><answer>{said or 'None.'}</answer>"
    if completion_format.require_reasoning:
        texts["no reasoning"] = block
        texts["blank reasoning"] = f"<think> </think>{block}"
        texts["invisible reasoning"] = f"<think>\u200b\x00\u3164\ufe0f\u00ad\u0301</think>{block}"
    for name, content in _BROKEN_ANSWERS[completion_format.answer_format].items():
        texts[name] = f"{think}<answer>{content}{token}</answer>"
    return texts


_BROKEN_ANSWERS = {
    "text": {
        "box with x2 < x1": "At [9, 1, 2, 8].",
        "box of three numbers": "At [1, 2, 9].",
        "box of five numbers": "At [1, 2, 9, 8, 7].",
        "box of letters": "At [x1, y1, x2, y2].",
        "NaN in a box": "At [NaN, 2, 9, 8].",
        "infinity in a box": "At [1, 2, Infinity, 8].",
        "huge number in a box": "At [1, 2, 1e309, 8].",
        "more digits than a number has": f"At [1, 2, {'9' * 400}, 8].",
        "nested brackets": "At [[1, 2], [9, 8]].",
        "bracket left open": "At [1, 2, 9, 8.",
        "bracket never opened": "At 1, 2, 9, 8].",
        "good and bad box": "At [1, 2, 9, 8], [9, 8, 1, 2].",
        "full-width commas": "At [1，2，9，8].",
        "full-width brackets": "At ［1, 2, 9, 8］.",
        "good box and one in words": "At [1, 2, 9, 8] and x1=3, y1=4, x2=5, y2=6.",
        "three corners": "At (1,2),(9,8),(3,4).",
        "a point": "At (5, 6).",
        **{f"unread box {n}": f"At {template.format(1, 2, 9, 8)}." for n, template in enumerate(UNREAD)},
    },
    "json": {
        "a sentence": "The lesion is located at [1, 2, 9, 8].",
        "code fence and a sentence": '```json\n[{"bbox_2d": [1, 2, 9, 8]}]\n```\nThat is all.',
        "two code fences": '```json\n[{"bbox_2d": [1, 2, 9, 8]}]\n```\n```json\n[]\n```',
        "code fence left open": '```json\n[{"bbox_2d": [1, 2, 9, 8]}]',
        "box under another key": '{"bbox_2d_list": [], "box": [1, 2, 9, 8]}',
        "corners under other keys": '{"bbox_2d_list": [], "x1": 1, "y1": 2, "x2": 9, "y2": 8}',
        "box in a label": '{"bbox_2d_list": [], "label": "lesion at (1,2),(9,8)"}',
        "box as a text": '[{"bbox_2d": "[1, 2, 9, 8]"}]',
        "two JSON values": '[{"bbox_2d": [1, 2, 9, 8]}] [{"bbox_2d": [3, 4, 5, 6]}]',
        "JSON cut off": '[{"bbox_2d": [1, 2, 9',
        "trailing comma": '[{"bbox_2d": [1, 2, 9, 8]},]',
        "single quotes": "[{'bbox_2d': [1, 2, 9, 8]}]",
        "missing key": '[{"bbox_2d": [1, 2, 9, 8]}, {"label": "lesion"}]',
        "key twice": '[{"bbox_2d": [1, 2, 9, 8], "bbox_2d": [3, 4, 5, 6]}]',
        "box with x2 < x1": '[{"bbox_2d": [9, 1, 2, 8]}]',
        "box of three numbers": '[{"bbox_2d": [1, 2, 9]}]',
        "numbers as texts": '[{"bbox_2d": ["1", "2", "9", "8"]}]',
        "truth values as numbers": '[{"bbox_2d": [false, false, true, true]}]',
        "NaN in a box": '[{"bbox_2d": [NaN, 2, 9, 8]}]',
        "infinity in a box": '[{"bbox_2d": [1, 2, Infinity, 8]}]',
        "huge number in a box": '[{"bbox_2d": [1, 2, 1e309, 8]}]',
        "more digits than a number has": f'[{{"bbox_2d": [1, 2, {"9" * 400}, 8]}}]',
        "confidence above 1": '[{"bbox_2d": [1, 2, 9, 8], "score": 1.5}]',
        "confidence for one of two": '[{"bbox_2d": [1, 2, 9, 8], "score": 0.5}, {"bbox_2d": [3, 4, 5, 6]}]',
        "two slices": '[{"slice": 1, "bbox_2d_list": []}, {"slice": 2, "bbox_2d_list": []}]',
        "slice 0": '{"slice": 0, "bbox_2d_list": []}',
        "null": "null",
        "a number": "7",
        "nested lists": "[[[[1, 2, 9, 8]]]]",
        "deeply nested lists": "[" * 3000 + "]" * 3000,
    },
}


def _boxes(size: int, form: CompletionFormat) -> str:
    in_json = form.answer_format == "json"
    count = size // (30 if in_json else 18)
    corners = [[n % 500, n // 500 % 500, n % 500 + 7, n // 500 % 500 + 7] for n in range(count)]
    text = json.dumps([{"bbox_2d": box} for box in corners] if in_json else corners)
    return format_completion(REASONING, (text if in_json else text[1:-1]) + form.seg_token)


def _valid(reasoning: str, completion_format: CompletionFormat) -> str:
    return write_completion([], Frame("original_px", (8, 8)), completion_format, reasoning=reasoning)


HOSTILE: dict[str, Callable[[int, CompletionFormat], str]] = {
    "many boxes": _boxes,
    "long reasoning": lambda size, form: _valid(" ".join(map(str, range(size // 6))), form),
    "one sentence again and again": lambda size, form: _valid("Look again. " * (size // 12), form),
    "full stops": lambda size, form: _valid("." * size, form),
    "marks and emoji": lambda size, form: _valid("\u202ee\u0301\U0001f9ff\u200b" * (size // 5), form),
    "spaces": lambda size, form: " " * size,
    "angle brackets": lambda size, form: "<" * size,
    "open tags": lambda size, form: "<think><answer>" * (size // 15),
    "answers": lambda size, form: "<answer>[1, 2, 9, 8]</answer>" * (size // 29),
    "tokens": lambda size, form: f"<answer>{(form.seg_token or '<seg>') * (size // 5)}</answer>",
    "open square brackets": lambda size, form: f"<think>a</think><answer>{'[' * size}</answer>",
    "nested objects": lambda size, form: '<think>a</think><answer>{"a":' + '{"a":' * (size // 5) + "</answer>",
    "digits and commas": lambda size, form: f"<think>a</think><answer>[{'1,' * (size // 2)}</answer>",
    "points": lambda size, form: f"<think>a</think><answer>{'(1,2),' * (size // 6)}(</answer>",
    "numbers": lambda size, form: f"<think>a</think><answer>{'1 ' * (size // 2)}mm</answer>",
    "end tokens": lambda size, form: "<|im_end|>\n" * (size // 11) + ".",
    "one number": lambda size, form: f"<think>a</think><answer>[{'1' * size}]</answer>",
    "quotes and backslashes": lambda size, form: '<think>a</think><answer>["' + '\\"' * (size // 2) + "</answer>",
}
"""Texts of about `size` characters, by kind: ``HOSTILE[kind](size, completion_format)``. The first five are valid."""


def _plain(numbers: np.ndarray) -> list[int | float]:
    """Return numbers for JSON, whole ones without a decimal point."""
    return [int(number) if number == int(number) else float(number) for number in numbers.tolist()]
