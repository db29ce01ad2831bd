"""Findings of a sweep: every row of a table, as published and as measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segrl.evaluation.comparison import read_records
from segrl.metrics.hedging import count_hedges
from segrl.metrics.summary import nested_bootstrap_ci
from segrl.models.saved_files import read_object
from segrl.reports.charts import bar_chart
from segrl.reports.published import PublishedRow
from segrl.reports.results_file import EVALUATION_TIME, write_results
from segrl.scripts.stages import read_history
from segrl.sweeps.jobs import Job
from segrl.sweeps.running import evaluation_folder, is_done
from segrl.sweeps.samples import samples_sheet

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
        and samples, as "scores": {"mdice": {"mean", "ci95", "each"}}; "groups", the same of Dice by modality. Means
        over seeds, None where the runs do not have them: "zero_spread", the share of groups of stage 2 without spread
        in reward, and "reward_std", the spread within groups (5.3.3 of CORE-Seg); "trainable_parameters" and
        "parameters" of the last stage; "seconds_per_answer" of the evaluation (5.2.3); "hedged", the share of sentences
        of the reasoning that hedge (5.4.1, `segrl.metrics.count_hedges`).

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


def _seconds(folder: Path) -> float | None:
    path = folder / EVALUATION_TIME
    return read_object(path)["seconds_per_answer"][-1] if path.is_file() else None


def _scores(folders: Sequence[Path]) -> dict[str, Any]:
    records = [read_records(folder) for folder in folders]
    results = [read_object(folder / "results.json") for folder in folders]
    histories = [read_history(folder) for folder in folders]
    groups: dict[str, list[list[float]]] = {}
    for number, answers in enumerate(records):
        for record in answers:
            kind = str(record.get("modality") or "unspecified")
            groups.setdefault(kind, [[] for _ in folders])[number].append(float(record["dice"]))
    hedges = [_sum_pairs(count_hedges(_reasoning(record)) for record in answers) for answers in records]
    return {
        "scores": {
            name: _over([[float(record[key]) for record in answers] for answers in records])
            for name, key in SCORES.items()
        },
        "groups": {name: _over([values for values in groups[name] if values]) for name in sorted(groups)},
        "zero_spread": _mean(result.get("zero_spread") for result in results),
        "reward_std": _mean(_mean(entry.get("reward_std") for entry in history) for history in histories),
        "seconds_per_answer": _mean(_seconds(folder) for folder in folders),
        "hedged": _mean(hedged / count if count else None for hedged, count in hedges),
        **{
            name: _mean(history[-1].get(name) if history else None for history in histories)
            for name in ("parameters", "trainable_parameters")
        },
    }


def _over(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean over seeds, its interval over seeds and samples, and the mean of each seed."""
    each = [float(np.mean(value)) for value in values]
    return {"mean": float(np.mean(each)), "ci95": list(nested_bootstrap_ci(values)), "each": each}


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _reasoning(record: Mapping[str, Any]) -> str:
    before, end, _ = str(record.get("text") or "").partition("</think>")
    return before.removeprefix("<think>") if end else ""


def _sum_pairs(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Add pairs of numbers up."""
    first, second = 0, 0
    for one, other in pairs:
        first, second = first + one, second + other
    return first, second


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
        | method | data | published mDice / mIoU / Fail | here, on my images: mDice | mIoU | Fail | seeds |
        | --- | --- | --- | --- | --- | --- | --- |
        | full | A | 37.00 / - / - | 50.0 [25.0, 75.0] | 50.0 [25.0, 75.0] | 50.0 [25.0, 75.0] | 1 |
        <BLANKLINE>
        | method | data | reward spread | no spread | trained parameters | s an answer | hedged |
        | --- | --- | --- | --- | --- | --- | --- |
        | full | A | - | 10.0 % | - | - | - |
    """
    lines: list[str] = []
    for table in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == table]
        heads = ["method", "data", "published mDice / mIoU / Fail", f"here, on {_cell(data)}: mDice", "mIoU", "Fail"]
        lines += [f"## Table {table}", ""]
        lines += _markdown([*heads, "seeds"], [_score_cells(row) for row in own])
        heads = ["method", "data", "reward spread", "no spread", "trained parameters", "s an answer", "hedged"]
        if measured := [row for row in own if row["seeds"]]:
            lines += ["", *_markdown(heads, [_other_cells(row) for row in measured])]
        notes = [f"{_cell(row['method'])}: {row['note']}" for row in own if row["note"]]
        lines += ["", *notes, ""]
    return "\n".join(lines).strip().replace("\n\n\n", "\n\n")


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def _score_cells(row: Mapping[str, Any]) -> list[str]:
    paper = " / ".join(_percent(row["published"].get(name), 2) for name in SCORES)
    scores = row.get("scores") or {}
    ours = [_interval(scores.get(name)) for name in SCORES]
    return [_cell(row["method"]), _cell(row["data"]), paper, *ours, str(len(row["seeds"]))]


def _other_cells(row: Mapping[str, Any]) -> list[str]:
    spread, seconds = row.get("reward_std"), row.get("seconds_per_answer")
    shares = [row.get(name) for name in ("zero_spread", "hedged")]
    none, hedged = ("-" if share is None else f"{100 * share:.1f} %" for share in shares)
    counts = [row.get(name) for name in ("trainable_parameters", "parameters")]
    trained, all_of_them = ("-" if count is None else f"{count / 1e6:.2f} M" for count in counts)
    return [
        *(_cell(row["method"]), _cell(row["data"])),
        *("-" if spread is None else f"{spread:.3f}", none),
        "-" if trained == "-" else f"{trained} of {all_of_them}",
        *("-" if seconds is None else f"{seconds:.2f}", hedged),
    ]


def write_sweep(
    home: Path, rows: Sequence[tuple[PublishedRow, Job | None]], seeds: Sequence[int], found: Sequence[Any], table: str
) -> list[str]:
    """Write `tables.json` and `tables.md`, and of each table that has runs a bar chart and a sheet of samples.

    Args:
        home: The folder of the sweep.
        rows: From `plan_sweep`.
        seeds: Seeds of the sweep; the sheet has answers of the first.
        found: From `summarise_sweep`.
        table: From `sweep_table`.

    Returns:
        Names of the files.
    """
    write_results(home / "tables.json", list(found))  # pyright: ignore[reportArgumentType]
    (home / "tables.md").write_text(f"{table}\n", encoding="utf-8")
    names = ["tables.md", "tables.json"]
    for part in dict.fromkeys(row.table for row, _ in rows):
        both = [(entry, job) for entry, (row, job) in zip(found, rows, strict=True) if row.table == part]
        data = both[0][0]["data"]  # that the runs were trained for
        own = [(entry, job) for entry, job in both if job is not None and entry["seeds"] and entry["data"] == data]
        if not own:
            continue
        groups = {entry["method"]: entry["groups"] for entry, _ in own}
        bar_chart(groups, home / f"table{part}_modalities.png", ylabel="mDice %", title=f"Table {part}, by modality")
        names.append(f"table{part}_modalities.png")
        runs = {entry["method"]: job.folder(seeds[0], home) for entry, job in own if seeds[0] in entry["seeds"]}
        if samples_sheet(runs, home / f"table{part}_samples.png"):
            names.append(f"table{part}_samples.png")
    return names


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    low, high = (100 * end for end in score["ci95"])
    return f"{100 * score['mean']:.1f} [{low:.1f}, {high:.1f}]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
