"""Answers in words: boxes in brackets or in Qwen's own notation, anywhere in a sentence.

Read are ``[x1, y1, x2, y2]`` (and JSON whose innermost lists are boxes), ``(x1,y1),(x2,y2)``, and both inside of
``<|box_start|>...<|box_end|>`` or ``<box>...</box>``. Coordinates in any other notation make an answer malformed: it
has found something, and must not count as an answer that found nothing.
"""

from __future__ import annotations

import re

from segrl.predictions.coordinates import names_coordinates
from segrl.predictions.json_answers import Answer

__all__ = ["MAX_COORDINATE", "read_text_answer"]

MAX_COORDINATE = 1e6
_MAX_DIGITS = 32
_READ = "\ufffc"  # stands for what was read: neither a number nor a separator

# No pattern below backtracks, so each takes linear time on any text.
_BRACKET = re.compile(r"[\[\]]")
_NUMBER = r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_CORNER = rf"\(\s*+({_NUMBER})\s*+,\s*+({_NUMBER})\s*+\)"
_QUAD = "<|quad_start|>"
_CORNERS = re.compile(rf"{_CORNER}\s*+,\s*+{_CORNER}")
_BEGIN, _END = re.compile(r"(?:<\|box_start\|>|<box>)\s*+\["), re.compile(r"\]\s*+(?:<\|box_end\|>|</box>)")


def read_text_answer(text: str) -> Answer:
    """Read boxes in the model's frame. Never raises, and takes linear time.

    Every innermost bracket must hold four numbers with x1 <= x2 and y1 <= y2, or nothing.

    Args:
        text: The answer; a character that is no number stands for the segmentation token.

    Returns:
        The boxes in the order of the text. Not well formed if a bracket is malformed, or if the rest of the text names
        coordinates; see `segrl.predictions.coordinates`.

    Example:
        >>> answer = read_text_answer("At [1, 2, 9, 8] and <|box_start|>(3,4),(5,6)<|box_end|>, 12 mm.")
        >>> answer.boxes, answer.well_formed
        ([[1.0, 2.0, 9.0, 8.0], [3.0, 4.0, 5.0, 6.0]], True)
        >>> read_text_answer("At {1, 2, 9, 8}.").well_formed
        False
    """
    if _QUAD not in text:  # four corners of a quadrilateral are not two boxes
        text = _CORNERS.sub(r"[\1, \2, \3, \4]", text)
    text = _END.sub("]", _BEGIN.sub("[", text))
    found = Answer()
    rest: list[str] = []
    depth, start, end = 0, None, 0  # start of the innermost open bracket's content, end of the last one that was read
    for bracket in _BRACKET.finditer(text):
        if bracket.group() == "[":
            depth, start = depth + 1, bracket.end()
            continue
        depth -= 1
        content = "" if start is None else text[start : bracket.start()]
        if depth < 0:
            depth, found.well_formed = 0, False
        elif start is not None and content.strip():
            box = _box(content)
            found.well_formed = found.well_formed and box is not None
            if box is not None:
                found.boxes.append(box)
                rest.append(text[end : start - 1])
                end = bracket.end()
        start = None
    rest.append(text[end:])
    found.well_formed = found.well_formed and depth == 0 and not names_coordinates(_READ.join(rest))
    return found


def _box(content: str) -> list[float] | None:
    words = [word.strip() for word in content.split(",", maxsplit=4)]
    if len(words) != 4 or not all(len(word) <= _MAX_DIGITS and re.fullmatch(_NUMBER, word) for word in words):
        return None
    x1, y1, x2, y2 = box = [float(word) for word in words]
    return box if x1 <= x2 and y1 <= y2 and max(map(abs, box)) <= MAX_COORDINATE else None
