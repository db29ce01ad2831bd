"""Files of a run as a report reads them, finished or not."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from segrl.errors import CheckpointError, DataError
from segrl.models.saved_files import read_object
from segrl.reports.cases import CASES
from segrl.reports.groups import read_groups
from segrl.reports.history import TABLE

__all__ = ["CONTROL", "HISTORY", "MARKER", "STAGE1", "Records", "RunFiles", "read_run"]

MARKER, HISTORY, STAGE1, CONTROL = "segrl_run.json", "log_history.json", "stage1", "control"
SAMPLES = "samples"  # the first images as they were
_STAGES = {"stage 1": STAGE1, "stage 2": ".", "stage 1 continued": CONTROL}
Records = list[dict[str, Any]]
History = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run, read.

    Attributes:
        name: Its folder, as it was given.
        task: "images" or "volumes".
        asked: Its flags and the preset's, with versions; empty if it has no `segrl_run.json`.
        config: The text of `config.yaml`; empty without one.
        histories: What the trainer of each stage has logged, as far as it came.
        results: `results.json`; empty of a run that was interrupted.
        records: Answers by stage; those of the run itself under "run".
        groups: See `segrl.reports.groups`.
        pictures: Files with a picture of what each record asks about, by its number.
        notes: What is missing, and why.
    """

    name: str
    task: str = "images"
    asked: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    histories: Mapping[str, History] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[str, Records] = field(default_factory=dict)
    groups: list[tuple[dict[str, Any], Image.Image | None]] = field(default_factory=list)
    pictures: Mapping[int, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_run(folder: str | Path) -> RunFiles:
    """Read the files of a run; of an interrupted one those that are there.

    Args:
        folder: The output folder of a training script, or of an evaluation.

    Raises:
        DataError: The folder holds no run, or a damaged file; names it.

    Example:
        >>> read_run("no/such/run")
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/run: no such folder; pass the output_dir of a run
    """
    home = Path(folder)
    if not home.is_dir():
        raise DataError(f"{home}: no such folder; pass the output_dir of a run")
    known = (MARKER, HISTORY, TABLE, "results.json", "predictions.json", f"{STAGE1}/{TABLE}", f"{STAGE1}/{HISTORY}")
    if not any((home / name).is_file() for name in known):
        raise DataError(f"{home} holds no run: none of {', '.join(known[:5])}; pass the output_dir of a run")
    histories, notes = {}, []
    for stage, part in _STAGES.items():
        history, whole = _history(home / part)
        if history:
            histories[stage] = history
            if not whole:
                notes.append(f"{stage} was interrupted after step {max(entry['step'] for entry in history)}")
    results = _object(home / "results.json")
    if not results:
        notes.append("not evaluated: no results.json")
    if set(histories) == {"stage 2"} and "stage1" in results and "stage2" not in results:
        histories = {"stage 1": histories["stage 2"]}  # of train_sft.py
    groups = read_groups(home)
    if "stage 2" in histories and not groups:
        notes.append("no groups of answers were kept: --kept_groups 24 keeps some")
    settings = _object(home / "segrl.json") or _object(home / STAGE1 / "segrl.json")
    asked = _object(home / MARKER)
    return RunFiles(
        name=str(folder),
        task=str(settings.get("task") or "images"),
        asked=asked,
        config=_text(home / "config.yaml"),
        histories=histories,
        results=results,
        records=_records(home),
        groups=groups,
        pictures=_pictures(home),
        notes=tuple(notes),
    )


def _history(folder: Path) -> tuple[History, bool]:
    """Return the log of a stage, and whether it came to its end: `log_history.json`, else `results.csv`."""
    path = folder / HISTORY
    if path.is_file():
        found = _json(path)
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise DataError(f"{path}: expected a list of objects; train the stage again")
        return found, True
    table = folder / TABLE
    if not table.is_file():
        return [], True
    with open(table, encoding="utf-8", newline="") as file:
        try:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error) as error:
            raise DataError(f"{table}: not a table of numbers ({error}); remove it") from error
    return [{**row, "step": int(row["step"])} for row in rows if "step" in row], False


def _records(home: Path) -> dict[str, Records]:
    found = {}
    for path in sorted(home.glob("predictions*.json")):
        records = _json(path)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DataError(f"{path}: expected a list of records, one a sample; evaluate the run again")
        name = path.stem.removeprefix("predictions").removeprefix("_")
        found[name or "run"] = records
    return found


def _pictures(home: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for folder in (SAMPLES, CASES):
        for path in sorted((home / folder).glob("*.*")):
            if path.stem.isdecimal():
                found[int(path.stem)] = path
    return found


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it, or make it again") from error


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
