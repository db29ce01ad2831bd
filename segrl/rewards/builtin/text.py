"""Rewards for the text alone: format, length and repetitions. None of them reads the ground truth.

Each runs in time linear in the text. Invisible characters are no text: a block of them is blank, and they count neither
as words nor as a difference between sentences. A format reward scores form only and belongs beside a reward for the
content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from segrl.predictions.characters import is_blank, visible_text
from segrl.predictions.prediction import Prediction
from segrl.rewards.builtin.rules import ALL_INVARIANCES, JSON_ANSWERS, check_setting, json_answer
from segrl.rewards.registry import register_reward

__all__ = ["json_format", "length_budget", "non_repeat", "repetition", "think_answer_format"]

Part = Literal["text", "reasoning", "answer"]
Unit = Literal["words", "characters"]

_TAG = re.compile(r"</?(?:think|answer)>")
_GRAMMAR = ["<think>", "</think>", "<answer>", "</answer>"]
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？\n]")  # one character each: linear on a text of dots


@register_reward(
    "think_answer_format",
    needs_target=False,
    range=(0.0, 1.0),
    empty={"both": 1.0, "prediction": 1.0, "target": 1.0},
    invariant=ALL_INVARIANCES,
    equation="[text = <think>…</think><answer>…</answer>]; graded: rules kept / 4",
    source="DeepSeek-R1 and its followers",
)
def think_answer_format(prediction: Prediction, target: Any, *, graded: bool = False) -> float:
    """Return 1.0 for a text of one reasoning block and one answer block, whatever they hold, else 0.0.

    The four rules: exactly one reasoning block and exactly one answer block, neither blank nor holding a tag of the
    grammar; the reasoning comes first; only white space is outside of them. The last two count only if the first two
    are kept, and a repeated tag breaks the rule of its block, so that more tags never score higher.

    Args:
        prediction: Only its text is read.
        target: Not read.
        graded: Return the share of the four rules that are kept.

    Returns:
        0.0 or 1.0; with `graded` 0, 0.25, 0.5, 0.75 or 1. The empty text scores 0.0.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> text = '<think>Dark.</think> So: <answer>here</answer>'
        >>> think_answer_format(read_answer(text, CompletionFormat()), None, graded=True)
        0.75
    """
    body = prediction.text.strip()
    tags = list(_TAG.finditer(body))
    names = [tag.group() for tag in tags]
    kept = 0
    for opening, closing in (_GRAMMAR[:2], _GRAMMAR[2:]):
        if names.count(opening) == names.count(closing) == 1:
            first = names.index(opening)
            is_block = names[first : first + 2] == [opening, closing]
            kept += is_block and not is_blank(body[tags[first].end() : tags[first + 1].start()])
    if kept == 2:
        outside = body[: tags[0].start()], body[tags[1].end() : tags[2].start()], body[tags[3].end() :]
        kept += (names == _GRAMMAR) + (not any(text.strip() for text in outside))
    return kept / 4 if graded else float(kept == 4)


@register_reward(
    "json_format",
    completion_format=JSON_ANSWERS,
    needs_target=False,
    range=(0.0, 1.0),
    invariant=ALL_INVARIANCES,
    equation="[every object is well formed and has the keys]; graded: mean over objects of keys there / keys wanted",
    source="VisionReasoner (graded), Seg-Zero (strict)",
)
def json_format(
    prediction: Prediction, target: Any, *, graded: bool = False, keys: Sequence[str] = ("bbox_2d",)
) -> float:
    """Return 1.0 for an answer in the JSON schema of `segrl.predictions.json_answers` with all keys, else 0.0.

    The answer must be JSON as a whole, in a code fence or not, up to a token in angle brackets at its end; text around
    it, two answers or two JSON values score 0.0. An object that repeats the values of an earlier one counts as
    malformed.

    Args:
        prediction: Only its one answer is read; `think_answer_format` scores the rest of the text.
        target: Not read.
        graded: Return the mean over the objects of the share of keys they have (0 for a malformed object).
        keys: Keys that each object needs.

    Returns:
        A score in [0, 1]; 1.0 for `[]` and `{}`, the answers for nothing found; 0.0 without an answer.

    Raises:
        RewardError: If `keys` is empty or not a list of texts.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> text = '<think>Dark.</think><answer>[{"bbox_2d": [0, 0, 8, 8]}, {}]</answer>'
        >>> json_format(read_answer(text, CompletionFormat()), None, graded=True)
        0.5
    """
    wanted = [] if isinstance(keys, str) else list(keys)
    check_setting(bool(wanted) and all(isinstance(key, str) for key in wanted), "keys", keys, 'a list as ["bbox_2d"]')
    answer = json_answer(prediction)
    if not answer.objects:
        return float(answer.well_formed)
    seen: set[str] = set()
    total = 0.0
    for item in answer.objects:
        if item is None:
            continue
        try:
            values = repr([item.get(key) for key in wanted])
        except RecursionError:  # a value nested too deep to be compared
            continue
        if values not in seen:
            total += sum(item.get(key) is not None for key in wanted) / len(wanted)
        seen.add(values)
    score = total / len(answer.objects)
    return score if graded else float(score == 1.0 and answer.well_formed)


@register_reward(
    "length_budget",
    needs_target=False,
    range=(0.0, 1.0),
    invariant=ALL_INVARIANCES,
    equation="min(1, length / minimum, 1 − (length − limit) / margin), not below 0",
    source="PixelThink, soft length penalty",
)
def length_budget(
    prediction: Prediction,
    target: Any,
    *,
    limit: int = 256,
    margin: int = 500,
    minimum: int = 1,
    unit: Unit = "words",
    part: Part = "text",
    require_valid: bool = True,
) -> float:
    """Return 1.0 for a text within its budget, and linearly less for one that is longer or shorter.

    Args:
        prediction: Only its text is read.
        target: Not read.
        limit: Longest text that scores 1.0.
        margin: A text longer than the limit by this much scores 0.0; with 0 every longer one does.
        minimum: Shortest text that scores 1.0; half as long scores 0.5.
        unit: "words" are separated by white space; "characters" do not count white space (for languages without it).
        part: "text", "reasoning" or "answer".
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]; 0.0 for a missing or blank part if `minimum` is positive.

    Raises:
        RewardError: If a number is negative, `minimum` exceeds `limit`, or `unit` or `part` does not exist.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> text = '<think>Dark. Round. Dark.</think><answer>It is here.<seg></answer>'
        >>> length_budget(read_answer(text, CompletionFormat()), None, limit=2, margin=4, part="reasoning")
        0.75
    """
    check_setting(0 <= minimum <= limit, "minimum", minimum, f"a number from 0 to limit={limit}")
    check_setting(margin >= 0, "margin", margin, "0 or more")
    length = _length(_part(prediction, part), unit)
    if require_valid and not prediction.valid:
        return 0.0
    if length < minimum:
        return length / minimum
    over = length - limit
    return 1.0 if over <= 0 else max(0.0, 1 - over / margin) if margin else 0.0


@register_reward(
    "repetition",
    needs_target=False,
    range=(0.0, 1.0),
    invariant=ALL_INVARIANCES,
    equation="different n-grams / n-grams",
    source="VLM-R1 (6-grams of the whole text, as a penalty)",
)
def repetition(
    prediction: Prediction,
    target: Any,
    *,
    n: int = 4,
    unit: Unit = "words",
    part: Part = "reasoning",
    require_valid: bool = True,
) -> float:
    """Return the share of runs of `n` words that do not repeat an earlier run.

    Args:
        prediction: Only its text is read.
        target: Not read.
        n: Words in a run, 1 to 16; case does not count.
        unit: As in `length_budget`.
        part: "text", "reasoning" or "answer".
        require_valid: Return 0.0 for an invalid text.

    Returns:
        A score in [0, 1]: 1.0 if nothing is repeated, or if the part is shorter than one run; 0.0 if it is missing or
        blank.

    Raises:
        RewardError: If `n` is out of its range, or `unit` or `part` does not exist.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> text = '<think>Dark. Round. Dark.</think><answer>It is here.<seg></answer>'
        >>> round(repetition(read_answer(text, CompletionFormat()), None, n=1), 4)
        0.6667
    """
    check_setting(isinstance(n, int) and 1 <= n <= 16, "n", n, "a whole number from 1 to 16")
    text = _part(prediction, part).casefold()
    units = text.split() if _is_words(unit) else "".join(text.split())
    if not units or (require_valid and not prediction.valid):
        return 0.0
    runs = max(len(units) - n + 1, 1)
    return len(set(zip(*(units[start:] for start in range(n)), strict=False)) or {()}) / runs


@register_reward(
    "non_repeat",
    needs_target=False,
    range=(0.0, 1.0),
    invariant=ALL_INVARIANCES,
    equation="[sentences that were there before ≤ allowed]",
    source="VisionReasoner, non-repeat reward",
)
def non_repeat(
    prediction: Prediction, target: Any, *, allowed: int = 1, part: Part = "reasoning", require_valid: bool = True
) -> float:
    """Return 1.0 unless sentences are repeated.

    A sentence ends at `.`, `!` or `?` before white space, at their full-width forms, or at a line break. Case and
    spaces do not count.

    Args:
        prediction: Only its text is read.
        target: Not read.
        allowed: Number of repeated sentences that is tolerated (VisionReasoner: 1).
        part: "text", "reasoning" or "answer".
        require_valid: Return 0.0 for an invalid text.

    Returns:
        0.0 or 1.0; 0.0 for a missing or blank part.

    Raises:
        RewardError: If `allowed` is negative or `part` does not exist.

    Example:
        >>> from segrl.predictions import CompletionFormat, read_answer
        >>> text = '<think>Dark. Round. Dark.</think><answer>It is here.<seg></answer>'
        >>> non_repeat(read_answer(text, CompletionFormat()), None, allowed=0)
        0.0
    """
    check_setting(allowed >= 0, "allowed", allowed, "0 or more")
    text = _part(prediction, part).casefold()
    sentences = [" ".join(words) for words in map(str.split, _SENTENCE_END.split(text)) if words]
    if not sentences or (require_valid and not prediction.valid):
        return 0.0
    return float(len(sentences) - len(set(sentences)) <= allowed)


def _part(prediction: Prediction, part: str) -> str:
    check_setting(part in ("text", "reasoning", "answer"), "part", part, "'text', 'reasoning' or 'answer'")
    text = getattr(prediction, part) or ""
    return "" if is_blank(text) else visible_text(text)


def _is_words(unit: str) -> bool:
    check_setting(unit in ("words", "characters"), "unit", unit, "'words' or 'characters'")
    return unit == "words"


def _length(text: str, unit: str) -> int:
    words = text.split()
    return len(words) if _is_words(unit) else sum(map(len, words))
