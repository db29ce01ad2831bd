"""Parse the text of a completion to a `Prediction`, and write it. The parser never raises and takes linear time.

The grammar, over the whole stripped text::

    <think>reasoning</think> <answer>The cyst is located at [x1, y1, x2, y2], [x1, y1, x2, y2].<seg></answer>

with boxes in a notation of `segrl.predictions.text_answers`, or, with `answer_format="json"`, an answer in the schema
of `segrl.predictions.json_answers`. End tokens behind the text are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import DataError
from segrl.predictions.characters import is_blank, strip_end_tokens
from segrl.predictions.coordinates import names_coordinates
from segrl.predictions.frames import Frame
from segrl.predictions.json_answers import read_json_answer
from segrl.predictions.prediction import Prediction, Status
from segrl.predictions.text_answers import MAX_COORDINATE, read_text_answer

__all__ = [
    "SEG_TOKEN",
    "TAGS",
    "AnswerFormat",
    "completion_text",
    "format_answer",
    "format_completion",
    "parse_completion",
]

AnswerFormat = Literal["text", "json"]
AnswerForm = Literal["sentence", "mask", "json"]
SEG_TOKEN = "<seg>"
_NO_NUMBER = "\ufffc"  # stands for the segmentation token
_TAG = re.compile(r"<(/?)(think|answer)>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def completion_text(completion: Any) -> str:
    """Return the text that the model wrote in a completion, as TRL passes it to rewards.

    Args:
        completion: A string, or messages. The contents of assistant messages are joined in order; other messages, such
            as those of tools, are left out.

    Raises:
        TypeError: Neither a string nor a sequence of messages.

    Example:
        >>> completion_text([{"role": "tool", "content": "ok"}, {"role": "assistant", "content": "At [1, 2, 9, 8]."}])
        'At [1, 2, 9, 8].'
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence):
        raise TypeError(f"a completion is a {type(completion).__name__}; expected a text or a list of messages")
    contents = [message["content"] for message in completion if message.get("role", "assistant") == "assistant"]
    parts = [[content] if isinstance(content, str) else content or [] for content in contents]
    return "".join(part if isinstance(part, str) else part.get("text") or "" for block in parts for part in block)


def parse_completion(
    text: str,
    frame: Frame,
    *,
    seg_token: str = SEG_TOKEN,
    require_seg: bool = True,
    require_reasoning: bool = True,
    require_tags: bool = True,
    answer_format: AnswerFormat = "text",
    end_tokens: Collection[str] = (),
) -> Prediction:
    """Parse a completion (without its prompt).

    Boxes are read only from the one answer block: every innermost bracket must hold four numbers with x1 <= x2 and
    y1 <= y2 (JSON such as ``[{"bbox_2d": [1, 2, 3, 4]}]`` is fine, an empty bracket is no box), and so must Qwen's
    ``(x1,y1),(x2,y2)``. Bad boxes are dropped and make the status MALFORMED_BOXES, and so do coordinates in any other
    notation, see `segrl.predictions.text_answers`; the good ones are converted to original pixels and clipped to the
    image, where a box outside of it keeps zero area. Duplicates are kept, so that a reward can penalise them. No box at
    all is valid.

    The status is the first of these that applies. A block is blank if it shows nothing: spaces and invisible characters
    are no text.

    1. NO_ANSWER: no closed, non-blank answer block outside of the reasoning.
    2. NO_REASONING: no closed, non-blank reasoning block (with `require_reasoning`).
    3. EXTRA_TEXT: text outside the blocks, blocks repeated, nested or swapped, or the segmentation token more than once
       in the whole text. With several answer blocks none is read: `answer` is None and `boxes` is empty.
    4. MALFORMED_BOXES, or MALFORMED_JSON with `answer_format="json"`: then the answer, up to a segmentation token at
       its end, must be JSON in the schema of `segrl.predictions.json_answers`, which also holds points, confidences
       and a slice.
    5. NO_SEG_TOKEN: no segmentation token in the answer (with `require_seg`).

    Args:
        text: The completion; the prompt must not be part of it, so that a token in the prompt never counts.
        frame: The frame in which the model writes boxes.
        seg_token: The segmentation token as text. Decode the completion so that it stays visible: a special token is
            dropped by `skip_special_tokens=True`.
        require_seg: Whether a valid text needs the token.
        require_reasoning: Whether a valid text needs a reasoning block. Without it the grammar is the answer block
            alone, and a reasoning block before it stays allowed.
        require_tags: Whether the answer needs its tags. Without it, and without them, the answer is all of the text
            behind the reasoning, if there is some: so models write that were not trained here.
        answer_format: "text" reads boxes from any sentence, "json" reads JSON, also in one code fence.
        end_tokens: Tokens that may stand behind the text, besides `segrl.predictions.END_TOKENS`.

    Returns:
        The prediction, without a mask.

    Raises:
        DataError: For an unknown `answer_format`; never for a text.

    Example:
        >>> frame = Frame("original_px", (64, 64))
        >>> found = parse_completion("<think>Dark spot.</think><answer>At [1, 2, 9, 80].<seg></answer>", frame)
        >>> found.status.value, found.boxes.tolist(), found.reasoning
        ('valid', [[1.0, 2.0, 9.0, 64.0]], 'Dark spot.')
        >>> parse_completion("<answer>At [1, 2, 9, 8].<seg></answer>", frame).status.value
        'no_reasoning'
    """
    if answer_format not in get_args(AnswerFormat):
        raise DataError(f"answer_format={answer_format!r}; expected one of {', '.join(get_args(AnswerFormat))}")
    body = strip_end_tokens(text, end_tokens, keep=seg_token)
    text = text if len(body) == len(text.strip()) else body
    tagged = body if require_tags else _with_tags(body)
    blocks, closed = _blocks(tagged)
    reasonings = [block.content for block in blocks if block.kind == "think"]
    answers = [block.content for block in blocks if block.kind == "answer"]
    reasoning = reasonings[0] if len(reasonings) == 1 else None
    answer = answers[0] if len(answers) == 1 else None
    has_seg = bool(seg_token) and seg_token in (answer or "")
    token = seg_token or SEG_TOKEN
    if answer_format == "json":
        found = read_json_answer((answer or "").removesuffix(token), MAX_COORDINATE)
    else:
        found = read_text_answer((answer or "").replace(token, _NO_NUMBER))  # the token may hold brackets

    ordered = [block.kind for block in blocks] in (["think", "answer"], ["answer"])
    if all(map(is_blank, answers)):
        status = Status.NO_ANSWER
    elif require_reasoning and all(map(is_blank, reasonings)):
        status = Status.NO_REASONING
    elif not (closed and ordered) or _text_outside(tagged, blocks) or (seg_token and body.count(seg_token) > 1):
        status = Status.EXTRA_TEXT
    elif not found.well_formed:
        status = Status.MALFORMED_JSON if answer_format == "json" else Status.MALFORMED_BOXES
    elif require_seg and not has_seg:
        status = Status.NO_SEG_TOKEN
    else:
        status = Status.VALID
    return Prediction(
        text=text,
        reasoning=reasoning,
        answer=answer,
        boxes=_to_pixels(found.boxes, 4, frame),
        status=status,
        has_seg=has_seg,
        points=_to_pixels(found.points, 2, frame),
        scores=np.array(found.scores) if found.scores else None,
        slice_index=None if found.slice_index is None else frame.original_slice(found.slice_index),
    )


def format_answer(
    lesion: str,
    boxes_px: ArrayLike,
    frame: Frame,
    seg_token: str = SEG_TOKEN,
    *,
    form: AnswerForm = "sentence",
    points_px: ArrayLike | None = None,
) -> str:
    """Format an answer, in the model's frame.

    Args:
        lesion: Name of the lesion.
        boxes_px: (N, 4) boxes in original pixels; N = 0: no lesion is visible.
        frame: The frame in which the model writes boxes.
        seg_token: The segmentation token, or "" for a text-only answer.
        form: "sentence" names lesion and boxes (CORE-Seg); "mask" only says that the mask follows (LISA); "json" is a
            list of objects with box and point (VisionReasoner).
        points_px: (N, 2) points in original pixels, one for each box; "json" alone writes them.

    Returns:
        The text, which `parse_completion` reads back up to the rounding of the frame.

    Raises:
        DataError: If the name holds brackets, coordinates or the token, which would not be read back.
        SegRLError: If the boxes are not valid.

    Example:
        >>> frame = Frame("original_px", (64, 64))
        >>> format_answer("cyst", [[1, 2, 9, 8]], frame)
        'The cyst is located at [1, 2, 9, 8].<seg>'
        >>> format_answer("cyst", [[1, 2, 9, 8]], frame, form="mask")
        'It is <seg>.'
        >>> format_answer("cyst", [[1, 2, 9, 8]], frame, "", form="json", points_px=[[5, 5]])
        '[{"bbox_2d": [1, 2, 9, 8], "point_2d": [5, 5]}]'
    """
    if set("[]<>") & set(lesion) or (seg_token and seg_token in lesion):
        raise DataError(
            f"lesion {lesion!r} holds a bracket or the segmentation token; expected a plain name, rename it"
        )
    if names_coordinates(lesion):
        raise DataError(f"lesion {lesion!r} names coordinates, which would not be read; expected a plain name")
    boxes = frame.from_original(boxes_px).tolist()
    if form == "json":
        objects: list[dict[str, list[int]]] = [{"bbox_2d": box} for box in boxes]
        if points_px is not None:
            corners = np.tile(np.asarray(points_px, dtype=np.float64).reshape(-1, 2), 2)
            for item, place in zip(objects, frame.from_original(corners).tolist(), strict=True):
                item["point_2d"] = place[:2]
        return json.dumps(objects) + seg_token
    if form == "mask" and boxes:
        return f"It is {seg_token}."
    listed = ", ".join(map(str, boxes))
    return (f"The {lesion} is located at {listed}." if boxes else f"No {lesion} is visible.") + seg_token


def format_completion(reasoning: str | None, answer: str, *, tags: bool = True) -> str:
    """Format a completion in the grammar of `parse_completion`.

    Args:
        reasoning: Text of the reasoning block; None leaves the block out (then parse with `require_reasoning=False`).
        answer: Text of the answer block, see `format_answer`.
        tags: Whether an answer without reasoning has its tags; see `require_tags` of `parse_completion`.

    Raises:
        DataError: If one of the texts holds a block tag.

    Example:
        >>> format_completion("Dark spot.", "The cyst is located at [1, 2, 9, 8].<seg>")
        '<think>Dark spot.</think><answer>The cyst is located at [1, 2, 9, 8].<seg></answer>'
    """
    for name, text in (("reasoning", reasoning or ""), ("answer", answer)):
        if found := _TAG.search(text):
            raise DataError(f"{name} holds the tag {found.group()!r}; expected text without block tags, remove it")
    if reasoning is None:
        return f"<answer>{answer}</answer>" if tags else answer
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def _with_tags(body: str) -> str:
    """Put tags around an answer that has none; the first tag of the reasoning may be in the prompt."""
    if "<answer>" in body or "</answer>" in body or ("<think>" in body and "</think>" not in body):
        return body
    reasoning, end, answer = body.rpartition("</think>")
    if end and not reasoning.lstrip().startswith("<think>"):
        reasoning = f"<think>{reasoning}"
    return f"{reasoning}{end}<answer>{answer}</answer>"


class _Block(NamedTuple):
    kind: str
    content: str
    start: int
    end: int


def _blocks(body: str) -> tuple[list[_Block], bool]:
    """Return the closed blocks in order, and whether every tag belongs to one of them (none nested or left open)."""
    blocks: list[_Block] = []
    opening: re.Match[str] | None = None
    closed = True
    for tag in _TAG.finditer(body):
        is_end, kind = tag.groups()
        if opening is None and not is_end:
            opening = tag
        elif opening is not None and is_end and kind == opening[2]:
            blocks.append(_Block(kind, body[opening.end() : tag.start()].strip(), opening.start(), tag.end()))
            opening = None
        else:
            closed = False
    return blocks, closed and opening is None


def _text_outside(body: str, blocks: list[_Block]) -> bool:
    ends = [0, *(block.end for block in blocks)]
    starts = [*(block.start for block in blocks), len(body)]
    return any(body[end:start].strip() for end, start in zip(ends, starts, strict=True))


def _to_pixels(numbers: list[list[float]], width: int, frame: Frame) -> np.ndarray:
    """Convert boxes (N, 4) or points (N, 2) of the model's frame to original pixels, clipped to the image."""
    size = np.array(frame.original_size, dtype=np.float64)
    corners = np.array(numbers, dtype=np.float64).reshape(-1, width)
    boxes = frame.to_original(np.concatenate([corners, corners], axis=1) if width == 2 else corners)
    return np.clip(boxes, 0, np.concatenate([size, size]))[:, :width]
