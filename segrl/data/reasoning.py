"""Template texts: the query of a row, and reasoning built from its mask.

A stable hash of the row's name picks the template, so that the text of a row never changes between epochs, repeats,
processes or machines. No coordinate is written (CORE-Seg strips them from its reasoning).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from segrl.errors import DataError
from segrl.geometry.masks import boxes_from_mask

__all__ = [
    "build_query",
    "build_reasoning",
    "count_word",
    "is_built",
    "lower_words",
    "mask_words",
    "pick_by_hash",
    "plural",
]

Option = TypeVar("Option")

_QUERIES = (
    "Segment the {lesion} in {place}.",
    "Find every {lesion} in {place}.",
    "Where is the {lesion} in {place}?",
    "Show the {lesion} in {place}.",
    "Segment every {lesion} in {place}.",
    "Find and segment the {lesion} in {place}.",
)
_NORMAL = (
    "The {organ} looks normal away from the findings.",
    "Most of the {organ} has the usual structure.",
)
_DIFFERENCES = (
    "Its brightness and outline differ from normal tissue and from other findings.",
    "Normal structures and other findings do not share this brightness and outline.",
)
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_SMALL, _MEDIUM = 0.02, 0.08  # area of the largest component as a fraction of the image


def build_query(lesion: str, anatomy: str, modality: str, key: str, *, noun: str = "image") -> str:
    """Build the query of one row from one of six templates.

    Args:
        lesion: What to segment, for example "dark cyst"; must not be empty, and every template names it.
        anatomy: For example "Breast"; may be empty.
        modality: For example "Ultrasound"; may be empty.
        key: The row's name; picks the template, so the same key always gives the same words.
        noun: "image" or "scan".

    Returns:
        One sentence of about 8 to 14 words.

    Raises:
        DataError: If `lesion` is empty.

    Example:
        >>> build_query("dark cyst", "Breast", "Ultrasound", "row 3")
        'Find and segment the dark cyst in this ultrasound image of the breast.'
    """
    if not lesion.strip():
        raise DataError(f"lesion={lesion!r} of {key!r}: expected a name; fill the lesion column or give a query column")
    return pick_by_hash(_queries(lesion, anatomy, modality, noun), key)


def is_built(texts: Mapping[str, str]) -> bool:
    """Return whether `build_query` made the query of a row with these metadata columns, whatever its key was.

    Example:
        >>> texts = {"lesion": "cyst", "anatomy": "Breast", "modality": ""}
        >>> is_built({"query": build_query(**texts, key="a"), **texts})
        True
    """
    built = (_queries(texts["lesion"], texts["anatomy"], texts["modality"], noun) for noun in ("image", "scan"))
    return any(texts["query"] in queries for queries in built)


def _queries(lesion: str, anatomy: str, modality: str, noun: str) -> list[str]:
    place = f"this {lower_words(modality)} {noun}" if modality.strip() else f"this {noun}"
    if anatomy.strip():
        place += f" of the {lower_words(anatomy)}"
    return [template.format(lesion=lesion.strip(), place=place) for template in _QUERIES]


def build_reasoning(
    *, lesion: str, anatomy: str, modality: str, mask: np.ndarray, key: str, query: str = "", brief: bool = False
) -> str:
    """Build template reasoning from the mask: normal anatomy, the lesion, its difference from confounders.

    Count, location (thirds of the image) and size (small below 2 %, medium below 8 % of the image) are written as
    words, the last two for the largest component; no coordinate and no digit is written.

    Args:
        lesion: Name of the lesion; "" means "lesion".
        anatomy: May be empty.
        modality: May be empty.
        mask: (H, W) bool.
        key: The row's name; picks the templates.
        query: If it does not name the lesion, a sentence that does is added; unused in the brief form.
        brief: At most 20 words for lesion names of up to three words, for tiny models; otherwise at most about 45.

    Returns:
        Plain text. For an empty mask it says that the lesion is not visible.

    Example:
        >>> mask = np.zeros((9, 9), dtype=bool)
        >>> mask[0, 0], mask[5:8, 7:9] = True, True
        >>> build_reasoning(lesion="cyst", anatomy="Breast", modality="", mask=mask, key="a", brief=True)
        'The breast looks normal around two medium cysts, the largest in the lower right part.'
    """
    lesion, organ = lesion.strip() or "lesion", lower_words(anatomy) or "tissue"
    boxes = boxes_from_mask(mask)
    normal = pick_by_hash(_NORMAL, key).format(organ=organ)
    if not len(boxes):
        return f"The {organ} looks normal. No {lesion} is visible."
    size, location = mask_words(mask)
    one = len(boxes) == 1
    found = lesion if one else plural(lesion)
    findings = f"{count_word(len(boxes))} {size} {found}{' in' if one else ', the largest in'} the {location}"
    if brief:
        return f"The {organ} looks normal around {findings}."
    image = f"{lower_words(modality)} image".strip()
    aim = "" if not query or lesion.lower() in query.lower() else f"The question is about the {lesion}. "
    return f"{normal} The {image} shows {findings}. {aim}{pick_by_hash(_DIFFERENCES, key)}"


def pick_by_hash(options: Sequence[Option], key: str) -> Option:
    """Return the option that a stable hash of `key` picks, the same in every process and run."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"segrl").digest()
    return options[int.from_bytes(digest, "big") % len(options)]


def mask_words(mask: np.ndarray) -> tuple[str, str]:
    """Return size and location of the largest component of a mask, which is not empty, in words.

    Args:
        mask: (H, W) bool.

    Returns:
        "small", "medium" or "large", and a location such as "upper left part"; left and right are the viewer's.

    Example:
        >>> mask = np.zeros((9, 9), dtype=bool)
        >>> mask[5:8, 7:9] = True
        >>> mask_words(mask)
        ('medium', 'lower right part')
    """
    x1, y1, x2, y2 = boxes_from_mask(mask)[0]
    height, width = mask.shape
    largest = mask[int(y1) : int(y2), int(x1) : int(x2)]
    location = _location_words((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
    return _size_word(np.count_nonzero(largest) / mask.size), location


def count_word(count: int) -> str:
    """Return a number in words; from six on "several", from ten on "many".

    Example:
        >>> count_word(2), count_word(7)
        ('two', 'several')
    """
    return _NUMBERS[count] if count < len(_NUMBERS) else "several" if count < 10 else "many"


def lower_words(name: str) -> str:
    """Return words in lower case, but abbreviations unchanged: "Breast" -> "breast", "MRI" -> "MRI"."""
    return " ".join(word if word.isupper() else word.lower() for word in name.split())


def plural(lesion: str) -> str:
    if lesion.endswith("s") and not lesion.endswith(("ss", "is")):
        return lesion  # already a plural, like "hard exudates"
    if lesion.endswith("is"):
        return lesion[:-2] + "es"
    return lesion + ("es" if lesion.endswith(("s", "x")) else "s")


def _size_word(fraction: float) -> str:
    return "small" if fraction < _SMALL else "medium" if fraction < _MEDIUM else "large"


def _location_words(x: float, y: float) -> str:
    """Name the location of a point in [0, 1]^2 of the image; left and right are the viewer's."""
    row, column = ("upper", "", "lower")[min(2, int(3 * y))], ("left", "", "right")[min(2, int(3 * x))]
    return " ".join(word for word in (row, column) if word) + (" part" if row or column else "centre")
