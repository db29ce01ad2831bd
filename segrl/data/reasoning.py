"""Template texts: the question of a row, and reasoning built from its mask.

Every choice between templates hangs on a stable hash of the row's name, so that the text of a row never changes between
epochs, repeats, processes or machines. No coordinate is written (CORE-Seg strips them from its reasoning).
"""

from __future__ import annotations

import hashlib

import numpy as np

from segrl.errors import DataError
from segrl.geometry.masks import boxes_from_mask

__all__ = ["build_query", "build_reasoning"]

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


_TOLD_APART = (
    "Its brightness and outline differ from normal tissue and from other findings.",
    "Normal structures and other findings do not share this brightness and outline.",
)


_NUMBERS = ("no", "one", "two", "three", "four", "five")


_SMALL, _MEDIUM = 0.02, 0.08  # area of the largest component as a fraction of the image


def build_query(lesion: str, anatomy: str, modality: str, key: str, *, noun: str = "image") -> str:
    """Builds the question for one row from one of six templates.

    Args:
        lesion: what to segment, for example "dark cyst"; must not be empty, and every template names it.
        anatomy: for example "Breast"; may be empty.
        modality: for example "Ultrasound"; may be empty.
        key: the row's name; picks the template, so the same key always gives the same words.
        noun: what is looked at, "image" or "scan".

    Returns:
        One sentence of about 8 to 14 words.

    Raises:
        DataError: if `lesion` is empty.

    Example:
        >>> build_query("dark cyst", "Breast", "Ultrasound", "row 3")
        'Find and segment the dark cyst in this ultrasound image of the breast.'
    """
    if not lesion.strip():
        raise DataError(f"lesion={lesion!r} of {key!r}: expected a name; fill the lesion column or give a query column")
    place = f"this {_lower(modality)} {noun}" if modality.strip() else f"this {noun}"
    if anatomy.strip():
        place += f" of the {_lower(anatomy)}"
    return _pick(_QUERIES, key).format(lesion=lesion.strip(), place=place)


def build_reasoning(
    *, lesion: str, anatomy: str, modality: str, mask: np.ndarray, key: str, query: str = "", brief: bool = False
) -> str:
    """Builds template reasoning from the mask: normal anatomy, the lesion, what tells it from confounders.

    Count, place (thirds of the image) and size (small below 2 %, medium below 8 % of the image) are put in words, the
    last two for the largest component; no coordinate and no digit is written.

    Args:
        lesion: name of the lesion; empty means "lesion".
        anatomy: may be empty.
        modality: may be empty.
        mask: (H, W) bool.
        key: the row's name; picks the templates.
        query: repeated as the aim when it does not name the lesion; unused in the brief form.
        brief: at most 20 words for lesion names of up to three words, for tiny models; otherwise at most about 45.

    Returns:
        Plain text. For an empty mask it says that the lesion is not visible.
    """
    lesion, organ = lesion.strip() or "lesion", _lower(anatomy) or "tissue"
    boxes = boxes_from_mask(mask)
    normal = _pick(_NORMAL, key).format(organ=organ)
    if not len(boxes):
        return f"The {organ} looks normal. No {lesion} is visible."
    height, width = mask.shape
    x1, y1, x2, y2 = boxes[0]
    largest = mask[int(y1) : int(y2), int(x1) : int(x2)]
    size = _size_word(np.count_nonzero(largest) / mask.size)
    place = _place_words((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
    count = _NUMBERS[len(boxes)] if len(boxes) < len(_NUMBERS) else "several" if len(boxes) < 10 else "many"
    found = lesion if len(boxes) == 1 else _plural(lesion)
    findings = f"{count} {size} {found}" + (" in the " if len(boxes) == 1 else ", the largest in the ") + place
    if brief:
        return f"The {organ} looks normal around {findings}."
    image = f"{_lower(modality)} image".strip()
    aim = "" if not query or lesion.lower() in query.lower() else f"The question is about the {lesion}. "
    return f"{normal} The {image} shows {findings}. {aim}{_pick(_TOLD_APART, key)}"


def _pick(templates: tuple[str, ...], key: str) -> str:
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"segrl").digest()
    return templates[int.from_bytes(digest, "big") % len(templates)]


def _lower(name: str) -> str:
    """Lower case for words, as written for abbreviations: "Breast" -> "breast", "MRI" -> "MRI"."""
    return " ".join(word if word.isupper() else word.lower() for word in name.split())


def _plural(lesion: str) -> str:
    if lesion.endswith("s") and not lesion.endswith(("ss", "is")):
        return lesion  # already a plural, like "hard exudates"
    if lesion.endswith("is"):
        return lesion[:-2] + "es"
    return lesion + ("es" if lesion.endswith(("s", "x")) else "s")


def _size_word(fraction: float) -> str:
    return "small" if fraction < _SMALL else "medium" if fraction < _MEDIUM else "large"


def _place_words(x: float, y: float) -> str:
    """Coarse place of a point in [0, 1]^2 of the image: left and right are the viewer's."""
    row, column = ("upper", "", "lower")[min(2, int(3 * y))], ("left", "", "right")[min(2, int(3 * x))]
    return " ".join(word for word in (row, column) if word) + (" part" if row or column else "centre")
