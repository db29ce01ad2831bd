"""Who judges a text: another model than the writer's, or rules that need no server.

The score of a text is S = 0.3 S_normal + 0.3 S_lesion + 0.4 S_reason (CORE-Seg, section 3).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from segrl.curation.calls import Caller, Question
from segrl.curation.case import Case
from segrl.curation.endpoints import Endpoint
from segrl.curation.facts import Facts
from segrl.curation.prompts import Prompt
from segrl.curation.rule_facts import lesion_nouns
from segrl.curation.rule_positions import split_sentences
from segrl.curation.texts import TextSettings
from segrl.curation.writers import prompt_fields, shown_images, usable
from segrl.data.reasoning import count_word
from segrl.errors import SegRLError

__all__ = [
    "PARTS",
    "RULES",
    "Judge",
    "JudgeSettings",
    "ModelJudge",
    "RuleJudge",
    "Verdict",
    "check_judge",
    "total_score",
]

PARTS = ("normal", "lesion", "reasoning")
WEIGHTS = (0.3, 0.3, 0.4)  # of the parts, CORE-Seg
RULES = "rules"  # name of the judge that needs no server
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {**{part: {"type": "number"} for part in PARTS}, "remarks": {"type": "string"}},
    "required": [*PARTS, "remarks"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """The section `judge` of a build.

    Attributes:
        judge: Model that scores the texts; None scores by rules, without a server.
        second: Model that scores a sample again, to see whether judges agree; None has no second opinion.
        allow_same: Allow the model of the writer as its own judge.
        threshold: A text with a lower score is written again.
        rounds: How often a text is written again, with the judge's remarks.
        agreement_sample: Texts that the second judge scores.
        calibration: Texts with planted faults that the judge scores, to see how many it finds.

    Raises:
        SegRLError: A number out of range, or two judges that are one.

    Example:
        >>> JudgeSettings().threshold
        0.8
    """

    judge: Endpoint | None = None
    second: Endpoint | None = None
    allow_same: bool = False
    threshold: float = 0.8
    rounds: int = 2
    agreement_sample: int = 100
    calibration: int = 60

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise SegRLError(f"threshold={self.threshold}; expected a score from 0 to 1")
        for name in ("rounds", "agreement_sample", "calibration"):
            if getattr(self, name) < 0:
                raise SegRLError(f"{name}={getattr(self, name)}; expected at least 0")
        if self.judge is not None and self.second is not None and _same(self.judge.model, self.second.model):
            raise SegRLError(f"judge and second are both {self.judge.model!r}; expected two models")

    @property
    def judge_name(self) -> str:
        """Model of the judge, or "rules"."""
        return RULES if self.judge is None else self.judge.model


def check_judge(text: TextSettings, judge: JudgeSettings) -> None:
    """Refuse a judge that is the writer, whatever server it runs on.

    Raises:
        SegRLError: They are one model; it is named.

    Example:
        >>> model = Endpoint(url="http://localhost:8000/v1", model="m")
        >>> check_judge(TextSettings(writer=model), JudgeSettings(judge=model))
        Traceback (most recent call last):
        segrl.errors.SegRLError: the judge 'm' is the model of the writer, which likes its own texts; \
take another one, or set allow_same
    """
    for endpoint in (judge.judge, judge.second):
        if endpoint is not None and _same(endpoint.model, text.writer_name) and not judge.allow_same:
            raise SegRLError(
                f"the judge {endpoint.model!r} is the model of the writer, which likes its own texts; "
                "take another one, or set allow_same"
            )


@dataclass(frozen=True)
class Verdict:
    """Scores and remarks of a judge on a text.

    Attributes:
        scores: By part, from 0 to 1; empty if there is no verdict.
        remarks: What must be changed.
        reason: Why there is no verdict; "" if there is one.

    Example:
        >>> Verdict({"normal": 1.0, "lesion": 1.0, "reasoning": 0.5}).score
        0.8
    """

    scores: Mapping[str, float]
    remarks: str = ""
    reason: str = ""

    @property
    def score(self) -> float:
        """S; 0 if there is no verdict."""
        return total_score(self.scores) if self.scores else 0.0


def total_score(scores: Mapping[str, float]) -> float:
    """Compute S = 0.3 S_normal + 0.3 S_lesion + 0.4 S_reason, rounded to six digits.

    Example:
        >>> total_score({"normal": 1.0, "lesion": 0.5, "reasoning": 0.0})
        0.45
    """
    return round(sum(weight * scores[part] for part, weight in zip(PARTS, WEIGHTS, strict=True)), 6)


class Judge(Protocol):
    """Scores the reasoning of a case."""

    @property
    def name(self) -> str:
        """Model, or "rules"."""
        ...

    async def judge(self, case: Case, facts: Facts, query: str, reasoning: str, label: str) -> Verdict:
        """Return the verdict on a text; `label` says what it is for, in the file of kept calls."""
        ...


@dataclass(frozen=True)
class ModelJudge:
    """Asks a model for scores and remarks, in JSON.

    Args:
        caller: Asks the model.
        prompt: `judge`.
        outline: Whether a second image with the outline of the mask is shown.
    """

    caller: Caller
    prompt: Prompt
    outline: bool = True

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.caller.endpoint.model

    async def judge(self, case: Case, facts: Facts, query: str, reasoning: str, label: str) -> Verdict:
        """Return the verdict, as `Judge.judge`."""
        images = await asyncio.to_thread(shown_images, case, self.outline)
        text = self.prompt.fill(prompt_fields(facts, query, self.outline) | {"reasoning": reasoning})
        answer, reason = usable(await self.caller.ask(Question(text, images, SCHEMA, label)))
        return Verdict({}, reason=reason) if reason else read_verdict(answer)


@dataclass(frozen=True)
class RuleJudge:
    """Scores by what a text mentions: it cannot see whether that is true beyond what the mask says."""

    name: str = RULES

    async def judge(self, case: Case, facts: Facts, query: str, reasoning: str, label: str) -> Verdict:
        """Return the verdict, as `Judge.judge`."""
        return judge_by_rules(reasoning, facts)


def read_verdict(text: str) -> Verdict:
    """Read the JSON of a judge, also inside of a fence of code.

    Example:
        >>> read_verdict('{"normal": 1, "lesion": 0.5, "reasoning": 1, "remarks": "Name the side."}').score
        0.85
        >>> read_verdict('{"normal": 1, "lesion": 0.').reason
        'the verdict is no JSON object: {"normal": 1, "lesion": 0.'
        >>> read_verdict('{"normal": 7, "lesion": 1, "reasoning": 1, "remarks": ""}').reason
        'normal=7 in the verdict; expected a number from 0 to 1'
    """
    start, end = text.find("{"), text.rfind("}")
    try:
        content = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return Verdict({}, reason=f"the verdict is no JSON object: {text.strip()[:100]}")
    for part in PARTS:
        value = content.get(part)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            return Verdict({}, reason=f"{part}={value!r:.40} in the verdict; expected a number from 0 to 1")
    return Verdict({part: float(content[part]) for part in PARTS}, " ".join(str(content.get("remarks") or "").split()))


_ORDINARY = re.compile(
    r"\b(?:normal\w*|unremarkable|intact|regular|usual|healthy|undisturbed|expected|uninvolved|spared|symmetric\w*)\b"
)
_LOOK = re.compile(
    r"\b(?:dark\w*|bright\w*|grey|white|red\w*|brown|black|yellow|dens\w+|\w+dense|\w+intens\w*|\w+echoic|enhanc\w+|colou?r\w*"
    r"|outline\w*|border\w*|margin\w*|edge\w*|round\w*|oval|elongated|irregular|lobulated|spiculated|well-defined|texture"
    r"|even|uneven|homogen\w+|heterogen\w+|cystic|solid|necro\w+|signal|attenuation)\b"
)
_CONTRAST = re.compile(
    r"\b(?:unlike|differ\w*|distinguish\w*|apart|confounder\w*|artefact\w*|artifact\w*|rules? out|in contrast"
    r"|rather than|whereas|lack\w*|compared|otherwise|would|not|stands? out|exclude\w*|mimic\w*|benign"
    r"|because|therefore|so)\b"
)
_HINTS = {
    "ordinary": "say what is normal in the image",
    "anatomy": "name the anatomy",
    "lesion": "name the lesion",
    "look": "describe its brightness, outline and texture",
    "size": "say how large it is, and how many there are",
    "contrast": "say what tells it from normal tissue and from confounders",
    "place": "say in words where it is in the image",
}


def judge_by_rules(text: str, facts: Facts) -> Verdict:
    """Score a text by what it mentions.

    Args:
        text: Reasoning.
        facts: Of its case. Of an empty mask, neither place nor look are asked for.

    Example:
        >>> facts = Facts("cyst", "Breast", "Ultrasound", 1, "small", "upper left part", (0.1, 0.1, 0.3, 0.3))
        >>> verdict = judge_by_rules("The cyst in the upper left part is small and dark.", facts)
        >>> verdict.scores
        {'normal': 0.0, 'lesion': 1.0, 'reasoning': 0.5}
        >>> verdict.remarks
        'say what is normal in the image; name the anatomy; say what tells it from normal tissue and from confounders'
    """
    lower = text.lower()
    nouns = re.compile(lesion_nouns(facts.lesion))
    quiet = [sentence for sentence in split_sentences(lower) if _ORDINARY.search(sentence)]
    sides = [word for word in facts.location.split() if word != "part"]
    number = rf"\b(?:{facts.size}|{count_word(facts.count)}|single|solitary|mm|cm)\b"
    met = {
        "ordinary": bool(quiet),
        "anatomy": not facts.anatomy or any(word in lower for word in facts.anatomy.lower().split()) or len(quiet) > 1,
        "lesion": bool(nouns.search(lower)),
        "look": not facts.count or bool(_LOOK.search(lower)),
        "size": not facts.count or bool(re.search(number, lower)),
        "contrast": bool(_CONTRAST.search(lower)),
        "place": all(re.search(rf"\b{word}", lower) for word in sides),
    }
    scores = {
        "normal": (0.7 * met["ordinary"] + 0.3 * met["anatomy"]) if met["ordinary"] else 0.0,
        "lesion": round((met["lesion"] + met["look"] + met["size"]) / 3, 6),
        "reasoning": (met["contrast"] + met["place"]) / 2,
    }
    return Verdict(scores, "; ".join(hint for name, hint in _HINTS.items() if not met[name]))


def _same(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()
