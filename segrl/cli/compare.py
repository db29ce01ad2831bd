"""`segrl compare`: runs on the same samples, with paired intervals."""

from __future__ import annotations

import argparse
from typing import Any

from segrl.cli.output import OK, add_command, count, positive, print_json

__all__ = ["add_compare_command"]


def add_compare_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl compare` to the areas of the command."""
    text = "compare runs on the same samples: differences with paired intervals, by group, and the cases that make them"
    command = add_command(areas, "compare", text, *parents)
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of runs or evaluations, or files of records; all are compared "
        "with the first; with --answers the folder of a sheet"
    )  # fmt: skip
    command.add_argument("--stage", metavar="NAME", help="compare this part of every run, such as stage1, control or "
                         "baseline; of a single RUN, with its own answers")  # fmt: skip
    command.add_argument("--scores", nargs="+", metavar="SCORE", help="default: all that the runs share")
    command.add_argument(
        "--cases", type=count, default=5, metavar="N", help="samples listed on either end (default: 5)"
    )
    sheet = command.add_argument_group("a blinded sheet for experts")
    sheet.add_argument("--review", type=positive, metavar="N", help="write a page with N samples of two runs, on which "
                       "people say whose mask is better without knowing whose it is")  # fmt: skip
    sheet.add_argument("--data", metavar="PATH", help="with --review: the images; default: those that the runs kept, "
                       "the first 16")  # fmt: skip
    sheet.add_argument("--split", default="test", metavar="NAME", help="with --data (default: test)")
    sheet.add_argument("--output_dir", metavar="FOLDER", help="with --review: a new folder (default: review)")
    sheet.add_argument("--seed", type=int, default=0, metavar="N", help="with --review: of samples and sides")
    sheet.add_argument("--answers", nargs="+", metavar="CSV", help="read what people saved from the sheet in RUN")
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from segrl.errors import SegRLError
    from segrl.evaluation.comparison import compare_records, read_records

    runs, stage = arguments.runs, arguments.stage
    if arguments.answers is not None:
        return _read_answers(arguments)
    if len(runs) == 1:
        if stage is None:
            raise SegRLError("compare: expected two runs or more, or one with --stage, got one")
        systems = {f"{runs[0]} ({stage})": read_records(runs[0], stage), runs[0]: read_records(runs[0])}
    else:
        systems = {run: read_records(run, stage) for run in runs}
        if len(systems) < len(runs):
            raise SegRLError(f"compare: a run is named twice: {' '.join(runs)}")
    if arguments.review is not None:
        return _write_review(arguments, systems)
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


def _write_review(arguments: argparse.Namespace, systems: dict[str, list[dict[str, Any]]]) -> int:
    from segrl.errors import SegRLError
    from segrl.evaluation.comparison import match_records
    from segrl.reports.review import write_review
    from segrl.reports.terminal import say

    if len(systems) != 2:
        raise SegRLError(f"--review: expected two runs, got {len(systems)}")
    (one, first), (other, second) = systems.items()
    second = match_records(first, second, (one, other))
    folder = arguments.output_dir or "review"
    chosen = write_review(
        *(first, second, _images(arguments, first), folder),
        names=(one, other),
        count=arguments.review,
        seed=arguments.seed,
    )
    few = "" if len(chosen) == arguments.review else f", fewer than {arguments.review}: no more masks differ"
    say(f"Written to {folder}: sheet.html with {len(chosen)} samples{few}; key.json, which is not for the experts")
    return OK


def _images(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> Any:
    """By the number of each record what reads its image."""
    from functools import partial
    from pathlib import Path

    from PIL import Image

    from segrl.data.splits import load_split
    from segrl.errors import SegRLError
    from segrl.evaluation.images import whole_image
    from segrl.scripts.results import SAMPLES

    if arguments.data is not None:
        rows = load_split(arguments.data, arguments.split)
        keys = list(zip(map(str, rows["name"]), map(str, rows["query"]), strict=True))
        places = {key: number for number, key in enumerate(keys)}
        wanted = [(str(record.get("name") or ""), str(record.get("query") or "")) for record in records]
        if missing := [key[0] for key in wanted if key not in places]:
            raise SegRLError(f"--data {arguments.data}: {len(missing)} of {len(wanted)} samples are not in split "
                             f"{arguments.split!r}, such as {missing[0]!r}")  # fmt: skip
        return {n: partial(lambda row: whole_image(dict(rows[row])), places[key]) for n, key in enumerate(wanted)}
    for run in arguments.runs:
        files = {int(path.stem): path for path in (Path(run) / SAMPLES).glob("*.png") if path.stem.isdigit()}
        if files:
            return {n: partial(Image.open, path) for n, path in files.items() if n < len(records)}
    raise SegRLError("--review: the runs kept no images; pass --data with the data that they were evaluated on")


def _read_answers(arguments: argparse.Namespace) -> int:
    from segrl.errors import SegRLError
    from segrl.reports.review import read_review
    from segrl.reports.terminal import say

    if len(arguments.runs) != 1:
        raise SegRLError(f"--answers: expected the folder of one sheet, got {len(arguments.runs)}")
    found = read_review(arguments.runs[0], arguments.answers)
    if arguments.json:
        return print_json(found)
    one, other = found["systems"]
    counts = found["answers"]
    say(f"{found['people']} people: {counts['first']} times {one}, {counts['second']} times {other}, {counts['equal']} "
        f"times equal, {found['unanswered']} unanswered")  # fmt: skip
    if found["preferred"] is not None:
        low, high = (100 * end for end in found["ci95"])
        say(f"{other} is preferred in {100 * found['preferred']:.1f} % [{low:.1f}, {high:.1f}] of the answers that "
            f"prefer one, p = {found['p']:.3g}")  # fmt: skip
    if found["agreement"] is not None:
        say(f"two people agree in {100 * found['agreement']:.1f} % of the samples")
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
