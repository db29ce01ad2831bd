"""Rules for texts, free of cost: applied before any judge is asked.

What can be mended is (coordinates are removed), everything else is a problem of one of `PROBLEMS`, with what was found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from segrl.curation.facts import Facts
from segrl.curation.rule_facts import find_contradictions, lesion_nouns
from segrl.curation.rule_positions import find_positions, remove_positions
from segrl.curation.rule_words import (
    LANGUAGES,
    find_annotation,
    find_chatter,
    find_format,
    find_language,
    find_repetition,
    repeated_sentences,
)
from segrl.errors import SegRLError, unknown_name

__all__ = ["PROBLEMS", "CheckedText", "RuleSettings", "check_corpus", "check_text"]

PROBLEMS = ("coordinates", "length", "format", "contradiction", "language", "boilerplate", "annotation")
_PLACE = re.compile(
    r"\b(?:left|right|upper|lower|top|bottom|cent(?:er|re|ral\w*)|middle|lateral|medial|anterior|posterior|superior"
    r"|inferior|apical|basal|peripheral|corner|edge|quadrant|lobe|between|beside|adjacent|near)\b"
)


@dataclass(frozen=True, kw_only=True)
class RuleSettings:
    """Demands of the rules on a text.

    Attributes:
        min_words: Fewest words.
        max_words: Most words.
        language: ISO 639-1 code of the language of all texts.
        repeated_share: A sentence in more than this share of the texts is boilerplate, and so is a text of little else.

    Raises:
        SegRLError: A number out of range, or a language that is not known.

    Example:
        >>> RuleSettings().min_words
        12
    """

    min_words: int = 12
    max_words: int = 250
    language: str = "en"
    repeated_share: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise SegRLError(
                f"min_words={self.min_words}, max_words={self.max_words}; expected 1 <= min_words <= max_words"
            )
        if self.language not in LANGUAGES:
            raise unknown_name("language", self.language, LANGUAGES)
        if not 0 < self.repeated_share <= 1:
            raise SegRLError(f"repeated_share={self.repeated_share}; expected a share above 0, at most 1")


@dataclass(frozen=True)
class CheckedText:
    """A text after the rules.

    Attributes:
        text: Without coordinates, with single spaces.
        problems: Each begins with one of `PROBLEMS` and a colon; empty if the text may stay.
        removed: Coordinates that were removed.

    Example:
        >>> CheckedText("A round cyst.", problems=()).removed
        ()
    """

    text: str
    problems: tuple[str, ...]
    removed: tuple[str, ...] = ()


def check_text(text: str, facts: Facts, settings: RuleSettings | None = None) -> CheckedText:
    """Apply the rules for single texts.

    Args:
        text: Reasoning.
        facts: Of its case.
        settings: What is asked of it.

    Raises:
        SegRLError: The extra `curation` is not installed.

    Example:
        >>> facts = Facts("cyst", "Breast", "Ultrasound", 1, "small", "upper left part", (0.1, 0.1, 0.3, 0.3))
        >>> text = "The tissue is regular. A dark cyst with a thin wall lies at [1, 2, 3, 4] in the upper left part."
        >>> check_text(text, facts).text
        'The tissue is regular. A dark cyst with a thin wall lies in the upper left part.'
        >>> check_text("The cyst is dark.", facts).problems
        ('length: 4 words, expected 12 to 250',)
    """
    settings = settings or RuleSettings()
    problems = [f"format: {found}"] if (found := find_format(text)) else []
    cleaned, removed = remove_positions(" ".join(text.split()))
    problems += [f"coordinates: {found}" for found in find_positions(cleaned)]
    words = len(cleaned.split())
    if not settings.min_words <= words <= settings.max_words:
        problems.append(f"length: {words} words, expected {settings.min_words} to {settings.max_words}")
    problems += [f"contradiction: {found}" for found in find_contradictions(cleaned, facts)]
    if found := find_language(cleaned, settings.language):
        problems.append(f"language: not {settings.language}: {found}")
    if found := find_chatter(cleaned):
        problems.append(f"boilerplate: {found}")
    if found := find_repetition(cleaned):
        problems.append(f"boilerplate: said twice: {found}")
    if found := find_annotation(cleaned):
        problems.append(f"annotation: {found}")
    if settings.language == "en" and not _is_about(cleaned.lower(), facts):
        problems.append("boilerplate: names neither the lesion nor where it is")
    return CheckedText(cleaned, tuple(problems), tuple(removed))


def check_corpus(
    texts: Sequence[str], facts: Sequence[Facts], settings: RuleSettings | None = None
) -> Mapping[int, str]:
    """Apply the rule for all texts together: boilerplate that many of them share.

    Args:
        texts: Reasoning by row, already checked one by one.
        facts: By row.
        settings: What is asked.

    Returns:
        The problem by number of the row.

    Example:
        >>> facts = Facts("cyst", "", "", 1, "small", "centre", (0.4, 0.4, 0.6, 0.6))
        >>> check_corpus(["The cyst is seen well."] * 2 + ["It is dark."], [facts] * 3)
        {0: 'boilerplate: shared with other texts', 1: 'boilerplate: shared with other texts'}
    """
    names = [(item.lesion, item.anatomy, item.location) for item in facts]
    found = repeated_sentences(texts, names=names, share=(settings or RuleSettings()).repeated_share)
    return {number: "boilerplate: shared with other texts" for number in sorted(found)}


def _is_about(text: str, facts: Facts) -> bool:
    return bool(re.search(lesion_nouns(facts.lesion), text) or _PLACE.search(text))
