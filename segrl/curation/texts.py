"""The text stage: question, reasoning and answer of every case, in `build/texts.jsonl`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from segrl.curation.build_folder import build_lock
from segrl.curation.calls import Caller
from segrl.curation.case import Case
from segrl.curation.endpoints import Endpoint
from segrl.curation.engine import Engine, map_async
from segrl.curation.facts import Facts, read_facts
from segrl.curation.json_lines import read_json_lines, write_json_lines
from segrl.curation.prompts import read_prompts
from segrl.curation.questions import read_descriptions, write_question
from segrl.curation.rules import RuleSettings, check_corpus, check_text
from segrl.curation.work import Worker
from segrl.curation.writers import TEMPLATE, ModelWriter, TemplateWriter, Writer
from segrl.errors import DataError, SegRLError
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import format_answer

__all__ = ["CALLS", "TEXTS", "Text", "TextSettings", "open_writer", "read_texts", "write_texts"]

TEXTS, CALLS = "texts.jsonl", "calls.sqlite"
TextStatus = Literal["written", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The section `write` of a build.

    Attributes:
        writer: Model that writes the reasoning; None writes from templates, without a server.
        prompts: Folder of prompts that replace the packaged ones (`write_prompts` makes one).
        descriptions: JSON file of descriptions by lesion, for questions that do not name it.
        implicit_share: Share of questions that do not name the lesion.
        outline: Whether the model sees the image a second time, with the outline of the mask.
        rules: What is asked of a text.

    Raises:
        SegRLError: A share out of range.

    Example:
        >>> TextSettings().writer is None
        True
    """

    writer: Endpoint | None = None
    prompts: Path | None = None
    descriptions: Path | None = None
    implicit_share: float = 0.5
    outline: bool = True
    rules: RuleSettings = field(default_factory=RuleSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.implicit_share <= 1:
            raise SegRLError(f"implicit_share={self.implicit_share}; expected a share from 0 to 1")

    @property
    def writer_name(self) -> str:
        """Model of the writer, or "template"."""
        return TEMPLATE if self.writer is None else self.writer.model


@dataclass(frozen=True)
class Text:
    """Question, reasoning and answer of one case.

    Attributes:
        id: Of the case.
        status: "written"; "refused" by the rules, see `problems`; "failed", no text arrived, see `reason`.
        query: The question.
        implicit: Whether it does not name the lesion.
        reasoning: The text; "" if it failed.
        answer: "The {lesion} is located at {boxes}." in original pixels, or that none is visible.
        writer: Model, or "template".
        prompts: Versions of the prompts it was made with, by name; empty for templates.
        problems: What the rules say.
        removed: Coordinates that were removed.
        reason: Why there is no text.

    Example:
        >>> Text("00ff", "failed", "Where?", True, reason="refused: no").reasoning
        ''
    """

    id: str
    status: TextStatus
    query: str
    implicit: bool
    reasoning: str = ""
    answer: str = ""
    writer: str = TEMPLATE
    prompts: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    reason: str = ""


def write_texts(cases: Sequence[Case], settings: TextSettings, build: Path, *, engine: Engine = "local") -> list[Text]:
    """Write question, reasoning and answer of every case into `build/texts.jsonl`, in the order of the cases.

    Answers of a model are kept in `build/calls.sqlite` as they arrive: a build that was stopped asks again only what
    had not arrived. The file is written at the end, at once.

    Args:
        cases: At least one.
        settings: How.
        build: Folder of the build; made if it is absent.
        engine: "local", or "ray" for the workers of a cluster, which read the files of the cases under the same paths.

    Returns:
        The texts. Those of status "refused" and "failed" are among them, with the reason.

    Raises:
        SegRLError: Another process works in the folder, no key, a limit is reached, or a server that does not answer.
        DataError: No cases, a prompt with an unknown field, or files that cannot be read.

    Example:
        >>> from PIL import Image
        >>> Image.new("L", (40, 40)).save("image.png")
        >>> mask = Image.new("L", (40, 40))
        >>> mask.paste(255, (2, 2, 12, 12))
        >>> mask.save("mask.png")
        >>> case = Case("00ff", Path("image.png"), Path("mask.png"), "mine", "", "CT", "Liver", "cyst", "CC0-1.0")
        >>> (text,) = write_texts([case], TextSettings(), Path("build"))
        >>> text.status, text.answer
        ('written', 'The cyst is located at [2, 2, 12, 12].')
    """
    if not cases:
        raise DataError("no cases to write texts for: expected at least one")
    prompts, descriptions = read_prompts(settings.prompts), read_descriptions(settings.descriptions)
    versions = {} if settings.writer is None else {name: prompts[name].version for name in ("perception", "reasoning")}
    share = settings.implicit_share

    @asynccontextmanager
    async def opened(worker: Worker) -> AsyncIterator[Callable[[Case], Awaitable[tuple[Text, Facts]]]]:
        async with AsyncExitStack() as stack:
            writer = await open_writer(settings, worker, stack)

            async def write(case: Case) -> tuple[Text, Facts]:
                facts = await asyncio.to_thread(read_facts, case)
                query, implicit = write_question(facts, case.id, implicit_share=share, descriptions=descriptions)
                draft = await writer.write(case, facts, query, 0, "", "")
                text = Text(case.id, "failed", query, implicit, "", fixed_answer(facts), writer.name, versions)
                if draft.reason:
                    return replace(text, reason=draft.reason), facts
                checked = await asyncio.to_thread(check_text, draft.text, facts, settings.rules)
                status: TextStatus = "refused" if checked.problems else "written"
                found = {"problems": checked.problems, "removed": checked.removed}
                return replace(text, status=status, reasoning=checked.text, **found), facts

            yield write

    if settings.writer is not None:
        settings.writer.key()  # before the folder holds anything
    with build_lock(build):
        concurrency = settings.writer.concurrency if settings.writer else 2
        pairs = map_async(opened, cases, concurrency=concurrency, title="texts", cache=build / CALLS, engine=engine)
        texts = [text for text, _ in pairs]
        if settings.writer is not None:  # templates repeat themselves by design
            texts = _without_boilerplate(texts, [facts for _, facts in pairs], settings.rules)
        write_json_lines(build / TEXTS, map(asdict, texts))
    return texts


def read_texts(build: Path) -> list[Text]:
    """Read what `write_texts` wrote.

    Raises:
        DataError: There is no such file, or a line that is no text; names file and line.

    Example:
        >>> read_texts(Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build/texts.jsonl: cannot be read (No such file or directory); run the stage \
`write` first
    """
    return read_json_lines(build / TEXTS, _text, "write", "no text")


async def open_writer(settings: TextSettings, worker: Worker, stack: AsyncExitStack) -> Writer:
    """Return the writer that settings ask for; the stack closes it."""
    if settings.writer is None:
        return TemplateWriter()
    cache = stack.enter_context(worker.open_cache())
    caller = await stack.enter_async_context(Caller(settings.writer.shared(worker.workers), cache))
    return ModelWriter(caller, read_prompts(settings.prompts), settings.outline)


def fixed_answer(facts: Facts) -> str:
    """Return the answer in CORE-Seg's form, with boxes in original pixels, without a segmentation token."""
    return format_answer(facts.lesion, list(facts.boxes), Frame("original_px", facts.shape), "")


def _text(row: Any) -> Text:
    return Text(**{**row, "problems": tuple(row["problems"]), "removed": tuple(row["removed"])})


def _without_boilerplate(texts: list[Text], facts: Sequence[Facts], rules: RuleSettings) -> list[Text]:
    kept = [number for number, text in enumerate(texts) if text.reasoning]
    shared = check_corpus([texts[number].reasoning for number in kept], [facts[number] for number in kept], rules)
    for at, problem in shared.items():
        text = texts[kept[at]]
        texts[kept[at]] = replace(text, status="refused", problems=(*text.problems, problem))
    return texts
