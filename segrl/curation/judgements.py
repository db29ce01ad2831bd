"""The judge stage: every text is checked, scored, and written again until it is good enough."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from segrl.curation.build_folder import build_lock
from segrl.curation.calls import Caller
from segrl.curation.case import Case
from segrl.curation.endpoints import Endpoint
from segrl.curation.engine import Engine, connected, map_async
from segrl.curation.facts import Facts, read_facts
from segrl.curation.json_lines import read_json_lines, write_json_lines
from segrl.curation.judge_quality import judge_agreement, judge_calibration
from segrl.curation.judges import Judge, JudgeSettings, ModelJudge, RuleJudge, Verdict, check_judge
from segrl.curation.prompts import read_prompts
from segrl.curation.rules import check_text
from segrl.curation.texts import CALLS, Text, TextSettings, open_writer, read_texts
from segrl.curation.work import Worker
from segrl.curation.writers import Writer
from segrl.errors import DataError
from segrl.files.whole import write_whole

__all__ = ["JUDGEMENTS", "JUDGES", "Judgement", "Round", "judge_texts", "read_judgements"]

JUDGEMENTS, JUDGES = "judgements.jsonl", "judges.json"


@dataclass(frozen=True)
class Round:
    """One text and what was said of it.

    Attributes:
        reasoning: The text; "" if none arrived.
        problems: What the rules say; a text with problems is not judged.
        scores: By part; empty if it was not judged.
        score: S; 0 if it was not judged.
        remarks: What must be changed.
        reason: Why there is no text or no verdict.

    Example:
        >>> Round("", reason="refusal").score
        0.0
    """

    reasoning: str
    problems: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    score: float = 0.0
    remarks: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Judgement:
    """The fate of the text of one case.

    Attributes:
        id: Of the case.
        status: "accepted"; "rejected", not good enough after all rounds; "failed", without a text or a verdict.
        query: The question.
        implicit: Whether it does not name the lesion.
        reasoning: The text of the best round.
        answer: In CORE-Seg's form.
        score: S of that round.
        scores: Its parts.
        writer: Model, or "template".
        judge: Model, or "rules".
        prompts: Versions of all prompts that were used.
        reason: Why it was not accepted.
        rounds: All texts, in order.

    Example:
        >>> Judgement("00ff", "failed", "Where?", True, reason="refused").rounds
        ()
    """

    id: str
    status: Literal["accepted", "rejected", "failed"]
    query: str
    implicit: bool
    reasoning: str = ""
    answer: str = ""
    score: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    writer: str = ""
    judge: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    rounds: tuple[Round, ...] = ()


def judge_texts(
    cases: Sequence[Case],
    settings: JudgeSettings,
    build: Path,
    *,
    text: TextSettings | None = None,
    engine: Engine = "local",
) -> list[Judgement]:
    """Judge the texts of a build, and let those be written again that are not good enough.

    Writes `build/judgements.jsonl` in the order of the cases, and `build/judges.json`: how well two judges agree on a
    sample, and how many planted faults rules and judge find. Kept answers are not asked for again.

    Args:
        cases: Those of `write_texts`.
        settings: How.
        build: Folder of the build, with the texts.
        text: How the texts were written, and are written again.
        engine: As for `write_texts`.

    Returns:
        Judgements; those that were not accepted are among them, with the reason.

    Raises:
        SegRLError: The judge is the writer, another process works in the folder, no key, a limit is reached, or a
            server that does not answer.
        DataError: Texts of other cases, or of another writer.

    Example:
        >>> from PIL import Image
        >>> from segrl.curation.texts import write_texts
        >>> image = Image.new("L", (40, 40))
        >>> image.paste(255, (2, 2, 12, 12))
        >>> image.save("image.png")
        >>> case = Case("00ff", Path("image.png"), Path("image.png"), "mine", "", "CT", "Liver", "cyst", "CC0-1.0")
        >>> _ = write_texts([case], TextSettings(), Path("build"))
        >>> (judgement,) = judge_texts([case], JudgeSettings(calibration=0), Path("build"))
        >>> judgement.status, judgement.score
        ('accepted', 1.0)
    """
    text = text or TextSettings()
    check_judge(text, settings)
    texts = _texts_of(cases, read_texts(build), text, build)
    prompts = read_prompts(text.prompts)
    endpoints = [endpoint for endpoint in (settings.judge, settings.second, text.writer) if endpoint is not None]
    for endpoint in endpoints:
        endpoint.key()
    used = () if settings.judge is None else ("judge",)
    versions = {name: prompts[name].version for name in used} | (
        {} if text.writer is None else {name: prompts[name].version for name in ("perception", "reasoning", "remarks")}
    )

    @asynccontextmanager
    async def opened(worker: Worker) -> AsyncIterator[Callable[[tuple[Case, Text]], Awaitable[Judgement]]]:
        async with AsyncExitStack() as stack:
            writer = await open_writer(text, worker, stack)
            judge = await open_judge(settings.judge, text, worker, stack)
            yield lambda pair: _judge_case(*pair, text, settings, writer, judge, versions)

    with build_lock(build), connected(engine):
        concurrency = max((endpoint.concurrency for endpoint in endpoints), default=2)
        pairs = list(zip(cases, texts, strict=True))
        judgements = map_async(
            opened, pairs, concurrency=concurrency, title="judgements", cache=build / CALLS, engine=engine
        )
        write_json_lines(build / JUDGEMENTS, map(asdict, judgements))
        quality = _quality(cases, judgements, settings, text, build, engine)
        write_whole(build / JUDGES, json.dumps(quality, indent=2, ensure_ascii=False) + "\n")
    return judgements


def read_judgements(build: Path) -> list[Judgement]:
    """Read what `judge_texts` wrote.

    Raises:
        DataError: There is no such file, or a line that is no judgement; names file and line.

    Example:
        >>> read_judgements(Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build/judgements.jsonl: cannot be read (No such file or directory); run the stage \
`judge` first
    """
    return read_json_lines(build / JUDGEMENTS, _judgement, "judge", "no judgement")


async def open_judge(endpoint: Endpoint | None, text: TextSettings, worker: Worker, stack: AsyncExitStack) -> Judge:
    """Return a judge; the stack closes it."""
    if endpoint is None:
        return RuleJudge()
    cache = stack.enter_context(worker.open_cache())
    caller = await stack.enter_async_context(Caller(endpoint.shared(worker.workers), cache))
    return ModelJudge(caller, read_prompts(text.prompts)["judge"], text.outline)


def _judgement(row: Any) -> Judgement:
    rounds = tuple(Round(**{**item, "problems": tuple(item["problems"])}) for item in row["rounds"])
    return Judgement(**{**row, "rounds": rounds})


async def _judge_case(
    case: Case, text: Text, asked: TextSettings, settings: JudgeSettings, writer: Writer, judge: Judge,
    versions: dict[str, str],
) -> Judgement:  # fmt: skip
    facts = await asyncio.to_thread(read_facts, case)
    rounds = [await _judged(Round(text.reasoning, text.problems, reason=text.reason), 0, case, facts, text, judge)]
    while not _good(rounds[-1], settings) and len(rounds) <= settings.rounds:
        last = rounds[-1]
        if last.reasoning and last.reason:  # no verdict: another text would not help
            break
        remarks = last.remarks or last.reason
        draft = await writer.write(case, facts, text.query, len(rounds), last.reasoning, remarks)
        checked = await asyncio.to_thread(check_text, draft.text, facts, asked.rules) if draft.text else None
        found = Round("", reason=draft.reason) if checked is None else Round(checked.text, checked.problems)
        rounds.append(await _judged(found, len(rounds), case, facts, text, judge))
    best = max(rounds, key=lambda item: (_good(item, settings), not item.problems, item.score, bool(item.reasoning)))
    accepted = _good(best, settings)
    judged = any(item.scores or item.problems for item in rounds)
    return Judgement(
        case.id,
        "accepted" if accepted else "rejected" if judged else "failed",
        text.query,
        text.implicit,
        best.reasoning,
        text.answer,
        best.score,
        best.scores,
        writer.name,
        judge.name,
        versions,
        "" if accepted else _why(best, settings),
        tuple(rounds),
    )


async def _judged(item: Round, number: int, case: Case, facts: Facts, text: Text, judge: Judge) -> Round:
    if item.problems:  # free of cost, so the judge is not asked
        return Round(item.reasoning, item.problems, remarks="; ".join(item.problems))
    if not item.reasoning:
        return item
    label = f"verdict on {case.id}, round {number}"
    verdict: Verdict = await judge.judge(case, facts, text.query, item.reasoning, label)
    return Round(item.reasoning, (), dict(verdict.scores), verdict.score, verdict.remarks, verdict.reason)


def _good(item: Round, settings: JudgeSettings) -> bool:
    return bool(item.scores) and not item.problems and item.score >= settings.threshold


def _why(item: Round, settings: JudgeSettings) -> str:
    if item.problems:
        return "; ".join(item.problems)
    if item.scores:
        return f"S={item.score:g}, expected at least {settings.threshold:g}"
    return f"{'no verdict' if item.reasoning else 'no text'}: {item.reason}"


def _texts_of(cases: Sequence[Case], texts: Sequence[Text], settings: TextSettings, build: Path) -> list[Text]:
    known = {text.id: text for text in texts}
    if missing := [case.id for case in cases if case.id not in known]:
        listed = ", ".join(missing[:3])
        raise DataError(f"{build}: no text of {len(missing)} cases ({listed}); run the stage `write` again")
    if others := {text.writer for text in texts} - {settings.writer_name}:
        raise DataError(
            f"{build}: texts of {', '.join(sorted(others))}, the settings say {settings.writer_name}; run the stage "
            "`write` again"
        )
    return [known[case.id] for case in cases]


def _quality(
    cases: Sequence[Case],
    judgements: Sequence[Judgement],
    settings: JudgeSettings,
    text: TextSettings,
    build: Path,
    engine: Engine,
) -> dict[str, object]:
    """Compare two judges on a sample, and let rules and judge look for planted faults."""
    known = {case.id: case for case in cases}
    good = sorted((item for item in judgements if item.scores), key=lambda item: item.id)
    found: dict[str, object] = {"judge": settings.judge_name}

    def judge_all(endpoint: Endpoint | None, items: Sequence[tuple[Case, str, str, str]]) -> list[Verdict]:
        @asynccontextmanager
        async def opened(worker: Worker) -> AsyncIterator[Callable[[tuple[Case, str, str, str]], Awaitable[Verdict]]]:
            async with AsyncExitStack() as stack:
                judge = await open_judge(endpoint, text, worker, stack)

                async def one(item: tuple[Case, str, str, str]) -> Verdict:
                    case, query, reasoning, label = item
                    facts = await asyncio.to_thread(read_facts, case)
                    return await judge.judge(case, facts, query, reasoning, label)

                yield one

        concurrency = 2 if endpoint is None else endpoint.concurrency
        return map_async(opened, items, concurrency=concurrency, cache=build / CALLS, engine=engine)

    if settings.second is not None:
        sample = good[: settings.agreement_sample]
        items = [(known[item.id], item.query, item.reasoning, f"second verdict on {item.id}") for item in sample]
        second = judge_all(settings.second, items)
        found["agreement"] = {"second": settings.second.model, **judge_agreement(sample, second)}
    accepted = [item for item in good if item.status == "accepted"]
    if settings.calibration and accepted:
        found["calibration"] = judge_calibration(
            [(known[item.id], item.query, item.reasoning) for item in accepted],
            settings,
            text.rules,
            lambda items: judge_all(settings.judge, items),
        )
    return found
