"""`segrl data`: data in other layouts converted, and data checked as training would."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from segrl.cli.formats import FORMATS, TEXTS, imported
from segrl.cli.output import OK, add_command, print_json

__all__ = ["add_data_commands"]

_DRAWN, _CELL = 8, 160  # rows of each split on a sheet; pixels


def add_data_commands(areas: Any, common: argparse.ArgumentParser, as_json: argparse.ArgumentParser) -> None:
    """Add `segrl data` to the areas of the command."""
    text = "convert data from other layouts, and check data as training does"
    area = add_command(areas, "data", text)
    commands = area.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "public benchmarks: where they are, and how they are read"
    listed = commands.add_parser("list", parents=[common, as_json], help=text)
    listed.set_defaults(run=_list)
    check = commands.add_parser(
        "check", parents=[common, as_json], help="read every file, and say what the splits hold"
    )
    check.add_argument("path", metavar="PATH", help="folder with manifest.csv, or a DatasetDict saved to disk")
    check.add_argument("--benchmark", metavar="NAME", help="PATH is a download in the layout of this one of "
                       "`segrl data list`")  # fmt: skip
    check.add_argument("--allow_outside", action="store_true", help="let manifest.csv name files outside its folder")
    check.add_argument("--allow_empty", action="store_true", help="volumes: rows may ask for what is not there")
    check.add_argument("--sheet", type=Path, metavar="FILE", help="draw the first rows of each split")
    check.set_defaults(run=_check)

    _add_convert(commands, common)
    _add_export(commands, common)


def _add_convert(commands: Any, common: argparse.ArgumentParser) -> None:
    convert = commands.add_parser("convert", help="write a folder with manifest.csv that the trainers read")
    formats = convert.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, layout in FORMATS.items():
        command = formats.add_parser(name, parents=[common], help=layout.help, description=layout.help + ".")
        for place, meaning in layout.places.items():
            command.add_argument(place, type=Path, metavar=place.upper(), help=meaning)  # "source" is a column
        command.add_argument("destination", type=Path, metavar="DESTINATION", help="a new folder")
        command.add_argument("--hardlink", action="store_true", help="link files instead of copying them")
        for column in TEXTS:
            command.add_argument(f"--{column}", metavar="TEXT", help=f"column {column} of every row")
        for flag, entry in layout.flags.items():
            command.add_argument(f"--{flag}", help=entry.help, **entry.settings)
        command.set_defaults(run=_convert)


def _add_export(commands: Any, common: argparse.ArgumentParser) -> None:
    export = commands.add_parser("export", help="write a folder with manifest.csv in another layout")
    formats = export.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, layout in FORMATS.items():
        if not layout.write:
            continue
        command = formats.add_parser(name, parents=[common], help=layout.help, description=layout.help + ".")
        command.add_argument("path", type=Path, metavar="PATH", help="folder with manifest.csv")
        command.add_argument("destination", type=Path, metavar="DESTINATION", help="a new folder")
        for column in TEXTS:
            command.add_argument(f"--{column}", metavar="TEXT", help=f"in place of the column {column}")
        command.set_defaults(run=_export)


def _list(arguments: argparse.Namespace) -> int:
    from segrl.data.benchmarks import BENCHMARKS
    from segrl.reports.terminal import say

    if arguments.json:
        kept = ("what", "place", "command", "conventions", "seen", "default")
        return print_json({name: {key: getattr(found, key) for key in kept} for name, found in BENCHMARKS.items()})
    for name, benchmark in BENCHMARKS.items():
        say(f"{name}: {benchmark.what}")
        say(f"  {benchmark.place}")
        say(f"  {benchmark.command}")
        say(f"  as downloaded: --benchmark {name}" + (f": {benchmark.default}" if benchmark.default else ""))
        if benchmark.conventions:
            say(f"  then: segrl eval ... --conventions {' '.join(benchmark.conventions)}")
    seen = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.seen)
    say(f"Layouts are those of public loaders; only samples of {seen} were seen. Nothing is downloaded here.")
    return OK


def _convert(arguments: argparse.Namespace) -> int:
    from segrl.data.formats.rows import write_rows
    from segrl.reports.terminal import say

    rows = FORMATS[arguments.format].rows(arguments.format, arguments)
    counts = write_rows(rows, arguments.destination, hardlink=arguments.hardlink)
    _say_written(arguments.destination, counts)
    missing = [name for name in ("train", "test") if name not in counts]
    if missing:
        say(f"training needs the split {' and '.join(missing)} too: see --test_fraction, or --folds of the scripts")
    return OK


def _export(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from segrl.data.formats.own_folder import read_rows

    texts = {name: value for name in TEXTS if (value := getattr(arguments, name)) is not None}
    rows = (replace(row, texts={**row.texts, **texts}) for row in read_rows(arguments.path))
    _say_written(arguments.destination, imported(FORMATS[arguments.format].write)(rows, arguments.destination))
    return OK


def _say_written(destination: Path, counts: dict[str, int]) -> None:
    from segrl.reports.terminal import say

    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    say(f"Written to {destination}: {listed}")


def _check(arguments: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from segrl.data.benchmarks import benchmark_folder
    from segrl.data.overview import data_overview
    from segrl.reports.terminal import say

    draw = None if arguments.sheet is None else partial(_draw, arguments.sheet)
    named = arguments.benchmark
    with nullcontext(arguments.path) if named is None else benchmark_folder(named, arguments.path) as folder:
        may = {"allow_outside": arguments.allow_outside, "allow_empty": arguments.allow_empty}
        found = data_overview(folder, **may, on_splits=draw)
    if arguments.json:
        return print_json(found)
    for name, split in found["splits"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in split["lesions"].items())
        say(f"{name}: {split['rows']} rows about {split['images']} {found['task']}: {kinds}")
        if split["foreground"]:
            low, middle, high = (100 * share for share in split["foreground"])
            say(f"  {split['empty']} empty masks; foreground {low:.2f} to {high:.2f} %, median {middle:.2f} %; "
                f"{split['sizes']}")  # fmt: skip
        elif split["empty"]:
            say(f"  {split['empty']} rows ask for what is not there")
        for query in split["queries"]:
            say(f"  {query}")
    say(f"{arguments.path}: all {sum(split['rows'] for split in found['splits'].values())} rows can be read")
    return OK


def _draw(path: Path, task: str, splits: dict[str, Any]) -> None:
    """Draw the first rows of each split with their masks, a line a split; of volumes the slice with most of a mask."""
    from PIL import Image

    from segrl.reports.drawing import draw_overlay

    shown = _slices() if task == "volumes" else _image
    sheet = Image.new("RGB", (_DRAWN * _CELL, max(1, len(splits)) * _CELL), (255, 255, 255))
    for down, rows in enumerate(splits.values()):
        for across in range(min(_DRAWN, len(rows))):
            image, mask = shown(rows[across])
            scale = (_CELL - 4) / max(image.size)
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            drawn = draw_overlay(image, size, target=mask)
            sheet.paste(drawn, (across * _CELL, down * _CELL))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _image(row: dict[str, Any]) -> tuple[Any, Any]:
    from segrl.geometry.mask_images import binarize

    return row["image"].convert("RGB"), binarize(row["mask"])


def _slices() -> Any:
    from PIL import Image

    from segrl.data.volumes.case import CaseReader

    read = CaseReader()

    def shown(row: dict[str, Any]) -> tuple[Any, Any]:
        case = read(row, allow_empty=True)
        assert case.mask is not None
        sums = case.mask.sum(axis=(1, 2))
        index = int(sums.argmax()) if sums.any() else len(sums) // 2
        return Image.fromarray(case.grey[index]), case.mask[index]

    return shown
