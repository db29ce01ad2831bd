"""`segrl data`: data in other layouts converted, and data checked as training would."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from segrl.cli.output import OK, print_json

__all__ = ["add_data_commands"]

_DRAWN, _CELL = 8, 160  # rows of each split on a sheet; pixels
_TEXTS = ("lesion", "modality", "anatomy", "query", "source")


def add_data_commands(areas: Any, common: argparse.ArgumentParser, as_json: argparse.ArgumentParser) -> None:
    """Add `segrl data` to the areas of the command."""
    text = "convert data from other layouts, and check data as training does"
    area = areas.add_parser("data", help=text, description=f"{text[0].upper()}{text[1:]}.")
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
    check.add_argument("--sheet", type=Path, metavar="FILE", help="images: draw the first rows of each split")
    check.set_defaults(run=_check)

    convert = commands.add_parser("convert", help="write a folder with manifest.csv that the trainers read")
    formats = convert.add_subparsers(dest="format", required=True, metavar="FORMAT")

    def add(name: str, help: str, *places: tuple[str, str]) -> argparse.ArgumentParser:
        command = formats.add_parser(name, parents=[common], help=help)
        for place, meaning in places:
            command.add_argument(place, type=Path, metavar=place.upper(), help=meaning)  # "source" is a column
        command.add_argument("destination", type=Path, metavar="DESTINATION", help="a new folder")
        command.add_argument("--hardlink", action="store_true", help="link files instead of copying them")
        for column in _TEXTS:
            command.add_argument(f"--{column}", metavar="TEXT", help=f"column {column} of every row")
        command.set_defaults(run=_convert)
        return command

    def divides(command: argparse.ArgumentParser) -> None:
        command.add_argument("--test_fraction", type=float, default=0.0, metavar="X", help="share of images drawn for "
                             "the split test, where the source has no splits (default: 0)")  # fmt: skip
        command.add_argument("--seed", type=int, default=0, metavar="N", help="of that draw")

    divides(add("pairs", "x.jpg with x_mask.png, or images/x.jpg with masks/x.png", ("path", "the folder")))
    coco = add("coco", "polygons and run lengths", ("annotations", "the JSON file"), ("images", "folder of its images"))
    coco.add_argument("--split", metavar="NAME", help="split of all rows (default: train, but for --test_fraction)")
    coco.add_argument(
        "--crossing", action="store_true", help="fill polygons that cross themselves, as pycocotools does"
    )
    divides(coco)
    nnunet = add("nnunet", "a data set of nnU-Net, images or scans", ("path", "the folder with dataset.json"))
    nnunet.add_argument("--channel", metavar="NAME", help="of several channels the one to take")
    layout = "the layout of ReasonSeg, with pixels to ignore"
    reasonseg = add("reasonseg", layout, ("path", "folder with train, val, test"))
    reasonseg.add_argument("--questions", choices=("first", "all"), default="first", help="of an image; LISA evaluates "
                           "the first (default)")  # fmt: skip
    places = (("refs", "expressions: grefs(unc).json or refs(unc).p"), ("instances", "instances.json"))
    refcoco = add("refcoco", "RefCOCO, +, g and gRefCOCO", *places, ("images", "folder of COCO's images"))
    refcoco.add_argument("--split", metavar="NAME", help="only this one, such as testA")
    add("biomedparse", "file names that say what masks show", ("path", "folder of one set, or of several"))
    bench = add("medsegbench", "arrays of images and labels", ("path", "the .npz file"))
    bench.add_argument("--labels", nargs="+", metavar="VALUE=NAME", help="of labels with several values")
    mmr = add("mmr", "questions about objects and parts", ("annotations", "MMR_NAME.json"), ("images", "COCO's images"))
    mmr.add_argument("--split", metavar="NAME", help="of all rows (default: NAME of the file)")
    med2d = add("sa_med2d", "SA-Med2D-20M, a file for each instance", ("path", "the folder SAMed2Dv1"))
    med2d.add_argument("--sets", nargs="+", metavar="SET", help="only these, such as kvasir_seg")
    divides(med2d)
    divides(add("m3d_refseg", "M3D-RefSeg, questions about scans", ("path", "folder of M3D_RefSeg.csv and the cases")))
    add("imed_361m", "IMed-361M, sparse masks of all structures", ("path", "folder of one set, or of several"))
    hub = add("hf", "a Hugging Face data set", ("path", "folder, file, or owner/name on the hub"))
    hub.add_argument("--columns", nargs="+", default=[], metavar="THEIRS=OURS", help="such as text=query gt=mask")


def _list(arguments: argparse.Namespace) -> int:
    from segrl.data.benchmarks import BENCHMARKS
    from segrl.reports.terminal import say

    if arguments.json:
        kept = ("what", "place", "command", "conventions", "seen")
        return print_json({name: {k: getattr(found, k) for k in kept} for name, found in BENCHMARKS.items()})
    for name, benchmark in BENCHMARKS.items():
        say(f"{name}: {benchmark.what}")
        say(f"  {benchmark.place}")
        say(f"  {benchmark.command}")
        if benchmark.conventions:
            say(f"  then: segrl eval ... --conventions {' '.join(benchmark.conventions)}")
    seen = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.seen)
    say(f"Layouts are those of public loaders; only samples of {seen} were seen. Nothing is downloaded here.")
    return OK


def _convert(arguments: argparse.Namespace) -> int:
    from segrl.data import formats
    from segrl.errors import SegRLError
    from segrl.reports.terminal import say

    texts = {name: value for name in _TEXTS if (value := getattr(arguments, name)) is not None}
    drawn = {name: getattr(arguments, name) for name in ("test_fraction", "seed") if hasattr(arguments, name)}
    unnamed = arguments.format == "pairs" or (arguments.format == "medsegbench" and not arguments.labels)
    if unnamed and not texts.keys() & {"lesion", "query"}:
        kind = arguments.format
        raise SegRLError(f"{kind}: what do the masks show? Pass --lesion, such as --lesion polyp, or --query")
    if arguments.format == "pairs":
        rows = formats.read_pairs(arguments.path, texts=texts, **drawn)
    elif arguments.format == "coco":
        rows = formats.read_coco(
            arguments.annotations,
            arguments.images,
            texts=texts,
            split=arguments.split,
            crossing=arguments.crossing,
            **drawn,
        )
    elif arguments.format == "nnunet":
        rows = formats.read_nnunet(arguments.path, texts=texts, channel=arguments.channel)
    elif arguments.format == "reasonseg":
        rows = formats.read_reasonseg(arguments.path, texts=texts, questions=arguments.questions)
    elif arguments.format == "refcoco":
        places = arguments.refs, arguments.instances, arguments.images
        rows = formats.read_refcoco(*places, texts=texts, split=arguments.split)
    elif arguments.format == "biomedparse":
        rows = formats.read_biomedparse(arguments.path, texts=texts)
    elif arguments.format == "medsegbench":
        rows = formats.read_medsegbench(arguments.path, texts=texts, labels=_labels(arguments.labels))
    elif arguments.format == "mmr":
        rows = formats.read_mmr(arguments.annotations, arguments.images, texts=texts, split=arguments.split)
    elif arguments.format == "sa_med2d":
        rows = formats.read_sa_med2d(arguments.path, texts=texts, sets=arguments.sets, **drawn)
    elif arguments.format == "m3d_refseg":
        rows = formats.read_m3d_refseg(arguments.path, texts=texts, **drawn)
    elif arguments.format == "imed_361m":
        rows = formats.read_imed_361m(arguments.path, texts=texts)
    else:
        rows = formats.read_columns(arguments.path, columns=_columns(arguments.columns), texts=texts)
    counts = formats.write_rows(rows, arguments.destination, hardlink=arguments.hardlink)
    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    say(f"Written to {arguments.destination}: {listed}")
    missing = [name for name in ("train", "test") if name not in counts]
    if missing:
        say(f"training needs the split {' and '.join(missing)} too: see --test_fraction, or --folds of the scripts")
    return OK


def _columns(given: list[str]) -> dict[str, str]:
    from segrl.data.formats.columns import COLUMNS
    from segrl.errors import SegRLError, unknown_name

    found: dict[str, str] = {}
    for pair in given:
        theirs, equals, ours = pair.partition("=")
        if not equals or not theirs or not ours:
            raise SegRLError(f"--columns {pair}: expected THEIRS=OURS, such as text=query")
        if ours not in COLUMNS:
            raise unknown_name("column", ours, COLUMNS)
        if ours in found:
            raise SegRLError(f"--columns: {found[ours]} and {theirs} are both {ours}; drop one")
        found[ours] = theirs
    return found


def _labels(given: list[str] | None) -> dict[int, str] | None:
    from segrl.errors import SegRLError

    found: dict[int, str] = {}
    for pair in given or ():
        value, equals, name = pair.partition("=")
        if not equals or not name or not value.isdigit() or not int(value):
            raise SegRLError(f"--labels {pair}: expected VALUE=NAME, such as 1=polyp")
        found[int(value)] = name
    return found or None


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
        for query in split["queries"]:
            say(f"  {query}")
    say(f"{arguments.path}: all {sum(split['rows'] for split in found['splits'].values())} rows can be read")
    return OK


def _draw(path: Path, task: str, splits: dict[str, Any]) -> None:
    """Draw the first rows of each split with their masks, a line a split."""
    from PIL import Image

    from segrl.errors import SegRLError
    from segrl.geometry.mask_images import binarize
    from segrl.reports.drawing import draw_overlay

    if task == "volumes":
        raise SegRLError("--sheet: only images are drawn; leave it out")
    sheet = Image.new("RGB", (_DRAWN * _CELL, max(1, len(splits)) * _CELL), (255, 255, 255))
    for down, rows in enumerate(splits.values()):
        for across in range(min(_DRAWN, len(rows))):
            row = rows[across]
            image = row["image"].convert("RGB")
            scale = (_CELL - 4) / max(image.size)
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            drawn = draw_overlay(image, size, target=binarize(row["mask"]))
            sheet.paste(drawn, (across * _CELL, down * _CELL))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
