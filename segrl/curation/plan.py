"""A dry run: calls, tokens, cost, trainings and disk of a build, before anything is made.

Cases and what is on disk are counted. How many cases will be hard, how many texts will be written again, and how long
answers are, is not known before: those numbers are assumptions, which a plan repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segrl.curation.call_cache import CallCache
from segrl.curation.call_plans import (
    CallPlan,
    PlanAssumptions,
    SourceSize,
    answer_limit,
    call_limits,
    planned_calls,
)
from segrl.curation.case import Case, read_cases
from segrl.curation.difficulty import FOLDER, SELECTED
from segrl.curation.settings import CurationSettings
from segrl.curation.sources import survey_sources
from segrl.curation.stages import CASES, check_build, selected_cases
from segrl.curation.texts import CALLS
from segrl.errors import DataError
from segrl.geometry.image_files import open_image

__all__ = ["Plan", "plan_build", "plan_sources"]

_MASK_BYTES = 3.6  # of the run lengths of a mask, for each pixel of its side; measured, see docs/log.md
_ROW_BYTES = 400  # of a case in a file of cases, and of what surrounds a text
_PIXEL_BYTES = 0.6  # of an image and its mask that the build makes; a guess


@dataclass(frozen=True)
class Plan:
    """Size of a build. Pairs are (expected, at most).

    Attributes:
        cases: By source.
        hard: Cases that texts are written for.
        trainings: Of the committees.
        trained: Number of those that are on disk.
        steps: Updates of one training, at most.
        images: Images that all trainings see, at most.
        predictions: Images that are predicted out of fold.
        gpu_hours: Of the committees, at most; None without a rate.
        calls: Of each model and stage; empty without a server.
        kept: Answers on disk and their cost, by model; no call is made for them again.
        disk: Bytes by part of the build; "dataset" is (expected, at most).
        notes: Limits that will stop the build.
        assumptions: What the plan assumes.
    """

    cases: Mapping[str, int]
    hard: tuple[int, int]
    trainings: int
    trained: int
    steps: int
    images: int
    predictions: int
    gpu_hours: float | None
    calls: tuple[CallPlan, ...]
    kept: Mapping[str, tuple[int, float]]
    disk: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]
    assumptions: PlanAssumptions = field(default_factory=PlanAssumptions)


def plan_build(settings: CurationSettings, build: Path, assumptions: PlanAssumptions | None = None) -> Plan:
    """Count what a build takes, and make nothing. What a build folder holds already is counted as it is.

    Args:
        settings: Of the build.
        build: Its folder, which may be absent.
        assumptions: What is not known before.

    Raises:
        DataError: A source that cannot be used, as far as that is known without reading its pixels, a folder that holds
            something else, or files of the build that are damaged.

    Example:
        >>> from segrl.data import make_synthetic, write_folder
        >>> _ = write_folder(make_synthetic(20, size=32), "mine")
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, modality: MRI, licence: CC0-1.0}]")
        >>> plan = plan_build(CurationSettings.read("curate.yaml"), Path("build"))
        >>> plan.hard, plan.trainings, plan.predictions, Path("build").exists()
        ((6, 20), 9, 60, False)
    """
    check_build(settings, build)
    if (build / CASES).is_file():
        cases = read_cases(build / CASES)
        rows = [(case, _size(case), case.image.is_relative_to(build)) for case in cases]
    else:
        rows = [(row.case, row.size, row.made) for row in survey_sources(settings.sources)]
    hard = None
    if (build / SELECTED).is_file():
        chosen = selected_cases(build)
        hard = _sizes([(case, _size(case), case.image.is_relative_to(build)) for case in chosen])
    return plan_sources(
        _sizes(rows),
        settings,
        assumptions,
        hard=hard,
        trained=len(list((build / FOLDER).glob("*/member*_fold*.json"))),
        kept=CallCache.read_spent(build / CALLS),
    )


def plan_sources(
    sources: Sequence[SourceSize],
    settings: CurationSettings,
    assumptions: PlanAssumptions | None = None,
    *,
    hard: Sequence[SourceSize] | None = None,
    trained: int = 0,
    kept: Mapping[str, tuple[int, float]] | None = None,
) -> Plan:
    """Count what a build of sources of some sizes takes, which need not exist.

    Args:
        sources: Their sizes.
        settings: Of the build; its sources are not looked at.
        assumptions: What is not known before.
        hard: The hard cases alone, if they are known.
        trained: Trainings that are on disk.
        kept: Answers that are on disk, and their cost, by model.

    Raises:
        DataError: No sources, or a prompt that cannot be read.

    Example:
        >>> from segrl.curation import Endpoint, SourceSettings, TextSettings
        >>> endpoint = Endpoint(url="http://localhost:8000/v1", model="m", price_in=1.0, price_out=4.0)
        >>> source = SourceSettings(path=Path("mine"), licence="CC0-1.0")
        >>> settings = CurationSettings(sources=(source,), write=TextSettings(writer=endpoint))
        >>> plan = plan_sources([SourceSize("mine", {(512, 512): 1000}, 2e5)], settings)
        >>> plan.calls[0].calls, round(plan.calls[0].cost[0], 2)
        ((620, 2000), 0.98)
    """
    known = assumptions or PlanAssumptions()
    if not sources:
        raise DataError("no sources; expected at least one")
    committee, judging = settings.difficulty.committee, settings.judge
    members = len(committee.encoders)
    count = sum(source.cases for source in sources)
    share = known.hard if hard is None else 1.0
    chosen = sources if hard is None else hard
    number = (round(share * sum(source.cases for source in chosen)), sum(source.cases for source in chosen))
    trainings = members * committee.folds * len(sources)
    images = trainings * committee.steps * committee.batch
    rate = known.training_rate
    calls = tuple(planned_calls(chosen, number, settings, known))
    disk = [_disk(sources, chosen, end, number, calls, settings, known) for end in (0, 1)]
    return Plan(
        {source.source: source.cases for source in sources},
        number,
        trainings,
        trained,
        committee.steps,
        images,
        count * members,
        None if rate is None else (images + count * members / 3) / rate / 3600,
        calls,
        dict(kept or {}),
        {part: (disk[0][part], disk[1][part]) for part in disk[0]},
        tuple(call_limits(calls, [settings.write.writer, judging.judge, judging.second])),
        known,
    )


def _disk(
    sources: Sequence[SourceSize], chosen: Sequence[SourceSize], end: int, number: tuple[int, int],
    calls: Sequence[CallPlan], settings: CurationSettings, known: PlanAssumptions,
) -> dict[str, int]:  # fmt: skip
    """Bytes by part of the build: expected with `end` 0, at most with 1."""
    committee, count = settings.difficulty.committee, sum(source.cases for source in sources)
    text = 4 * (2 * (answer_limit(settings) if end else known.text_tokens) + 60)  # with question and answer
    return {
        "sources": _bytes(sources, "made"),
        "difficulty": int(count * len(committee.encoders) * (_MASK_BYTES * committee.size + 80)),
        "cases": _ROW_BYTES * (2 * count + number[end]),
        "texts": number[end] * 3 * (_ROW_BYTES + text),
        "calls": sum(200 * plan.calls[end] + 4 * plan.tokens_out[end] for plan in calls),
        "dataset": int(number[end] / max(1, number[1]) * _bytes(chosen, "cases")),
    }


def _bytes(sources: Sequence[SourceSize], counted: str) -> int:
    return int(sum(source.file_bytes * getattr(source, counted) for source in sources))


def _size(case: Case) -> tuple[int, int]:
    with open_image(case.image, f"image {case.image}") as opened:
        return opened.size


def _sizes(rows: Sequence[tuple[Case, tuple[int, int], bool]]) -> list[SourceSize]:
    """Sum up rows by their source."""
    found = []
    for title in dict.fromkeys(case.source for case, _, _ in rows):
        own = [row for row in rows if row[0].source == title]
        weights = [
            sum(path.stat().st_size for path in (case.image, case.mask))
            if case.image.is_file() and case.mask.is_file()
            else size[0] * size[1] * _PIXEL_BYTES
            for case, size, _ in own
        ]
        texts = {
            name: Counter(getattr(case, name) for case, _, _ in own).most_common(1)[0][0]
            for name in ("lesion", "anatomy", "modality")
        }
        shapes = Counter(size for _, size, _ in own)
        found.append(SourceSize(title, shapes, sum(weights) / len(own), sum(made for *_, made in own), **texts))
    return found
