"""Contradictions between a text and what is known: side, modality, count and size of the lesion.

Only claims that can be checked are: sides of the image, not of the body, which lie the other way round in many views;
other modalities as the one in which the picture was taken, not as further advice.
"""

from __future__ import annotations

import re
from functools import lru_cache

from segrl.curation.facts import Facts
from segrl.curation.rule_positions import split_sentences
from segrl.data.reasoning import plural

__all__ = ["find_contradictions", "lesion_nouns"]

_CLAUSE = re.compile(r"[;:]\s|,\s|\b(?:while|whereas|but|although|unlike|compared)\b")
_CALM = re.compile(  # the clause is about something else than the lesion, or denies it
    r"\b(?:normal(?:ly)?|unremarkable|intact|regular|symmetric\w*|unaffected|uninvolved|spared|free|healthy|clear|no|not"
    r"|without|absent|absence|lacks?|other|others|contralateral|opposite|neither|nor|away|elsewhere|rest|remaining"
    r"|remainder|surrounding|rather|would|could|if|similar|mimics?|confound\w*|another)\b"
)
_PICTURE = r"(?:image|picture|frame|scan|slice|view|photograph|photo|radiograph|film|field|section)"
_PLACE = r"(?:part|half|third|quarter|quadrant|corner|side|edge|border|area|portion|region|aspect|zone|margin)"
_SIDE = r"((?:(?:upper|lower|top|bottom|left|right)(?:[- ]|most\s)?){1,3})"
_OF_IMAGE = re.compile(
    rf"\b{_SIDE}\s{{0,2}}(?:hand\s|most\s)?(?:{_PLACE}|of)\s(?:\w+\s){{0,3}}?{_PICTURE}\b"
    rf"|\b{_PICTURE}(?:'s)?\s{_SIDE}\s{{0,2}}(?:{_PLACE}\b|$)"
    rf"|\bthe\s(?:\w+\s){{0,1}}?{_SIDE}\s{{0,2}}(?:part|half|third|corner)\b(?!\s(?:of|lobe|pole))"
)
_WORDS = {"upper": "upper", "top": "upper", "lower": "lower", "bottom": "lower", "left": "left", "right": "right"}

_MODALITIES: dict[str, tuple[str, str]] = {  # how metadata name it, and words that only it deserves
    "CT": (
        r"\bct\b|computed tomograph|\bcta\b|\bpet",
        r"\bCT\b|[Cc]omputed tomogra|Hounsfield|\bHU\b|\b(?:hypo|hyper|iso)(?:dense|attenuat)|\battenuation\b",
    ),
    "MR": (
        r"\bmri?\b|magnetic",
        r"\bMRI?\b|[Mm]agnetic resonance|\bT[12][- ]?(?:weighted|w\b)|\bFLAIR\b|\bDWI\b|[Rr]estrict\w* diffusion"
        r"|[Dd]iffusion restrict|[Gg]adolinium|\b(?:hypo|hyper|iso)intens",
    ),
    "ultrasound": (
        r"ultraso|sonogra|\bus\b|echogra|echocardio",
        r"[Uu]ltraso|[Ss]onogra|\b(?:hypo|hyper|iso|an)echoic|[Ee]chogenic|[Dd]oppler|[Aa]coustic shadow",
    ),
    "X-ray": (
        r"x-?\s?ray|radiogra|\bcxr\b|mammogra|\bdr\b",
        r"[Rr]adiogra|\bX-?[Rr]ay|[Mm]ammogra",
    ),
    "dermoscopy": (
        r"dermo|dermato|skin",
        r"[Dd]erm(?:at)?oscop|[Pp]igment network|[Bb]lue-white (?:veil|structure)",
    ),
    "endoscopy": (r"endosc|colonosc|gastrosc|cystosc", r"[Ee]ndoscop|[Cc]olonoscop|[Gg]astroscop"),
    "fundus": (
        r"fundus|retin|\boct\b|ophthal|coherence",
        r"[Ff]undus photo|[Ff]undusco|[Ff]undosco|[Oo]phthalmosc|\bmacula\b|[Oo]ptic disc|[Oo]ptic nerve head",
    ),
    "histology": (
        r"histo|patholog|microscop|h&e|cytolog",
        r"\bH&E\b|[Hh]a?ematoxylin|[Mm]icroscop|[Ss]taining\b|[Hh]istolog\w* (?:section|slide)",
    ),
}
_ADVICE = re.compile(
    r"\b(?:would|could|should|might|may|help\w*|recommend\w*|advi[sc]e\w*|follow-?up|correlat\w*|further|prior|previous"
    r"|earlier|unlike|not|if|confirm\w*|additional|next|compar\w*|contrast to)\b"
)
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
            "both": 2, "couple": 2, "several": 3, "multiple": 3, "numerous": 6, "many": 6}  # fmt: skip
_GENERIC = ("lesion", "focus", "foci", "nodule", "mass", "masses", "tumou?r", "finding", "abnormality", "abnormalities",
            "growth", "spot", "patch", "neoplasm")  # fmt: skip
_SMALL = r"(?:small|tiny|minute|little|minuscule|punctate|pinpoint)"
_LARGE = r"(?:large|huge|big|massive|extensive|giant|enormous|bulky|sizeable)"
_MOST = re.compile(
    rf"\b(?:(?:large|major|greater) (?:part|portion)|most|majority|(?:more than |over |almost |nearly )?half)\s"
    rf"(?:of\s)(?:the|this)\s(?:whole\s|entire\s)?{_PICTURE}|\bdominates\b.{{0,20}}{_PICTURE}"
)


def lesion_nouns(lesion: str) -> str:
    """Return a pattern of names of a lesion in lower case: its own, the last word of that, or a general one.

    Example:
        >>> [bool(re.search(lesion_nouns("breast tumour"), text)) for text in ("two tumours", "a vessel")]
        [True, False]
    """
    name = lesion.casefold().strip()
    own = {name, name.split()[-1]} if name else set()
    words = {re.escape(word) for word in own} | {re.escape(plural(word)) for word in own}
    return rf"\b(?:{'|'.join(sorted(words, key=len, reverse=True))}{'|' if words else ''}(?:{'|'.join(_GENERIC)})s?)\b"


def find_contradictions(text: str, facts: Facts) -> list[str]:
    """Return what a text says that cannot be true, with the kind in front.

    Args:
        text: Reasoning.
        facts: Of its case. Empty metadata contradict nothing, nor does an empty mask.

    Example:
        >>> facts = Facts("cyst", "Breast", "Ultrasound", 1, "small", "upper left part", (0.1, 0.1, 0.3, 0.3))
        >>> find_contradictions("The cyst is in the right part of the image. MRI would help.", facts)
        ["side: 'right', the mask is in the upper left part"]
        >>> find_contradictions("Three cysts are seen. They are hypodense. The cyst is huge.", facts)
        ["count: 'three cysts', the mask has 1", "modality: 'hypodense' of CT, not of Ultrasound", \
"size: 'cyst is huge', the mask is small"]
    """
    problems = []
    for sentence in split_sentences(text):
        clauses = [clause for clause in _CLAUSE.split(sentence) if clause.strip()]
        problems += [problem for clause in clauses for problem in _side(clause.lower(), facts)]
        problems += _modality(sentence, facts)
        problems += [problem for clause in clauses for problem in _count_and_size(clause.lower(), facts)]
    return list(dict.fromkeys(problems))


def _side(clause: str, facts: Facts) -> list[str]:
    if not facts.count or _CALM.search(clause):
        return []
    x1, y1, x2, y2 = facts.extent
    wrong = {"left": x1 >= 0.5, "right": x2 <= 0.5, "upper": y1 >= 0.5, "lower": y2 <= 0.5}
    found = []
    for match in _OF_IMAGE.finditer(clause):
        words = " ".join(filter(None, match.groups()))
        named = {_WORDS[word] for word in re.findall(r"upper|lower|top|bottom|left|right", words)}
        found += [f"side: {word!r}, the mask is in the {facts.location}" for word in sorted(named) if wrong[word]]
    return found


@lru_cache(maxsize=1024)
def _claims(lesion: str) -> dict[str, re.Pattern[str]]:
    """Compile what is claimed of a lesion: "many" and "one" of it, and its size."""
    nouns = lesion_nouns(lesion)
    verb = r"(?:is|are|appears?|looks?|remains?)\s(?:only\s|very\s|rather\s|quite\s|an?\s)*"
    patterns = {
        "many": rf"\b({'|'.join(_NUMBERS)}|\d{{1,3}})\s(?!%)(?:[a-z-]+\s){{0,3}}?(?:of\s)?({nouns})",
        "one": rf"\b(?:single|solitary|(?:only|exactly|just) one|sole|isolated|one)\s(?:[a-z-]+\s){{0,2}}?{nouns}",
    }
    for name, words in (("small", _SMALL), ("large", _LARGE)):
        patterns[name] = rf"\b{words}\s(?:[a-z-]+\s){{0,2}}?{nouns}|(?:{nouns}|\bit|\bthey)\s{verb}{words}\b"
    return {name: re.compile(pattern) for name, pattern in patterns.items()}


@lru_cache(maxsize=256)
def _foreign(modality: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Return the other modalities with their words; nothing for a modality that is not known here."""
    own = {name for name, (names, _) in _MODALITIES.items() if re.search(names, modality.casefold())}
    return tuple((name, re.compile(words)) for name, (_, words) in _MODALITIES.items() if own and name not in own)


def _modality(sentence: str, facts: Facts) -> list[str]:
    if _ADVICE.search(sentence.lower()):
        return []
    return [
        f"modality: {found.group()!r} of {name}, not of {facts.modality}"
        for name, words in _foreign(facts.modality)
        if (found := words.search(sentence))
    ]


def _count_and_size(clause: str, facts: Facts) -> list[str]:
    if not facts.count or _CALM.search(clause):
        return []
    claims = _claims(facts.lesion)
    problems = []
    for match in claims["many"].finditer(clause):
        word, noun = match.groups()
        count = _NUMBERS.get(word) or int(word)
        plural_of_it = noun.endswith("s") or noun == "foci"
        vague = word in ("several", "multiple", "numerous", "many", "both", "couple")
        far = facts.count == 1 or (not vague and max(count, facts.count) > 2 * min(count, facts.count))
        if plural_of_it and count >= 2 and far:
            problems.append(f"count: {match.group()!r}, the mask has {facts.count}")
    if facts.count > 1 and (found := claims["one"].search(clause)) and not re.search(r"\bone of\b", clause):
        problems.append(f"count: {found.group()!r}, the mask has {facts.count}")
    for claimed, opposite in (("small", "large"), ("large", "small")):
        found = claims[claimed].search(clause) or (_MOST.search(clause) if claimed == "large" else None)
        if found and facts.size == opposite:
            problems.append(f"size: {found.group()!r}, the mask is {facts.size}")
    return problems
