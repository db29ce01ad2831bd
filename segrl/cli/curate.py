"""`segrl curate`: a data set for reasoning segmentation built from any images and masks."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segrl.cli.output import OK

__all__ = ["add_curate_commands"]

_EPILOG = """examples:
  segrl curate run curate.yaml                 all stages, into the folder build beside the file
  segrl curate run curate.yaml --dry_run       count calls, tokens, cost, trainings and disk, and make nothing
  segrl curate difficulty curate.yaml          one stage
  segrl curate select curate.yaml              vote and threshold again, after a change of difficulty: tail
  segrl curate report build                    one HTML page

A stage that was stopped goes on where it was when its command is given again."""


def add_curate_commands(areas: Any, common: argparse.ArgumentParser) -> None:
    """Add `segrl curate` to the areas of the command."""
    text = "build a data set from any images and masks: hard cases, texts, publication"
    raw = argparse.RawDescriptionHelpFormatter
    area = areas.add_parser("curate", help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EPILOG,
                            formatter_class=raw)  # fmt: skip
    commands = area.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help in (
        ("run", _run, "all stages, each of them where it was stopped"),
        ("difficulty", _difficulty, "train the committees, measure every case out of fold, select the hard ones"),
        ("select", _select, "vote and threshold again, from the errors that are there"),
        ("write", _write, "write question, reasoning and answer of every hard case"),
        ("judge", _judge, "judge the texts, and let those be written again that are not good enough"),
        ("publish", _publish, "write the data set, split by patient, with a card"),
    ):
        command = commands.add_parser(name, parents=[common], help=help)
        command.add_argument("settings", type=Path, metavar="FILE", help="the settings, such as curate.yaml")
        command.add_argument("--build", type=Path, metavar="FOLDER", help="the build (default: that of the settings)")
        command.add_argument("--dry_run", action="store_true", help="count calls, tokens, cost, trainings and disk; "
                             "make nothing")  # fmt: skip
        if run in (_run, _difficulty, _write, _judge):
            command.add_argument("--engine", choices=["local", "ray"], default="local",
                                 help="where trainings and calls run: here, or on a Ray cluster")  # fmt: skip
        command.set_defaults(run=_dry(run))
    report = commands.add_parser("report", parents=[common], help="one HTML page about a build")
    report.add_argument("build", type=Path, metavar="FOLDER", help="the build")
    report.set_defaults(run=_report)


def _read(arguments: argparse.Namespace) -> tuple[Any, Path]:
    from segrl.curation.settings import CurationSettings

    settings = CurationSettings.read(arguments.settings)
    return settings, arguments.build or settings.build


def _dry(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Return a command that plans its stages if `--dry_run` was given, and else runs them."""

    def command(arguments: argparse.Namespace) -> int:
        _read(arguments)  # a mistake in the file is told before the packages of the stages are loaded
        return _plan(arguments, _PLANNED[run]) if arguments.dry_run else run(arguments)

    return command


def _plan(arguments: argparse.Namespace, stages: Any) -> int:
    from segrl.curation.plan import plan_build
    from segrl.curation.plan_lines import plan_table
    from segrl.reports.terminal import say

    settings, build = _read(arguments)
    say(f"A plan; nothing is made.\n{plan_table(plan_build(settings, build), stages)}")
    return OK


def _run(arguments: argparse.Namespace) -> int:
    from segrl.curation.engine import connected

    with connected(arguments.engine):
        for stage in (_difficulty, _write, _judge):
            stage(arguments)
    _publish(arguments)
    arguments.build = _read(arguments)[1]
    return _report(arguments)


def _difficulty(arguments: argparse.Namespace) -> int:
    from segrl.curation.stages import run_difficulty

    settings, build = _read(arguments)
    return _told(run_difficulty(settings, build, engine=arguments.engine), build)


def _select(arguments: argparse.Namespace) -> int:
    from segrl.curation.stages import run_selection

    settings, build = _read(arguments)
    return _told(run_selection(settings, build), build)


def _told(sets: Any, build: Path) -> int:
    """Print both thresholds of every set, and which one selects."""
    from segrl.curation.difficulty import FOLDER
    from segrl.curation.suspects import LIST, SHEET
    from segrl.reports.terminal import number, say

    for found in sets:
        tail = found.tail
        say(
            f"{found.source}: {found.selected} of {found.cases} cases are hard, error {number(tail.threshold)} or more "
            f"(selected by {tail.selected_by}; knee {number(tail.knee)}, x_min {number(tail.x_min)}, alpha "
            f"{number(tail.alpha)})"
        )
        say(f"  Dice of the committee {number(found.mean_dice)}: hard half {number(found.hard_dice)}, others "
            f"{number(found.easy_dice)}")  # fmt: skip
        for note in tail.notes:
            say(f"  {note}")
    path = build / FOLDER / LIST
    count = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    if count:
        say(f"{count} masks to look at: open {build / FOLDER / SHEET}, and save its answers beside it")
    return OK


def _write(arguments: argparse.Namespace) -> int:
    from segrl.curation.stages import run_writing

    settings, build = _read(arguments)
    return _counted(run_writing(settings, build, engine=arguments.engine), build / "texts.jsonl")


def _judge(arguments: argparse.Namespace) -> int:
    from segrl.curation.stages import run_judging

    settings, build = _read(arguments)
    return _counted(run_judging(settings, build, engine=arguments.engine), build / "judgements.jsonl")


def _counted(rows: Any, path: Path) -> int:
    """Print how many rows have each status; why is in the file."""
    from segrl.reports.terminal import say

    counts = Counter(row.status for row in rows)
    say(f"Written to {path}: {', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}")
    return OK


def _publish(arguments: argparse.Namespace) -> int:
    from segrl.curation.publish import DATASET, read_final_texts
    from segrl.curation.stages import run_publish
    from segrl.reports.terminal import say

    settings, build = _read(arguments)
    counts = run_publish(settings, build)
    say(f"Written to {build / DATASET}: {', '.join(f'{count} {split}' for split, count in counts.items())}")
    if read_final_texts(build) is None:
        say("no texts were written: questions are from templates, without reasoning")
    return OK


def _report(arguments: argparse.Namespace) -> int:
    from segrl.curation.report import write_build_report
    from segrl.reports.terminal import say

    say(f"Written to {write_build_report(arguments.build)}")
    return OK


_PLANNED: dict[Callable[[argparse.Namespace], int], tuple[str, ...]] = {
    _run: ("difficulty", "write", "judge", "publish"),
    _difficulty: ("difficulty",),
    _select: (),
    _write: ("write",),
    _judge: ("judge",),
    _publish: ("publish",),
}
