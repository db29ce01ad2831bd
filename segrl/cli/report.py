"""`segrl report`: a run, or two beside each other, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from segrl.cli.output import OK, add_command

__all__ = ["add_report_command"]


def add_report_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl report` to the areas of the command."""
    text = "write a run, or two beside each other, as one HTML file: curves, groups of answers, failures, cases"
    command = add_command(
        *(areas, "report", text, *parents),
        more="The file needs no network, and holds what an interrupted run has.",
        epilog="examples: segrl report runs/core_seg; segrl report runs/a runs/b -o both.html",
    )
    command.add_argument("first", metavar="RUN", help="folder of a run or of an evaluation")
    command.add_argument("other", metavar="OTHER_RUN", nargs="?", help="a second one, beside it")
    command.add_argument("-o", "--output", metavar="FILE", help="where to write (default: report.html in RUN)")
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from segrl.errors import SegRLError
    from segrl.evaluation.comparison import compare_records
    from segrl.reports.run_files import read_run
    from segrl.reports.run_report import run_report
    from segrl.reports.terminal import say

    names = [name for name in (arguments.first, arguments.other) if name is not None]
    output = Path(arguments.output or Path(names[0]) / "report.html")
    if output.is_dir() or (output.exists() and output.suffix.lower() not in (".html", ".htm")):
        raise SegRLError(f"--output {str(output)!r} is there and is no HTML file; pass another")
    runs = [read_run(name) for name in names]
    comparison = None
    if len(runs) == 2 and all("run" in run.records for run in runs):
        first, second = (run.records["run"] for run in runs)
        try:
            comparison = compare_records(first, second, names=(names[0], names[1]), cases=0)
        except SegRLError as error:
            say(f"not compared sample by sample: {error}")
    page = run_report(runs, comparison)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    say(f"Written to {output}: {len(page.encode('utf-8')) / 1e6:.1f} MB, {sum(len(run.groups) for run in runs)} groups")
    for run in runs:
        for note in run.notes:
            say(f"{run.name}: {note}")
    return OK
