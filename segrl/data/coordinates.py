"""Coordinates in given reasoning: found, and refused or stripped.

CORE-Seg strips explicit coordinates from its reasoning: a model that has read the numbers in the `<think>` block learns
to copy them into the answer, and nothing about the image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from segrl.errors import DataError, unknown_name

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CoordinatePolicy", "check_coordinates", "find_coordinates", "given_reasoning", "strip_coordinates"]

CoordinatePolicy = Literal["refuse", "strip", "keep"]

# Every repetition is bounded or cannot overlap what follows it, so each pattern takes linear time on any text.
_N = r"[+-]?\d{1,9}(?:\.\d{1,9})?"
_GAP = r"\s{0,4}[,;]\s{0,4}"
_FORMS = (
    r"</?\|?(?:box|bbox|point|ref_point|object_ref)(?:_start|_end)?\|?>",  # tags of grounding models
    r"<loc_?\d{1,5}>",
    rf"[\[({{<]\s{{0,4}}{_N}(?:(?:{_GAP}|\s{{1,4}}){_N}){{1,5}}\s{{0,4}}[\])}}>]",  # [12, 34, 56, 78], (12 34)
    rf"(?<![\w.]){_N}(?:{_GAP}{_N}){{3}}(?![\w%])",  # 12, 34, 56, 78
    rf"(?<![A-Za-z0-9])(?:[cxyzXYZ]?[xyzXYZ][0-2]?|[xyXY]_?(?:min|max|center))\s{{0,4}}[=:≈]\s{{0,4}}{_N}",  # x1=12
    r"(?<!\w)(?:bbox|point)_2d\"?\s{0,4}[:=]?",
    rf"(?<!\w)[Pp]ixels?\s{{1,4}}{_N}(?:(?:{_GAP}|\s{{1,4}}and\s{{1,4}}){_N})?",  # pixel 120, 84
    rf"(?<!\w)[Cc]oordinates?\s{{0,4}}[:=]?\s{{0,4}}{_N}(?:(?:{_GAP}|\s{{1,4}}and\s{{1,4}}){_N})?",
)
_SLICE = r"<?(?<!\w)[Ss]lices?\s{1,4}(?:number|no\.|#)?\s{0,4}\d{1,5}(?:\s{0,4}(?:to|and|-|–)\s{0,4}\d{1,5})?>?"
_LEAD = r"(?:(?<!\w)(?:located\s{1,4})?(?:at|around|near|in|on|within)\s{1,4}(?:the\s{1,4})?(?:b?box|point)?\s{0,4})?"
_IN_IMAGES = re.compile("|".join(_FORMS))
_IN_VOLUMES = re.compile("|".join((*_FORMS, _SLICE)))

_TIDY = (  # what is left around a removed coordinate
    (re.compile(r"[\[({][ ,;]*[\])}]"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r" ?([,;])(?:[ ,;]*[,;])?"), r"\1"),
    (re.compile(r"[ ,;]+(?=\.(?:\s|$))"), ""),
)


def find_coordinates(text: str, *, volume: bool = False) -> list[str]:
    """Return the coordinates that a text gives in numbers, in order.

    Boxes and points in brackets or tags, four numbers in a row, `x1=12`, `pixel 120`; of a volume also the numbers of
    slices. Sizes ("3 x 4 cm"), ages, percentages and names such as "T2" or "L4, L5" are none.

    Args:
        text: Reasoning.
        volume: Whether it is about a volume.

    Example:
        >>> find_coordinates("A 3 x 4 cm mass in segment 7 at [12, 34, 56, 78], x=3.")
        ['[12, 34, 56, 78]', 'x=3']
        >>> find_coordinates("Best seen on slice 12.", volume=True)
        ['slice 12']
    """
    return [found.group() for found in (_IN_VOLUMES if volume else _IN_IMAGES).finditer(text)]


def strip_coordinates(text: str, *, volume: bool = False) -> str:
    """Return a text without its coordinates, nor the "at" or "located at" in front of them.

    Args:
        text: Reasoning.
        volume: As in `find_coordinates`.

    Example:
        >>> strip_coordinates("A dark cyst, located at (12, 34), (56, 78), with a thin wall.")
        'A dark cyst, with a thin wall.'
    """
    led = re.compile(f"{_LEAD}(?:{(_IN_VOLUMES if volume else _IN_IMAGES).pattern})")
    while find_coordinates(text, volume=volume):  # again, if what stood around one is now one
        text = led.sub("", text)
        for pattern, instead in _TIDY:
            text = pattern.sub(instead, text)
        text = text.strip(" ,;")
    return text


def check_coordinates(dataset: Dataset, policy: CoordinatePolicy, *, volume: bool = False) -> None:
    """Refuse rows whose given reasoning holds coordinates, unless they are stripped or kept.

    Args:
        dataset: Rows, with or without a column `reasoning`.
        policy: "refuse", "strip" or "keep".
        volume: As in `find_coordinates`.

    Raises:
        DataError: With "refuse", rows that hold some: their number, and the first ones with what was found.
        UnknownNameError: Another policy.
    """
    if policy not in get_args(CoordinatePolicy):
        raise unknown_name("coordinates", str(policy), get_args(CoordinatePolicy))
    if policy != "refuse" or "reasoning" not in dataset.column_names:
        return
    texts = dataset["reasoning"]
    found = [(n, hits) for n, text in enumerate(texts) if text and (hits := find_coordinates(str(text), volume=volume))]
    if found:
        names = dataset["name"] if "name" in dataset.column_names else None
        listed = "; ".join(f"{names[n] if names else f'row {n}'}: {hits[0]!r:.60}" for n, hits in found[:3])
        raise DataError(
            f"column 'reasoning' of {len(found)} of {len(dataset)} rows holds coordinates ({listed}), expected words: "
            "a model would copy the numbers; pass coordinates='strip' (--coordinates strip) to remove them, or 'keep'"
        )


def given_reasoning(row: Mapping[str, Any], policy: CoordinatePolicy, *, volume: bool = False) -> str:
    """Return the reasoning that a row brings along; "" if it has none.

    Args:
        row: A row that passed `check_coordinates`.
        policy: With "strip", without its coordinates.
        volume: As in `find_coordinates`.

    Raises:
        DataError: Nothing but coordinates.

    Example:
        >>> given_reasoning({"name": "a", "reasoning": "Dark, at [1, 2, 3, 4]."}, "strip")
        'Dark.'
    """
    text = str(row.get("reasoning") or "").strip()
    if policy != "strip" or not text:
        return text
    left = strip_coordinates(text, volume=volume)
    if not re.search(r"\w", left):
        raise DataError(
            f"{row['name']}: the reasoning {text!r:.100} is nothing but coordinates; expected words; fill or clear it"
        )
    return left
