"""`segrl compare`: runs on the same samples, with paired intervals."""

from __future__ import annotations

import argparse
from typing import Any

from segrl.cli.output import OK, count, print_json

__all__ = ["add_compare_command"]


def add_compare_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl compare` to the areas of the command."""
    text = "compare runs on the same samples: differences with paired intervals, by group, and the cases that make them"
    command = areas.add_parser("compare", help=text, description=f"{text[0].upper()}{text[1:]}.", parents=parents)
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of runs or evaluations, or files of records; all are compared "
        "with the first"
    )  # fmt: skip
    command.add_argument("--stage", metavar="NAME", help="compare this part of every run, such as stage1, control or "
                         "baseline; of a single RUN, with its own answers")  # fmt: skip
    command.add_argument("--scores", nargs="+", metavar="SCORE", help="default: all that the runs share")
    command.add_argument(
        "--cases", type=count, default=5, metavar="N", help="samples listed on either end (default: 5)"
    )
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from segrl.errors import SegRLError
    from segrl.evaluation.comparison import compare_records, read_records

    runs, stage = arguments.runs, arguments.stage
    if len(runs) == 1:
        if stage is None:
            raise SegRLError("compare: expected two runs or more, or one with --stage, got one")
        systems = {f"{runs[0]} ({stage})": read_records(runs[0], stage), runs[0]: read_records(runs[0])}
    else:
        systems = {run: read_records(run, stage) for run in runs}
        if len(systems) < len(runs):
            raise SegRLError(f"compare: a run is named twice: {' '.join(runs)}")
    (reference, records), *others = systems.items()
    more = {"scores": arguments.scores, "cases": arguments.cases}
    found = [
        {"first": reference, "second": name, **compare_records(records, other, names=(reference, name), **more)}
        for name, other in others
    ]
    if arguments.json:
        return print_json(found)
    for comparison in found:
        _print(comparison)
    return OK


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from segrl.reports.terminal import console, excerpt, printable, say

    out = console()
    say(f"{found['second']} - {found['first']}, {found['n']} samples")  # whole, however long the paths are
    table = Table("", "score", "first", "second", "difference [95 %]", "n")
    for column in table.columns[2:]:
        column.justify = "right"

    def add(title: str, scores: dict[str, Any]) -> None:
        table.add_section()
        for name, row in scores.items():
            factor, heading = (1, name) if name.endswith("_mm") else (100, f"{name} %")
            if row["n"]:
                low, high = (factor * end for end in row["ci95"])
                means = [f"{factor * row[side]:.2f}" for side in ("first", "second")]
                cells = [*means, f"{factor * row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"]
            else:
                cells = ["-"] * 3
            table.add_row(Text(printable(title)), heading, *cells, str(row["n"]))
            title = ""

    add("all", found["scores"])
    for grouping, groups in found["groups"].items():
        for name, scores in groups.items():
            add(f"{grouping}: {name}", scores)
    out.print(table)
    score = next(iter(found["scores"]))
    for title, side in (("largest gains", "gained"), ("largest losses", "lost")):
        if found[side]:
            cases = Table("sample", "question", "first", "second", title=f"{title}, {score}", title_justify="left")
            for case in found[side]:
                texts = (Text(excerpt(case[key], 60)) for key in ("name", "query"))
                cases.add_row(*texts, f"{case['first']:.3f}", f"{case['second']:.3f}")
            out.print(cases)
