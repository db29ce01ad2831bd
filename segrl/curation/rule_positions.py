"""Positions in numbers: coordinates, pixels, rows and columns, and shares of width and height.

Removed where a sentence stays whole without them, else found, so that the text is refused. Medical numbers stay: sizes
with a unit, ages, grades, levels of the spine, clock positions, and percentages that are no place in the image.
"""

from __future__ import annotations

import re
import unicodedata

from segrl.data.coordinates import find_coordinates, strip_coordinates
from segrl.predictions.characters import visible_text
from segrl.predictions.coordinates import names_coordinates

__all__ = ["find_positions", "remove_positions", "split_sentences"]

# Bounded repetitions, so that every pattern takes linear time on any text.
_N = r"\d{1,6}(?:[.,]\d{1,6})?"
_UNIT = r"(?!\s{0,2}(?:mm|cm|m|µm|um|ml|cc|hu|mg|kg|years?|months?|weeks?|days?)\b)"
_WHERE = (
    r"(?:from|to|of|at|along)\s{1,3}(?:the\s{1,3})?(?:image(?:'s)?\s{1,3}|picture(?:'s)?\s{1,3})?"
    r"(?:left|right|top|bottom|upper|lower|(?:horizontal|vertical|x|y)[- ]ax[ei]s)"
    r"|of\s{1,3}the\s{1,3}way|(?:image|picture|frame|its|the|total)(?:'s)?\s{1,3}(?:width|height)"
    r"|width\s{1,3}and\s{1,3}height|horizontal(?:ly)?|vertical(?:ly)?|across|down\b|from\s{1,3}the\s{1,3}edge"
)
_PERCENT = rf"{_N}\s{{0,3}}(?:%|percent\b|per\s{{1,2}}cent\b|(?:st|nd|rd|th)\s{{1,3}}percentile)"
_SHARE = (
    r"(?:%|\bper\s?cent)\s{1,3}of\s{1,3}(?:the\s{1,3})?(?:image|picture|frame)(?:'s)?\s{1,3}"
    r"(?:size|width|height|dimensions)"
)
_FRACTION = r"(?<![\d.])(?:0?\.\d{1,6}|1\.0{1,6})(?![\d.])"
_NUMBER_WORD = r"(?:hundred|thousand|ten|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|dozens?)"
_ALONE = (
    rf"(?:{_N}|\b{_NUMBER_WORD})\s{{0,3}}-?(?:px|pixels?)\b",
    rf"\b(?:rows?|columns?|cols?|scan\s?lines?)\s{{1,3}}(?:no\.?\s|number\s|from\s|between\s|at\s|is\s|=|:)?\s{{0,3}}{_N}",
    rf"(?<![\w.]){_N}\s{{0,3}}(?:x|×|by)\s{{0,3}}{_N}(?!\w|\.\d|\s{{0,3}}(?:×|(?:x|by)\b)){_UNIT}",
    rf"(?<!\d )(?<!\w)[xy]\s{{0,3}}(?:[=:≈]|from|between|is|of)?\s{{1,3}}{_N}{_UNIT}",
    r"(?<![\w/])\d{1,4}\s?/\s?\d{1,4}(?![\w/]).{1,60}?(?<![\w/])\d{1,4}\s?/\s?\d{1,4}(?![\w/])",
    r"\b(?:box|bbox|corners?|coordinates?|centroid|abscissa|ordinate|grid|normali[sz]ed|origin|offset|pixels?"
    rf"|relative\s{{1,3}}position)\b.{{0,80}}?(?<![\w.]){_N}(?!\w){_UNIT}",
    rf"{_N}\s{{1,3}}(?:on\s{{1,3}})?(?:the\s{{1,3}})?(?:[xy]-ax[ei]s|horizontally|vertically|along|in\s{{1,3}}[xy]\b)",
    rf"\b(?:left|right|top|bottom)\s{{0,3}}[:=]\s{{0,3}}{_N}",
    r"<[^<>]{0,40}\d[^<>]{0,40}>|⟨[^⟨⟩]{0,40}\d[^⟨⟩]{0,40}⟩",
)
_TOGETHER = (  # both in one sentence
    (_PERCENT, _WHERE),
    (_SHARE, _N),
    (_FRACTION, rf"{_WHERE}|\b(?:centre|center|middle|position|normali[sz]ed|relative)\b"),
)
_ANY = re.compile("|".join(_ALONE))
_PAIRS = tuple((re.compile(first), re.compile(second)) for first, second in _TOGETHER)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[^a-z\s])")
# A sentence that lost its numbers and is none any more.
_STUB = re.compile(
    r"(?:\b(?:is|are|at|in|from|to|and|or|the|of|between|by|through|runs|spans|box|with|as|its|around|near|be|would)"
    r"|[:=({\[<])\W*$|\bfrom to\b|\bat (?:is|to)\b|[{}\[\]<>|=]|\bbbox\b|[:,]\s*[.,]"
)
_GOES_ON = re.compile(r"\s{0,4}(?:[,.;)]|$|(?:in|within|on|near|with|and|of|which|where|that)\b)")
_FEWEST = 4  # words of a sentence


def split_sentences(text: str) -> list[str]:
    """Split a text at full stops, question and exclamation marks that white space and no small letter follows.

    Example:
        >>> split_sentences("It is 2.5 cm, i.e. small. Its rim is thick! Is it?")
        ['It is 2.5 cm, i.e. small.', 'Its rim is thick!', 'Is it?']
    """
    return [sentence for sentence in _SENTENCE.split(text.strip()) if sentence.strip()]


def find_positions(text: str) -> list[str]:
    """Return the positions that a text gives in numbers, at most one a sentence.

    Example:
        >>> find_positions("It begins 40 pixels from the edge. It is 12 x 9 mm, at the 3 o'clock position.")
        ['40 pixels']
        >>> find_positions("It is centred at 30 % of the image width. About 20 % of it is necrotic, grade 2.")
        ['30 %']
    """
    return [found for sentence in split_sentences(text) if (found := _position(sentence))]


def remove_positions(text: str) -> tuple[str, list[str]]:
    """Remove coordinates, and sentences that are none without them.

    Returns:
        The text, and what was removed. Positions in other notations are left; `find_positions` finds them.

    Example:
        >>> remove_positions("A cyst, located at (12, 34), has a thin wall. Its box is [1, 2, 3, 4]. It is dark.")
        ('A cyst, has a thin wall. It is dark.', ['(12, 34)', '[1, 2, 3, 4]'])
    """
    kept, removed = [], []
    for sentence in split_sentences(text):
        found = find_coordinates(_plain(sentence))
        if not found:
            kept.append(sentence)
            continue
        removed += found
        rest = strip_coordinates(_plain(sentence))
        ends = [_plain(sentence).partition(item)[2] for item in found]
        whole = (
            all(map(_GOES_ON.match, ends))
            and rest[:1].isupper()
            and len(rest.split()) >= _FEWEST
            and not _STUB.search(rest.rstrip(" .!?"))
        )
        if whole:
            kept.append(rest)
    return " ".join(kept), removed


def _position(sentence: str) -> str:
    text = _plain(sentence).lower()
    if not any(letter.isdigit() for letter in text) and "pixel" not in text:
        return ""
    if found := _ANY.search(text):
        return found.group()
    for first, second in _PAIRS:
        if (found := first.search(text)) and second.search(text):
            return found.group()
    return sentence if names_coordinates(sentence) else ""


def _plain(text: str) -> str:
    """Return a text with full-width digits and brackets as plain ones, without invisible characters."""
    if text.isascii() and text.isprintable():
        return text
    wide = {letter: unicodedata.normalize("NFKC", letter) for letter in set(text) if not letter.isascii()}
    return visible_text(text).translate({ord(letter): plain for letter, plain in wide.items() if len(plain) == 1})
