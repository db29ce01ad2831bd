"""COCO's compressed run lengths: a text of six bits a character, mostly one or two characters a run."""

# R runs, C characters

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from segrl.errors import DataError

__all__ = ["counts_to_text", "rle_counts", "text_to_counts"]

_FIRST, _MORE, _SIGN = 48, 0x20, 0x10  # character of 0; bits that say "continued" and "negative"
_LONGEST = 7  # characters of a run below 2**31


def counts_to_text(counts: np.ndarray) -> str:
    """Write run lengths as pycocotools does: from the fourth on the difference from the last but one.

    Args:
        counts: (R,) whole numbers from 0 to 2**30.

    Example:
        >>> counts_to_text(np.array([2, 3, 1, 40]))
        '231U1'
    """
    rest = np.asarray(counts, dtype=np.int64).copy()
    rest[3:] -= np.asarray(counts, dtype=np.int64)[1:-2]
    table = np.zeros((len(rest), _LONGEST), dtype=np.uint8)
    open_ = np.ones(len(rest), dtype=bool)
    for place in range(_LONGEST):
        five = rest & 0x1F
        rest >>= 5
        more = open_ & (rest != np.where(five & _SIGN, -1, 0))
        table[open_, place] = (five + np.where(more, _MORE, 0) + _FIRST)[open_]
        open_ = more
        if not more.any():
            break
    return table[table > 0].tobytes().decode("ascii")


def text_to_counts(text: str | bytes, name: str = "mask") -> np.ndarray:
    """Read run lengths, the inverse of `counts_to_text`.

    Args:
        text: Compressed counts, as pycocotools writes them.
        name: Name of the mask in error messages.

    Returns:
        (R,) int64; their sum and their sign are for the caller to check.

    Raises:
        DataError: A character that does not occur in such texts, or a number without its end.

    Example:
        >>> text_to_counts("231U1").tolist()
        [2, 3, 1, 40]
    """
    data = np.frombuffer(text if isinstance(text, bytes) else text.encode("utf-8"), dtype=np.uint8)
    digits = data.astype(np.int64) - _FIRST
    wrong = (digits < 0) | (digits > 0x3F)
    if wrong.any() or not len(digits) or digits[-1] & _MORE:
        what = f"the character {chr(data[wrong.argmax()])!r}" if wrong.any() else "no end"
        raise DataError(f"{name}: compressed run lengths with {what}; expected those that pycocotools writes")
    ends = np.flatnonzero(digits & _MORE == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    if places.max() >= _LONGEST:
        raise DataError(f"{name}: compressed run lengths with a run of 2**31 or more; expected at most 2**30")
    values = np.add.reduceat((digits & 0x1F) << (5 * places), starts)
    values -= np.where(digits[ends] & _SIGN, np.int64(1) << (5 * (places[ends] + 1)), 0)
    for first in (1, 2):  # the others are differences
        values[first::2] = np.cumsum(values[first::2])
    return values


def rle_counts(rle: Mapping[str, Any]) -> np.ndarray:
    """Return the lengths of the runs of a mask that `segrl.geometry.mask_to_rle` encoded, background first.

    Example:
        >>> rle_counts({"size": [2, 3], "counts": "231"}).tolist()
        [2, 3, 1]
    """
    counts = rle["counts"]
    return text_to_counts(counts) if isinstance(counts, str | bytes) else np.asarray(counts, dtype=np.int64)
