"""Faults that a text shows by itself: format, chatter, language, and sentences that come back."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from segrl.curation.packages import require
from segrl.curation.rule_positions import split_sentences
from segrl.errors import unknown_name

__all__ = [
    "LANGUAGES",
    "find_annotation",
    "find_chatter",
    "find_format",
    "find_language",
    "find_repetition",
    "repeated_sentences",
]

_FORMAT = re.compile(
    r"</?\|?[A-Za-z_][\w|]{0,30}/?>|<\|"  # tags
    r"|(?m:^\s{0,4}(?:#{1,6}\s|[-*•–]\s|\d{1,2}[.)]\s))"  # headings and lists
    r"|\*\*|__\w|```|\\\(|\\\[|\{\s*\""  # bold, code, formulas, JSON
    r"|(?im:^\s{0,4}(?:assistant|user|system|reasoning|perception|answer|findings|impression|step \d{1,2})\s{0,2}:)"
    r"|(?m:^\s{0,4}[A-Z]\w{0,20}(?: \w{1,20}){0,2}:\s)"  # other labels
    r"|\"\w{1,20}\"\s?:|\[[A-Z]{2,9}\]|`"  # keys, special tokens
)
_END = re.compile(r"[.!?][\"')\]”’]*$")
_CHATTER = re.compile(
    r"\bas an (?:ai|assistant)\b|\blanguage model\b|\bi(?:'m| am) (?:sorry|unable|not able|happy|glad|here)\b"
    r"|\bi (?:can(?:no|')?t|cannot|could|can|will|would|have|hope|do not|don't|see|observe|think|notice|apologi[sz]e)\b"
    r"|\bunable to (?:view|see|help|provide|assist|access)\b"
    r"|\b(?:healthcare|medical) (?:professional|advice|provider)\b"
    r"|\bconsult (?:a|an|your|with)\b|\bfeel free\b|^(?:sure|certainly|of course|absolutely|okay|great)\b[!,.]"
    r"|\bhere(?:'s| is| are) (?:the|a|an|my|your)\b|\bas requested\b|\banything else\b"
    r"|^i(?:'\w{1,2})?\s|\b(?:my|you|your|user|let me|let us|let's|sorry|apologies|thanks?|hope|hopefully)\b"
    r"|\b(?:doctor|physician|specialist|clinician|disclaimer|caution|generated automatically|automatically generated)\b"
    r"|\b(?:medical|professional) diagnosis\b|\bnot be used for\b|\bthe (?:prompt|instructions?|question says)\b"
)
_ANNOTATION = re.compile(
    r"\bground[- ]truth\b|\bannotat\w+|\bsegmentation mask\b|\bthe (?:given |provided )?mask\b|\bhighlighted\b"
    r"|\b(?:red|green|yellow|coloured|colored|drawn|white) (?:outline|contour|line|box|overlay|border|marking)\b"
    r"|\boutlined (?:in|by|region|area)\b|\bmarked (?:in|by|region|area|with)\b|\bsecond (?:image|picture)\b"
)
_FEWEST, _LETTERS = 4, 20  # words and letters of a sentence whose language can be told
_MARGIN = 6.0  # of the logarithm of likelihoods by which another language must be ahead
_SCRIPT = {
    **{"zh": "CJK", "ja": "CJK", "ko": "HANGUL", "ru": "CYRILLIC", "uk": "CYRILLIC", "ar": "ARABIC"},
    **{"fa": "ARABIC", "hi": "DEVANAGARI", "he": "HEBREW", "th": "THAI", "el": "GREEK"},
}
# Languages that a sentence may be taken for; of the 140 that the model knows, many are close to medical English.
LANGUAGES = tuple(
    "en de fr es it pt nl pl ru uk tr vi id sv da cs ro hu el zh ja ko ar hi fa he th".split()  # noqa: SIM905
)
# Words that none of the others has.
_ENGLISH = frozenset(
    (
        *(
            "the",
            "and",
            "with",
            "which",
            "its",
            "from",
            "that",
            "are",
            "than",
            "this",
            "those",
            "these",
            "lies",
            "seen",
        ),
        *("their", "there", "where", "has", "have", "not", "any", "other", "around", "within", "between", "below"),
        *("above", "would", "could", "shows", "image", "left", "right", "upper", "lower"),
    )
)


def find_format(text: str) -> str:
    """Return tags, markup, lists or labels of a text, or how it breaks off; "" if there is nothing of the kind.

    Example:
        >>> find_format("The rim is thin.</think>"), find_format("The rim"), find_format("The rim is < 2 mm.")
        ('</think>', 'ends within a sentence', '')
    """
    if found := _FORMAT.search(text):
        return found.group().strip()
    return "" if not text.strip() or _END.search(text.strip()) else "ends within a sentence"


def find_chatter(text: str) -> str:
    """Return what an assistant says to its user, refusals among it; "" if there is nothing of the kind.

    Example:
        >>> find_chatter("I'm sorry, but I can't help with that."), find_chatter("A type I lesion.")
        ("i'm sorry", '')
    """
    for sentence in split_sentences(text.replace("’", "'")):
        if found := _CHATTER.search(sentence.lower()):
            return found.group()
    return ""


def find_annotation(text: str) -> str:
    """Return a mention of mask or outline, which whoever is asked later does not see; "" if there is none.

    Example:
        >>> find_annotation("The area in the red outline is dark.")
        'red outline'
    """
    found = _ANNOTATION.search(text.lower())
    return found.group() if found else ""


def find_language(text: str, language: str) -> str:
    """Return the first sentence in another language; "" if there is none. Short sentences are not judged.

    Args:
        text: Text.
        language: ISO 639-1 code.

    Raises:
        SegRLError: The extra `curation` is not installed.
        UnknownNameError: The language is not known.

    Example:
        >>> find_language("It is dark. Der Befund ist gut vom umgebenden Gewebe abgegrenzt.", "en")
        'Der Befund ist gut vom umgebenden Gewebe abgegrenzt.'
    """
    if language not in LANGUAGES:
        raise unknown_name("language", language, LANGUAGES)
    for sentence in split_sentences(re.sub(r"([。！？])", r"\1 ", text)):
        letters = [letter for letter in sentence if letter.isalpha()]
        foreign = sum(not _is_own(letter, language) for letter in letters)
        if foreign > 0.3 * len(letters):
            return sentence
        if language == "en" and sentence.isascii() and _is_plain_english(sentence):
            continue
        if language in _SCRIPT or (len(sentence.split()) >= _FEWEST and len(letters) >= _LETTERS):
            scores = dict(_identifier().rank(sentence.casefold()))
            if max(scores.values()) - scores[language] > _MARGIN:
                return sentence
    return ""


def find_repetition(text: str) -> str:
    """Return a sentence that comes back, or "the same words" for a loop without full stops; "" if there is none.

    Example:
        >>> find_repetition("The rim is thick and dark. It is. The rim is thick and dark.")
        'The rim is thick and dark.'
    """
    sentences = split_sentences(text)
    counts = Counter(_normal(sentence) for sentence in sentences)
    for sentence in sentences:
        if counts[_normal(sentence)] > 1 and len(sentence.split()) >= _FEWEST:
            return sentence
    words = re.findall(r"\w+", text.casefold())
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return "the same words" if len(runs) > 20 and len(set(runs)) < 0.6 * len(runs) else ""


def repeated_sentences(texts: Sequence[str], *, names: Sequence[Sequence[str]] = (), share: float = 0.2) -> set[int]:
    """Return which texts are boilerplate: mostly made of sentences that other texts of a data set have as well.

    Args:
        texts: Of all rows.
        names: Words by text that do not tell one from another, such as the names of lesion and anatomy.
        share: A sentence is boilerplate in more than this share of the texts, but at least in 5 of them. The same whole
            text is in 2.

    Returns:
        Their numbers. Of equal texts all.

    Example:
        >>> sorted(repeated_sentences(["It lies in the upper part.", "It is round.", "It lies in the upper part."]))
        [0, 2]
    """
    names = names or [()] * len(texts)
    rows = [
        [_normal(sentence, words) for sentence in split_sentences(text)]
        for text, words in zip(texts, names, strict=True)
    ]
    whole = Counter(" ".join(row) for row in rows)
    counts = Counter(sentence for row in rows for sentence in set(row))
    most = max(4, share * len(texts))
    found = set()
    for number, row in enumerate(rows):
        stock = sum(counts[sentence] > most for sentence in row)
        if row and (whole[" ".join(row)] > 1 or stock > 0.7 * len(row)):
            found.add(number)
    return found


def _is_plain_english(sentence: str) -> bool:
    """Return whether a sentence has enough words that only English has, so that the model need not be asked."""
    words = re.findall(r"[a-z]+", sentence.casefold())
    own = sum(word in _ENGLISH for word in words)
    return own >= 2 and own >= 0.2 * len(words)


def _normal(sentence: str, names: Sequence[str] = ()) -> str:
    text = sentence.casefold()
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(name.casefold(), "NAME")
    return " ".join(re.sub(r"\d+", "0", text).split())


@lru_cache(maxsize=4096)
def _is_own(letter: str, language: str) -> bool:
    script = _SCRIPT.get(language, "LATIN")
    name = unicodedata.name(letter, "")
    known = (script, "HIRAGANA", "KATAKANA") if language == "ja" else (script,)
    return any(word in name for word in known) or name.startswith(("LATIN SMALL LETTER", "LATIN CAPITAL LETTER")) or (
        "GREEK" in name and len(letter) == 1  # alpha, beta: used in medical names
    )  # fmt: skip


@lru_cache(maxsize=1)
def _identifier() -> Any:
    langid = require("py3langid.langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    identifier.set_languages(LANGUAGES)
    return identifier
