"""Whether a text names coordinates: `names_coordinates` finds notations of boxes and points that nobody parses.

Not every number is a coordinate. Sizes with a unit, percentages, dates, counts, lists of slices or years and up to
three bare numbers are prose.
"""

from __future__ import annotations

import re
import unicodedata

from segrl.predictions.characters import visible_text

__all__ = ["names_coordinates"]

# Every quantifier is possessive or bounded, so each pattern takes linear time on any text. `\d` also means digits of
# other scripts.
_NUMBER = r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:e[+-]?\d++)?(?:\s?px|\s?pixels?)?(?![\w%])"
_GAP = r"[\s,;|\u3001\u060c]++"
_FIRST = rf"(?<![\w.]){_NUMBER}"
_TWO = rf"{_FIRST}\s*+,\s*+{_NUMBER}"

# Numbers that may be prose: a unit behind them or a counted noun before them says so, and so do years.
_RUN = re.compile(rf"{_FIRST}(?:{_GAP}{_NUMBER}){{3,}}+|{_TWO}\s*+(?:to|-|–|—|->|→)\s*+{_NUMBER}\s*+,\s*+{_NUMBER}")
_ENCLOSED = re.compile(rf"[({{<\[⟨《「【〔]\s*+{_NUMBER}(?:{_GAP}{_NUMBER})++\s*+[)}}>\]⟩》」】〕]")
_LABELLED = re.compile(rf"\b(?:coordinates?|pixels?|bbox(?:es)?|bounding[- ]box(?:es)?|corners?)\W{{0,5}}+{_TWO}")
_UNIT = re.compile(
    rf"\s*+(?:,?\s*+(?:and|or|to)?\s*+{_NUMBER}\s*+)?"
    r"(?:[%°]|(?:mm|cm|m|ml|cc|hu|in)\b|(?:percent|years?|months?|weeks?|days?|o.?clock|degrees?|lesions?|nodules?|slices?|images?)\b)"
)
_COUNTED = re.compile(
    r"\b(?:slices?|images?|frames?|levels?|segments?|ribs?|stations?|zones?|grades?|stages?|types?|sizes?|diameters?"
    r"|series|scores?|years?|days?|weeks?|months?)(?: (?:of|are|were|numbers?|no\.?))?:? ?$"
)
_YEAR = re.compile(r"(?:19|20)\d\d")
_BEFORE = 32  # characters before a run in which a counted noun is looked for

# Notations that prose does not have.
_SURE = re.compile(
    # x1=10, "xmin": 10, y: 20, cx = 5
    r"(?<!\w)(?:[xy](?:[-_ ]?(?:\d|min|max|c|cent(?:er|re)|left|right|start|end|coord(?:inate)?s?|pos(?:ition)?))?"
    r"|c[xy]|(?:min|max)[-_]?[xy])[\"'`]?\s*+[=:≈]\s*+[\"'({\[]*+\s*+[+-]?\.?\d"
    # x1 10
    r"|(?<!\w)[xy][-_]?(?:[0-4]|min|max)\s++(?:is |of )?[+-]?\d"
    # <loc0123>, <|quad_start|>, <box>, <point x="10">
    r"|<\|?/?(?:b?box|loc|bin|patch|point|quad|poly|region|coord|rect|bound)[^<>]{0,40}+>"
    # 100-200-300-400, 100/200/300/400
    r"|(?<![\w.])\d++(?:-\d++){3,}+(?!\w)|(?<![\w.])\d++(?:/\d++){3,}+(?!\w)|(?<![\w.])\d++(?::\d++){3,}+(?!\w)"
)
_AXIS = r"(?:[- ](?:axis|coordinates?|direction|range))?(?:\s++(?:from|in|between|at|of|is|to)){0,2}+\s++[+-]?\d"
# One of each pair is prose, both together are not.
_TOGETHER = tuple(
    (re.compile(first), re.compile(second))
    for first, second in (
        (rf"(?<!\w)(?<!\d )x{_AXIS}", rf"(?<!\w)y{_AXIS}"),
        (r"\b(?:left|right)[\"'`]?\s*+[=:]\s*+\d", r"\b(?:top|bottom)[\"'`]?\s*+[=:]\s*+\d"),
        (r"\brows?\W{0,3}+\d", r"\bcol(?:umn)?s?\W{0,3}+\d"),
    )
)


def names_coordinates(text: str) -> bool:
    """Return whether a text names a box or a point in any notation that is known here. Takes linear time.

    Args:
        text: The text, without what has been read from it.

    Example:
        >>> [names_coordinates(text) for text in ("At {100, 200, 300, 400}.", "x1=10, y1=20", "near (120, 80)")]
        [True, True, True]
        >>> [names_coordinates(text) for text in ("3 lesions of 12 mm", "on 2024-03-14", "2.5 x 3 x 4 cm, 20%")]
        [False, False, False]
    """
    letters = set(text)
    if not any(letter.isdigit() for letter in letters):
        return False
    wide = {letter: unicodedata.normalize("NFKC", letter) for letter in letters if not letter.isascii()}
    single = {ord(letter): plain for letter, plain in wide.items() if len(plain) == 1}
    text = visible_text(text).translate(single).lower()  # full-width digits and brackets are as good as others
    if _SURE.search(text) or any(first.search(text) and second.search(text) for first, second in _TOGETHER):
        return True
    return any(_is_place(found, text) for pattern in (_RUN, _ENCLOSED, _LABELLED) for found in pattern.finditer(text))


def _is_place(found: re.Match[str], text: str) -> bool:
    """Return whether numbers in a row are coordinates: no unit follows, nothing counted precedes, not all are years."""
    if _UNIT.match(text, found.end()) or _COUNTED.search(text[max(found.start() - _BEFORE, 0) : found.start()]):
        return False
    return not all(_YEAR.fullmatch(number) for number in re.findall(r"\d++", found.group()))
