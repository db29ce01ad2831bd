"""The stages of a build, in order, in one folder that holds one build."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segrl.curation.build_folder import build_lock
from segrl.curation.case import Case, read_cases, write_cases
from segrl.curation.difficulty import FOLDER, SetDifficulty, find_difficulty, read_errors, read_selected, select_cases
from segrl.curation.engine import Engine
from segrl.curation.judgements import Judgement, judge_texts
from segrl.curation.publish import publish_cases, read_final_texts
from segrl.curation.settings import CurationSettings
from segrl.curation.sources import load_sources
from segrl.curation.suspects import read_rejected
from segrl.curation.texts import Text, write_texts
from segrl.errors import DataError
from segrl.files.whole import is_unfinished
from segrl.models.saved_files import read_object
from segrl.reports.results_file import write_results

__all__ = [
    "check_build",
    "claim_build",
    "run_difficulty",
    "run_judging",
    "run_publish",
    "run_selection",
    "run_writing",
    "selected_cases",
]

CASES, LEFT_OUT, MARKER = "cases.jsonl", "left_out.json", "curation.json"


def claim_build(settings: CurationSettings, build: Path) -> None:
    """Make a folder the build of these settings, or refuse it.

    Sources and committee are those of the build for good; what comes after them can be changed, and its stage run
    again.

    Args:
        settings: Of the build.
        build: Its folder; made if it is absent.

    Raises:
        DataError: The folder holds something else, or a build with other sources or another committee.

    Example:
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, licence: MIT}]")
        >>> claim_build(CurationSettings.read("curate.yaml"), Path("build"))
        >>> _ = Path("curate.yaml").write_text("sources: [{path: other, licence: MIT}]")
        >>> claim_build(CurationSettings.read("curate.yaml"), Path("build"))
        Traceback (most recent call last):
        segrl.errors.DataError: build: holds a build with other sources; pass another --build, or restore the settings
    """
    kept = check_build(settings, build)
    for path in filter(is_unfinished, build.rglob(".*")):  # of a process that was killed while it wrote
        path.unlink()
    if not (build / MARKER).is_file():
        write_results(build / MARKER, kept)


def check_build(settings: CurationSettings, build: Path) -> dict[str, Any]:
    """Refuse a folder that cannot be the build of these settings, as `claim_build`; nothing is made.

    Returns:
        What is of the build for good: sources and committee.
    """
    kept = _plain({"sources": settings.sources, "committee": settings.difficulty.committee})
    kept["committee"].pop("processes")  # changes no byte
    if (build / MARKER).is_file():
        known = read_object(build / MARKER)
        for name, value in kept.items():
            if known.get(name) != value:
                raise DataError(
                    f"{build}: holds a build with other {name}; pass another --build, or restore the settings"
                )
    elif build.exists():
        own = {build / ".lock", *filter(is_unfinished, build.glob(f".{MARKER}.*"))}
        if not build.is_dir() or not own.issuperset(build.iterdir()):
            raise DataError(f"{build}: is not empty, and no build of segrl curate (no {MARKER}); pass another --build")
    return kept


def run_difficulty(settings: CurationSettings, build: Path, *, engine: Engine = "local") -> list[SetDifficulty]:
    """Read the sources and find the hard cases; what is there from an earlier run is kept.

    Args:
        settings: Of the build.
        build: Its folder.
        engine: "local", or "ray" for the workers of a cluster.

    Raises:
        DataError: As `claim_build`, `load_sources` and `find_difficulty`. If a source or an encoder is refused, the
            folder is no build yet, and can be used again.

    Example:
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, licence: MIT}]")
        >>> run_difficulty(CurationSettings.read("curate.yaml"), Path("build"))
        Traceback (most recent call last):
        segrl.errors.DataError: ...manifest.csv: no such file; expected a CSV file with at least the columns image
    """
    from segrl.curation.committee_networks import check_encoders

    if not (build / CASES).is_file():
        check_encoders(settings.difficulty.committee)  # before the folder is a build with this committee for good
    with build_lock(build):
        claim_build(settings, build)
        if not (build / CASES).is_file():
            _read_sources(settings, build)
        return find_difficulty(read_cases(build / CASES), settings.difficulty, build, engine=engine)


def run_selection(settings: CurationSettings, build: Path) -> list[SetDifficulty]:
    """Vote and select again, from the errors that are there.

    Raises:
        DataError: The stage difficulty has not run.

    Example:
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, licence: MIT}]")
        >>> run_selection(CurationSettings.read("curate.yaml"), Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build: no build of segrl curate; run the stage difficulty first
    """
    with _claimed(settings, build):
        errors = read_errors(build)
        return select_cases(read_cases(build / CASES), errors, settings.difficulty.tail, build)


def selected_cases(build: Path) -> list[Case]:
    """Return the hard cases without those whose mask a person rejected; texts are written about them.

    Raises:
        DataError: The stage difficulty has not run, or the answers of a person cannot be read.

    Example:
        >>> selected_cases(Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build/selected.jsonl: no such file; run the stage difficulty first
    """
    cases = read_selected(build)
    rejected = read_rejected(build / FOLDER)
    return [case for case in cases if case.id not in rejected]


def run_writing(settings: CurationSettings, build: Path, *, engine: Engine = "local") -> list[Text]:
    """Write question, reasoning and answer of every hard case; what has arrived from a model is kept.

    Raises:
        SegRLError: As `claim_build`, `selected_cases` and `write_texts`.

    Example:
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, licence: MIT}]")
        >>> run_writing(CurationSettings.read("curate.yaml"), Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build: no build of segrl curate; run the stage difficulty first
    """
    with _claimed(settings, build):
        return write_texts(selected_cases(build), settings.write, build, engine=engine)


def run_judging(settings: CurationSettings, build: Path, *, engine: Engine = "local") -> list[Judgement]:
    """Judge the texts, and write those again that are not good enough.

    Raises:
        SegRLError: As `claim_build`, `selected_cases` and `judge_texts`.

    Example:
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, licence: MIT}]")
        >>> run_judging(CurationSettings.read("curate.yaml"), Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build: no build of segrl curate; run the stage difficulty first
    """
    with _claimed(settings, build):
        return judge_texts(selected_cases(build), settings.judge, build, text=settings.write, engine=engine)


def run_publish(settings: CurationSettings, build: Path) -> dict[str, int]:
    """Write the data set of a build.

    Args:
        settings: Of the build.
        build: Its folder.

    Returns:
        Number of rows of each split.

    Raises:
        DataError: As `claim_build`, `selected_cases` and `publish_cases`.

    Example:
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, licence: MIT}]")
        >>> run_publish(CurationSettings.read("curate.yaml"), Path("no/build"))
        Traceback (most recent call last):
        segrl.errors.DataError: no/build: no build of segrl curate; run the stage difficulty first
    """
    with _claimed(settings, build):
        committee = settings.difficulty.committee
        return publish_cases(
            selected_cases(build), read_final_texts(build), settings.publish, build, committee=committee
        )


def _read_sources(settings: CurationSettings, build: Path) -> None:
    try:
        found = load_sources(settings.sources, build)
    except Exception:  # raised again: whatever is wrong with a source, other settings may be used next
        shutil.rmtree(build / "sources", ignore_errors=True)
        (build / MARKER).unlink()
        raise
    write_results(build / LEFT_OUT, found.left_out)
    write_cases(build / CASES, found.cases)


@contextmanager
def _claimed(settings: CurationSettings, build: Path) -> Iterator[None]:
    """Hold a build that is there, for one of its later stages."""
    if not (build / MARKER).is_file():
        raise DataError(f"{build}: no build of segrl curate; run the stage difficulty first")
    with build_lock(build):
        claim_build(settings, build)
        yield


def _plain(value: Any) -> Any:
    """Settings as JSON would give them back."""
    convert: Callable[[Any], Any] = lambda item: (  # noqa: E731 - dataclasses inside mappings and tuples
        dataclasses.asdict(item) if dataclasses.is_dataclass(item) and not isinstance(item, type) else str(item)
    )
    return json.loads(json.dumps(value, default=convert))
