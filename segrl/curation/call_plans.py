"""Calls, tokens and cost of a build, before any call is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from segrl.curation.calls import image_tokens, text_tokens
from segrl.curation.endpoints import Endpoint
from segrl.curation.facts import Facts
from segrl.curation.prompts import read_prompts
from segrl.curation.settings import CurationSettings
from segrl.curation.writers import prompt_fields
from segrl.errors import SegRLError

__all__ = [
    "CallPlan",
    "PlanAssumptions",
    "PlanStage",
    "SourceSize",
    "answer_limit",
    "call_limits",
    "planned_calls",
]

PlanStage = Literal["difficulty", "write", "judge", "publish"]


@dataclass(frozen=True, kw_only=True)
class PlanAssumptions:
    """Numbers that nobody knows before the build.

    Attributes:
        hard: Share of the cases that are hard; on six real sets 0.31 (`docs/log.md`), the paper keeps 0.046 after all
            its stages.
        again: Share of the texts of a round that rules or judge refuse. A guess.
        text_tokens: Of one answer of the writer, of whom the prompts ask for two short paragraphs. A guess.
        verdict_tokens: Of one answer of a judge. A guess.
        training_rate: Images a second that a GPU trains a U-Net on, and three times as many that it predicts; None
            gives no GPU hours.
        read_rate: Tokens of questions a second and GPU of a server of your own; None gives no GPU hours.
        write_rate: Tokens of answers a second and GPU; None gives no GPU hours.

    Raises:
        SegRLError: A share that is not from 0 to 1, or another number that is not positive.

    Example:
        >>> PlanAssumptions(hard=3)
        Traceback (most recent call last):
        segrl.errors.SegRLError: hard=3; expected a share from 0 to 1
    """

    hard: float = 0.31
    again: float = 0.3
    text_tokens: int = 150
    verdict_tokens: int = 60
    training_rate: float | None = None
    read_rate: float | None = None
    write_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("hard", "again"):
            if not 0 <= getattr(self, name) <= 1:
                raise SegRLError(f"{name}={getattr(self, name)}; expected a share from 0 to 1")
        for name in ("text_tokens", "verdict_tokens", "training_rate", "read_rate", "write_rate"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise SegRLError(f"{name}={value}; expected a positive number")


@dataclass(frozen=True)
class SourceSize:
    """Size of one source.

    Attributes:
        source: Its name.
        shapes: Number of cases by (width, height) of their images, pixels.
        file_bytes: Of image and mask of one case, the mean.
        made: Number of cases whose files the build makes, since the source has another layout.
        lesion: A typical name, for the length of prompts.
        anatomy: The same.
        modality: The same.

    Example:
        >>> SourceSize("mine", {(512, 512): 300}, 2e5).cases
        300
    """

    source: str
    shapes: Mapping[tuple[int, int], int]
    file_bytes: float
    made: int = 0
    lesion: str = "lesion"
    anatomy: str = "Abdomen"
    modality: str = "Ultrasound"

    @property
    def cases(self) -> int:
        """Number of cases."""
        return sum(self.shapes.values())


@dataclass(frozen=True)
class CallPlan:
    """Calls of one model in one stage. Pairs are (expected, at most); calls that are repeated after a fault are extra.

    Attributes:
        stage: "write" or "judge".
        role: "writer", "judge" or "second".
        model: Its name.
        calls: Number.
        tokens_in: Tokens of the questions.
        tokens_out: Tokens of the answers; at most `max_tokens` each.
        cost: At the endpoint's prices.
        gpu_hours: Expected, on a server of your own; None without rates.

    Example:
        >>> CallPlan("write", "writer", "m", (2, 4), (900, 1800), (300, 4096), (0.0, 0.0)).calls
        (2, 4)
    """

    stage: PlanStage
    role: str
    model: str
    calls: tuple[int, int]
    tokens_in: tuple[int, int]
    tokens_out: tuple[int, int]
    cost: tuple[float, float]
    gpu_hours: float | None = None


def planned_calls(
    chosen: Sequence[SourceSize], number: tuple[int, int], settings: CurationSettings, known: PlanAssumptions
) -> Iterator[CallPlan]:
    """Yield the calls of every model; `number` of the cases of `chosen` are hard."""
    writer, judging = settings.write.writer, settings.judge
    rounds = range(1, judging.rounds + 1)
    again = sum(known.again**round for round in rounds), judging.rounds  # further texts of one case
    if writer is not None:
        ask = _questions(chosen, writer, settings, known)
        first, second = ask(("perception", "reasoning"), False), ask(("perception", "reasoning"), True)
        yield _calls("write", "writer", writer, number, (1, 1), 2, first, known)
        if judging.rounds:
            yield _calls("judge", "writer", writer, number, again, 2, second, known)
    if judging.judge is not None:
        ask = _questions(chosen, judging.judge, settings, known)
        verdict = ask(("judge",), False)
        rest = judging.calibration if number[1] else 0
        yield _calls("judge", "judge", judging.judge, number, (1 + again[0], 1 + again[1]), 1, verdict, known, rest)
    if judging.second is not None:
        ask = _questions(chosen, judging.second, settings, known)
        sample = tuple(min(judging.agreement_sample, n) for n in number)
        yield _calls("judge", "second", judging.second, sample, (1, 1), 1, ask(("judge",), False), known)


def _questions(
    chosen: Sequence[SourceSize], endpoint: Endpoint, settings: CurationSettings, known: PlanAssumptions
) -> Callable[[Sequence[str], bool], tuple[float, float]]:
    """Return a function that gives the mean tokens of the questions of one case, (expected, at most)."""
    prompts, outline = read_prompts(settings.write.prompts), settings.write.outline
    total = max(1, sum(source.cases for source in chosen))

    def tokens(names: Sequence[str], rewritten: bool) -> tuple[float, float]:
        found = [0.0, 0.0]
        for source in chosen:
            seen = sum(n * image_tokens(size, endpoint.max_edge) for size, n in source.shapes.items())
            seen *= (1 + outline) * len(names)
            facts = Facts(source.lesion, source.anatomy, source.modality, 1, "medium", "upper left part", (0, 0, 1, 1))
            asked = prompt_fields(facts, "q" * 80, outline)
            for end, (text, remark) in enumerate(
                ((known.text_tokens, known.verdict_tokens), (answer_limit(settings),) * 2)
            ):
                words = {"perception": "t" * 4 * text, "text": "t" * 8 * text, "reasoning": "t" * 8 * text}
                words["remarks"] = "r" * 4 * remark
                filled = [prompts[name].fill({**asked, **words}) for name in names]
                filled += [prompts["remarks"].fill({**asked, **words})] * (len(names) * rewritten)
                found[end] += seen + source.cases * sum(map(text_tokens, filled))
        return found[0] / total, found[1] / total

    return tokens


def _calls(
    stage: PlanStage, role: str, endpoint: Endpoint, number: tuple[int, ...], times: tuple[float, float], each: int,
    tokens: tuple[float, float], known: PlanAssumptions, more: int = 0,
) -> CallPlan:  # fmt: skip
    """`each` calls for a case and time, whose questions have `tokens` together, and some `more` calls."""
    answer = known.text_tokens if role == "writer" else known.verdict_tokens
    units = [n * time + more / each for n, time in zip(number, times, strict=True)]
    calls = tuple(round(unit * each) for unit in units)
    read = tuple(round(unit * size) for unit, size in zip(units, tokens, strict=True))
    written = (calls[0] * min(answer, endpoint.max_tokens), calls[1] * endpoint.max_tokens)
    cost = tuple(endpoint.cost(*pair) for pair in zip(read, written, strict=True))
    hours = None
    if known.read_rate and known.write_rate:
        hours = (read[0] / known.read_rate + written[0] / known.write_rate) / 3600
    return CallPlan(stage, role, endpoint.model, calls, read, written, cost, hours)  # type: ignore[arg-type]


def answer_limit(settings: CurationSettings) -> int:
    """Tokens of one answer of the writer at most."""
    return settings.write.writer.max_tokens if settings.write.writer else 250


def call_limits(calls: Sequence[CallPlan], endpoints: Sequence[Endpoint | None]) -> Iterator[str]:
    """Say which limits the expected calls of a model pass."""
    for endpoint in {each.model: each for each in endpoints if each is not None}.values():
        own = [plan for plan in calls if plan.model == endpoint.model]
        for name, values, limit in (
            ("max_calls", [plan.calls for plan in own], endpoint.max_calls),
            ("max_cost", [plan.cost for plan in own], endpoint.max_cost),
        ):
            expected, most = (sum(value[end] for value in values) for end in (0, 1))
            if limit is not None and most > limit:
                how = "will" if expected > limit else "may"
                needed = f"{expected:,.6g} expected, {most:,.6g} at most"
                yield f"{name}={limit:g} of {endpoint.model} {how} stop the build: {needed}"
