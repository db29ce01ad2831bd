"""Findings of a sweep: every row of a table, as published and as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segrl.evaluation.comparison import read_records
from segrl.metrics.summary import nested_bootstrap_ci
from segrl.models.saved_files import read_object
from segrl.reports.published import PublishedRow
from segrl.reports.results_file import write_results
from segrl.sweeps.jobs import Job
from segrl.sweeps.running import evaluation_folder, is_done

__all__ = ["summarise_sweep", "sweep_table", "write_sweep"]

SCORES = {"mdice": "dice", "miou": "iou", "fail": "fail"}
STAGES = ("stage2", "stage1", "model")  # a run's own answers are those of the first that it has


def summarise_sweep(
    rows: Sequence[tuple[PublishedRow, Job | None]], seeds: Sequence[int], home: Path
) -> list[dict[str, Any]]:
    """Return every row of the tables with the scores of its runs so far.

    The data of a table's first row is what the runs were trained for; rows on other data have scores where the runs
    were evaluated on it (`elsewhere` of `run_sweep`).

    Args:
        rows: From `plan_sweep`.
        seeds: Seeds of the sweep.
        home: Its folder.

    Returns:
        One mapping a row: "table", "data", "method", "note" and "published" (fractions) of the paper, "command", and of
        the runs "seeds" (those that are done), and for each score the mean over seeds with its 95 % interval over seeds
        and samples, as "scores": {"mdice": {"mean", "ci95", "each"}}; "groups", mean Dice by modality; "zero_spread",
        the share of groups of stage 2 without spread in reward, None without a stage 2.

    Example:
        >>> row = PublishedRow(table="1", data="A", method="theirs", scores={"mdice": 0.1})
        >>> summarise_sweep([(row, None)], [1, 2], Path("sweep"))[0]["seeds"]
        []
    """
    found = []
    main: dict[str, str] = {}
    for row, job in rows:
        own = main.setdefault(row.table, row.data) == row.data
        folders = {} if job is None else {seed: job.folder(seed, home) for seed in seeds}
        folders = folders if own else {seed: evaluation_folder(path, row.data) for seed, path in folders.items()}
        done = [seed for seed, path in folders.items() if is_done(path)]
        entry: dict[str, Any] = {
            **{name: getattr(row, name) for name in ("table", "data", "method", "note")},
            "published": dict(row.scores),
            "command": " ".join(row.command),
            "seeds": done,
        }
        if done:
            entry |= _scores([folders[seed] for seed in done])
        found.append(entry)
    return found


def _scores(folders: Sequence[Path]) -> dict[str, Any]:
    records = [read_records(folder) for folder in folders]
    results = [read_object(folder / "results.json") for folder in folders]
    scores = {}
    for name, key in SCORES.items():
        values = [np.array([record[key] for record in answers], dtype=np.float64) for answers in records]
        each = [float(value.mean()) for value in values]
        scores[name] = {"mean": float(np.mean(each)), "ci95": list(nested_bootstrap_ci(values)), "each": each}
    dice: dict[str, list[float]] = {}
    for record in (record for answers in records for record in answers):
        dice.setdefault(str(record.get("modality") or "unspecified"), []).append(record["dice"])
    groups = {name: float(np.mean(dice[name])) for name in sorted(dice)}
    spreads = [result["zero_spread"] for result in results if "zero_spread" in result]
    return {"scores": scores, "groups": groups, "zero_spread": float(np.mean(spreads)) if spreads else None}


def sweep_table(rows: Sequence[Mapping[str, Any]], *, data: str = "synthetic") -> str:
    """Return the tables as Markdown: published scores beside those of the runs, in percent.

    Args:
        rows: From `summarise_sweep`.
        data: What the runs were measured on, for the heading.

    Example:
        >>> row = {"table": "3", "data": "A", "method": "full", "published": {"mdice": 0.37}, "seeds": [1], "note": ""}
        >>> scores = {name: {"mean": 0.5, "ci95": [0.25, 0.75], "each": [0.5]} for name in SCORES}
        >>> print(sweep_table([{**row, "scores": scores, "zero_spread": 0.1}], data="my images"))
        ## Table 3
        <BLANKLINE>
        | method | data | published mDice / mIoU / Fail | here, on my images: mDice | mIoU | Fail | no spread | seeds |
        | --- | --- | --- | --- | --- | --- | --- | --- |
        | full | A | 37.00 / - / - | 50.0 [25.0, 75.0] | 50.0 [25.0, 75.0] | 50.0 [25.0, 75.0] | 10.0 % | 1 |
    """
    lines: list[str] = []
    for table in dict.fromkeys(row["table"] for row in rows):
        heads = ["method", "data", "published mDice / mIoU / Fail", f"here, on {_cell(data)}: mDice", "mIoU", "Fail"]
        heads += ["no spread", "seeds"]
        lines += [f"## Table {table}", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for row in rows:
            if row["table"] != table:
                continue
            paper = " / ".join(_percent(row["published"].get(name), 2) for name in SCORES)
            scores = row.get("scores") or {}
            ours = [_interval(scores.get(name)) for name in SCORES]
            spread = row.get("zero_spread")
            cells = [_cell(row["method"]), _cell(row["data"]), paper, *ours]
            cells += ["-" if spread is None else f"{100 * spread:.1f} %", str(len(row["seeds"]))]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            *(f"{_cell(row['method'])}: {row['note']}" for row in rows if row["table"] == table and row["note"]),
        ]
        lines.append("")
    return "\n".join(lines).strip().replace("\n\n\n", "\n\n")


def write_sweep(home: Path, rows: Sequence[Mapping[str, Any]], table: str) -> None:
    """Write `tables.json` and `tables.md` into the folder of a sweep."""
    write_results(home / "tables.json", list(rows))  # pyright: ignore[reportArgumentType]
    (home / "tables.md").write_text(f"{table}\n", encoding="utf-8")


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    low, high = (100 * end for end in score["ci95"])
    return f"{100 * score['mean']:.1f} [{low:.1f}, {high:.1f}]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
