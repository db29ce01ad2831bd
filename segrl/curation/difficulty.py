"""The stage that finds hard cases: errors of a committee, their tail, and the cases beyond it.

It writes into `build/difficulty`: a file for each training, `errors.jsonl`, `thresholds.json`, and for a person
`suspects.jsonl` with a sheet; and into the build `scored.jsonl`, all cases with their difficulty, and `selected.jsonl`.
"""

# n cases, m members

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from segrl.curation.case import Case, read_cases, write_cases
from segrl.curation.committee import committee_jobs, run_committee
from segrl.curation.committee_settings import CommitteeSettings, Membership
from segrl.curation.engine import Engine
from segrl.curation.json_lines import read_json_lines, write_json_lines
from segrl.curation.suspects import SuspectSettings, find_suspects, write_suspects
from segrl.curation.tails import Tail, TailSettings, find_tail, vote
from segrl.data.formats.rows import plain_name
from segrl.errors import DataError
from segrl.reports.results_file import write_results
from segrl.reports.terminal import console

__all__ = [
    "FOLDER",
    "SCORED",
    "SELECTED",
    "THRESHOLDS",
    "DifficultySettings",
    "SetDifficulty",
    "find_difficulty",
    "read_errors",
    "read_selected",
    "select_cases",
]

FOLDER, ERRORS, THRESHOLDS = "difficulty", "errors.jsonl", "thresholds.json"
SCORED, SELECTED = "scored.jsonl", "selected.jsonl"


@dataclass(frozen=True, kw_only=True)
class DifficultySettings:
    """The section `difficulty` of a build.

    Attributes:
        committee: The networks and their training.
        tail: Vote and threshold.
        suspects: Which masks a person should look at.

    Example:
        >>> DifficultySettings().tail.mode
        'knee'
    """

    committee: CommitteeSettings = field(default_factory=CommitteeSettings)
    tail: TailSettings = field(default_factory=TailSettings)
    suspects: SuspectSettings = field(default_factory=SuspectSettings)


@dataclass(frozen=True)
class SetDifficulty:
    """Findings about one set.

    Attributes:
        source: The set.
        cases: Number of its cases.
        selected: Number of those that are hard.
        mean_dice: Mean Dice of the committee, all members on all cases.
        hard_dice: The same of the hard half of its cases, by the vote.
        easy_dice: The same of the others.
        pooled: Sources whose errors were fitted together; only itself where it has enough.
        tail: Fit and threshold.

    Example:
        >>> SetDifficulty("mine", 2, 1, 0.5, 0.2, 0.8, ("mine",), find_tail([0.2, 0.8])).tail.selected_by
        'quantile'
    """

    source: str
    cases: int
    selected: int
    mean_dice: float
    hard_dice: float
    easy_dice: float
    pooled: tuple[str, ...]
    tail: Tail


def find_difficulty(
    cases: Sequence[Case], settings: DifficultySettings, build: Path, *, engine: Engine = "local"
) -> list[SetDifficulty]:
    """Train the committees, measure every case out of fold, and select the hard ones.

    Trainings whose files are there are not made again: a stage that was stopped goes on, and ends with the same files.

    Args:
        cases: Of all sources.
        settings: How.
        build: Folder of the build, which exists.
        engine: "local", or "ray" for trainings in the workers of a cluster, which read the files of the cases under the
            same paths.

    Returns:
        What was found for each set, in the order of the cases.

    Raises:
        DataError: As `committee_jobs` and `find_tail`, or a damaged file of a training, which is named.
        SegRLError: The extra `curation` is not installed.

    Example:
        >>> find_difficulty([], DifficultySettings(), Path("build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no cases; expected at least one
    """
    if not cases:
        raise DataError("no cases; expected at least one")
    home = build / FOLDER
    jobs: list[Membership] = []
    for source, folder in _folders(cases, home).items():
        jobs += committee_jobs([case for case in cases if case.source == source], settings.committee, folder)
    with Progress(console=console(stderr=True)) as bar:
        task = bar.add_task("committee", total=len(jobs))
        for job in run_committee(jobs, engine=engine):
            bar.update(task, advance=1, description=f"committee, {job.cases[0].source}")
    predictions = {case.id: {} for case in cases}
    for job in jobs:
        for identity, found in _read(job).items():
            predictions[identity][job.member] = found
    errors = {
        identity: [found[member]["error"] for member in range(len(settings.committee.encoders))]
        for identity, found in predictions.items()
    }
    rows = ({"id": case.id, "source": case.source, "errors": errors[case.id]} for case in cases)
    write_json_lines(home / ERRORS, rows)
    found = select_cases(cases, errors, settings.tail, build)
    masks = {identity: [found[member]["mask"] for member in sorted(found)] for identity, found in predictions.items()}
    suspects = find_suspects(cases, masks, errors, settings.suspects)
    write_suspects(suspects, masks, home)
    return found


def select_cases(
    cases: Sequence[Case], errors: Mapping[str, Sequence[float]], settings: TailSettings, build: Path
) -> list[SetDifficulty]:
    """Vote, fit the tails, and write which cases are hard.

    Args:
        cases: Of all sources.
        errors: (m,) of the members by the id of a case.
        settings: Of vote and threshold.
        build: Folder of the build.

    Raises:
        DataError: As `find_tail`, and names the set; or a case without errors.

    Example:
        >>> texts = ("mine", "", "CT", "Lung", "nodule", "MIT")
        >>> cases = [Case(name, Path("a.png"), Path("m.png"), *texts) for name in ("easy", "hard")]
        >>> Path("build").mkdir()
        >>> (found,) = select_cases(cases, {"easy": [0.1, 0.2], "hard": [0.8, 0.9]}, TailSettings(), Path("build"))
        >>> found.selected, read_selected(Path("build"))[0].id
        (1, 'hard')
    """
    if missing := [case.id for case in cases if case.id not in errors]:
        raise DataError(f"no errors of {len(missing)} cases, such as {missing[0]}; run the stage `difficulty` again")
    votes = dict(zip((c.id for c in cases), vote([errors[case.id] for case in cases], settings).tolist(), strict=True))
    scored = [replace(case, difficulty=votes[case.id]) for case in cases]
    found, selected = [], set()
    for source in dict.fromkeys(case.source for case in cases):
        own = [case for case in scored if case.source == source]
        pooled = _pooled(own, scored, settings)
        try:
            tail = find_tail([votes[case.id] for case in scored if case.source in pooled], settings)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        if len(pooled) > 1:
            tail = replace(tail, notes=(f"{len(own)} errors are few: fitted with {', '.join(pooled)}", *tail.notes))
        hard = {case.id for case in own if votes[case.id] >= tail.threshold}
        selected |= hard
        order = sorted(own, key=lambda case: (votes[case.id], case.id))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        easy, difficult, whole = (1 - np.mean([errors[c.id] for c in half]) for half in (*halves, own))
        scores = {"mean_dice": float(whole), "hard_dice": float(difficult), "easy_dice": float(easy)}
        found.append(SetDifficulty(source, len(own), len(hard), **scores, pooled=pooled, tail=tail))
    write_results(build / FOLDER / THRESHOLDS, {"sets": [asdict(each) for each in found]})
    write_cases(build / SCORED, scored)
    write_cases(build / SELECTED, [case for case in scored if case.id in selected])
    return found


def read_errors(build: Path) -> dict[str, list[float]]:
    """Read the errors of the members by the id of a case.

    Raises:
        DataError: The stage has not run, or the file is damaged; names file and line.

    Example:
        >>> read_errors(Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build/difficulty/errors.jsonl: cannot be read (No such file or directory); run the \
stage `difficulty` first
    """

    def read(row: Any) -> tuple[str, list[float]]:
        values = [float(value) for value in row["errors"]]
        if not values or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"errors={values}; expected numbers from 0 to 1, one or more")
        return str(row["id"]), values

    path = build / FOLDER / ERRORS
    found = dict(read_json_lines(path, read, "difficulty"))
    if len({len(values) for values in found.values()}) > 1:
        raise DataError(f"{path}: errors of different numbers of members; run the stage `difficulty` again")
    return found


def read_selected(build: Path) -> list[Case]:
    """Read the hard cases.

    Raises:
        DataError: The stage has not run, or the file is damaged.
    """
    if not (build / SELECTED).is_file():
        raise DataError(f"{build / SELECTED}: no such file; run the stage difficulty first")
    return read_cases(build / SELECTED)


def _folders(cases: Sequence[Case], home: Path) -> dict[str, Path]:
    """The folder of the trainings of each source; names that differ in signs or capitals alone would share one."""
    known: dict[str, str] = {}
    for source in dict.fromkeys(case.source for case in cases):
        other = known.setdefault(plain_name(source).casefold(), source)
        if other != source:
            raise DataError(f"sources {other!r} and {source!r} would share a folder; rename one of them")
    return {source: home / plain_name(source) for source in known.values()}


def _pooled(own: Sequence[Case], scored: Sequence[Case], settings: TailSettings) -> tuple[str, ...]:
    """The sources whose errors are fitted together."""
    if len(own) >= settings.fewest or settings.mode == "quantile":
        return (own[0].source,)
    modality = own[0].modality.casefold()
    return tuple(dict.fromkeys(case.source for case in scored if case.modality.casefold() == modality))


def _read(job: Membership) -> dict[str, Any]:
    try:
        found = json.loads(job.path.read_text(encoding="utf-8"))
        if set(found) != {job.cases[n].id for n in job.held_out}:
            raise ValueError("it holds other cases")
        return found
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{job.path}: {error}; delete it, and run the stage again") from error
