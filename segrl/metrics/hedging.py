"""Sentences that hedge: how sure a model's reasoning sounds (CORE-Seg, section 5.4.1, gives no list of words)."""

from __future__ import annotations

import re

__all__ = ["count_hedges"]

_SENTENCE = re.compile(r"[^.!?\n]+(?:\.\d[^.!?\n]*)*")
_HEDGE = re.compile(
    r"\b(?:may|might|could|would|perhaps|maybe|possibl[ey]|probabl[ey]|likely|unlikely|presumabl[ey]|apparently|"
    r"appears?|seems?|suggests?|suggesti(?:ng|ve)|suspicious|suspected|potential(?:ly)?|uncertain|unclear|unsure|"
    r"equivocal|indeterminate|cannot (?:be )?(?:exclude|rule)d?|not (?:certain|sure|clear))\b",
    re.IGNORECASE,
)


def count_hedges(text: str) -> tuple[int, int]:
    """Count the sentences of a text, and those among them that hedge.

    A sentence hedges if it holds a word of doubt, such as "may", "likely", "appears" or "cannot be excluded". Text
    without letters is no sentence.

    Returns:
        (sentences that hedge, sentences).

    Example:
        >>> count_hedges("A dark spot of 2.5 mm. It may be a cyst, or it is likely an abscess!")
        (1, 2)
        >>> count_hedges("")
        (0, 0)
    """
    sentences = [found.group() for found in _SENTENCE.finditer(text) if re.search(r"[^\W\d_]", found.group())]
    return sum(bool(_HEDGE.search(sentence)) for sentence in sentences), len(sentences)
