"""What a run found, for a person to read: the results table, the results file and a sheet of pictures.

Scores are fractions in [0, 1] everywhere in the data; only the printed table multiplies by 100. Distances are in
millimetres. Model text is drawn or printed as escaped plain text and never interpreted.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

import segrl
from segrl.drawing import GROUND, INK, PALE, PAPER, draw_legend, draw_overlay, wrap_text
from segrl.errors import DataError
from segrl.metrics import GROUPINGS
from segrl.prediction import Prediction, Target
from segrl.terminal import printable

__all__ = ["Column", "contact_sheet", "results_table", "versions", "write_results"]

STAGES = ("baseline", "stage1", "stage2", "model")  # "model": one that is only evaluated
VOLUME_STAGES = ("oracle", *STAGES[1:])  # "oracle": the segmenter prompted with the truth
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "sam2")
PLAIN_WIDTH = 100  # columns at least, where the output is not a terminal
WIDEST = 1000  # columns that are enough for every table
_PLAIN = (1, sys.float_info.max, "a finite number of at least 0")

MARGIN, LINE, FONT_SIZE = 8, 14, 11
QUERY_LINES, TEXT_LINES = 3, 8


@dataclass(frozen=True)
class Column:
    """A column of the results table.

    Attributes:
        title: What stands above it, with the unit.
        percent: Whether the scores are fractions in [0, 1], printed times 100; else they are printed as they are and
            are at least 0, such as a distance in millimetres.
    """

    title: str
    percent: bool = True


COLUMNS = {"mdice": Column("mDice %"), "miou": Column("mIoU %"), "fail": Column("Failure Rate %")}
VOLUME_COLUMNS = {
    "mdice": Column("Dice %"),
    "miou": Column("IoU %"),
    "hd95_mm": Column("HD95 mm", percent=False),
    "nsd": Column("NSD %"),
    "slice_visibility": Column("visibility %"),
    "slice_boxes": Column("boxes %"),
    "fail": Column("Failure Rate %"),
}


def results_table(
    results: Mapping[str, Any],
    console: Console | None = None,
    *,
    columns: Mapping[str, Column] = COLUMNS,
    stages: Sequence[str] = STAGES,
    groupings: Sequence[str] = GROUPINGS,
) -> None:
    """Print the stages of a run with 95 % intervals, over all samples and then by groups, such as modality and anatomy.

    A mean that does not apply to every sample (see `optional` of `segrl.metrics.summarise`) stands with the number of
    samples that it is over, where that is not all, and as a dash where it is over none.

    Args:
        results: Summaries as `segrl.metrics.summarise` returns them, under the names in `stages`. Any of them may be
            absent, and so may "ci95" and "groups"; other keys are ignored.
        console: Where to print; standard output by default.
        columns: What to print of a summary, by its keys. For volumes pass `VOLUME_COLUMNS`, or some of it.
        stages: Keys of `results`, in the order in which they are printed; for volumes `VOLUME_STAGES`.
        groupings: Which of the summaries' "groups" to print, in this order; for volumes
            `segrl.volume_evaluation.VOLUME_GROUPINGS`.

    Raises:
        DataError: No stage at all, or a score that is missing, not a fraction or, of a column that is not in percent,
            below 0; the stage and score are named.
    """
    present = [stage for stage in stages if stage in results]
    if not present:
        raise DataError(f"results: expected at least one of {', '.join(stages)}, got the keys {sorted(results)}")
    table = Table(title="Mean and 95 % interval", title_justify="left")
    table.add_column("")
    for title in (*(column.title for column in columns.values()), "n"):
        table.add_column(title, justify="right")
    for stage in present:
        table.add_row(Text(printable(stage)), *_cells(results[stage], stage, columns))
    for grouping in groupings:
        groups = {stage: results[stage].get("groups", {}).get(grouping, {}) for stage in present}
        for name in sorted({name for members in groups.values() for name in members}):
            table.add_section()
            table.add_row(Text(f"{grouping}: {printable(name)}", style="bold"))
            for stage in present:
                if name in groups[stage]:
                    cells = _cells(groups[stage][name], f"{stage}, {grouping} {name!r}", columns)
                    table.add_row(Text(f"  {printable(stage)}"), *cells)
    if console is None:
        console = Console()
        if not console.is_terminal:  # no cell of the table is broken
            wide = Console(width=WIDEST)
            console = Console(width=max(PLAIN_WIDTH, Measurement.get(wide, wide.options, table).maximum))
    console.print(table)


def _cells(summary: Mapping[str, Any], where: str, columns: Mapping[str, Column]) -> list[Text]:
    """The score cells and the sample count of one row."""
    n, scored = summary.get("n", ""), summary.get("n_scored", {})
    cells = []
    for key, column in columns.items():
        if scored.get(key) == 0:
            cells.append("-")
            continue
        factor, most, expected = (100, 1.0, "a fraction in [0, 1], not a percentage") if column.percent else _PLAIN
        shown = [summary.get(key), *(summary.get("ci95", {}).get(key) or ())]
        for value in shown:
            if not isinstance(value, int | float | np.floating) or not 0.0 <= value <= most:
                raise DataError(f"{where}: {key} is {value}; expected {expected}")
        mean, *interval = (factor * float(value) for value in shown)
        text = f"{mean:.2f}" + (" [{:.1f}, {:.1f}]".format(*interval) if interval else "")
        cells.append(text if scored.get(key, n) == n else f"{text} (n {scored[key]})")
    return [Text(cell) for cell in (*cells, str(n))]


def versions() -> dict[str, str | None]:
    """Versions of Python, segrl and the packages that a result depends on; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "segrl": segrl.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Write results as JSON with sorted keys, whole or not at all: a reader never sees half a file.

    Args:
        path: The file; missing folders are made, an existing file is replaced.
        results: Mappings, sequences, strings, numbers (numpy's too), booleans, `None` and paths, nested as you like.

    Returns:
        The path.

    Raises:
        DataError: A number that is not finite or a value that JSON cannot hold; its place is named, nothing is written.
    """
    path = Path(path)
    text = json.dumps(_plain(results, "results"), indent=2, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _plain(value: Any, where: str) -> Any:
    """`value` in the types that JSON knows."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(
            f"{where} is {value}; expected a finite number, because JSON has no other. Use None for 'no value'"
        )
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise DataError(f"{where} is a {type(value).__name__}; expected numbers, text, mappings or sequences")


def contact_sheet(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, columns: int = 4, cell: int = 192
) -> Path:
    """Draw predictions beside the truth, one cell per row of data, into one picture.

    Each cell shows the image with the true mask outlined in green, the predicted mask in translucent red and the
    predicted boxes in yellow; below it the query, the model's text (its middle left out when long), Dice and status.

    Args:
        rows: Mappings with "image" (PIL image, any size, the same view as the mask), "prediction" (`Prediction`; a
            `None` mask draws none), "target" (`Target`) and "dice" (fraction).
        path: The picture; its suffix sets the format, missing folders are made.
        columns: Cells side by side.
        cell: Width of a cell in pixels; images keep their aspect.

    Returns:
        The path.

    Raises:
        DataError: No rows, a missing key, sizes out of range, or a predicted mask that is not as large as the true one.
    """
    if not rows or columns < 1 or cell < 64:
        raise DataError(
            f"expected rows, columns >= 1 and cell >= 64, got {len(rows)} rows, columns={columns}, cell={cell}"
        )
    for index, row in enumerate(rows):
        missing = [key for key in ("image", "prediction", "target", "dice") if key not in row]
        if missing:
            raise DataError(f"rows[{index}]: missing {missing}, got the keys {sorted(row)}")
    columns = min(columns, len(rows))
    height = cell + 2 + LINE * (QUERY_LINES + TEXT_LINES + 1)
    sheet = Image.new(
        "RGB",
        (MARGIN + columns * (cell + MARGIN), LINE + 2 * MARGIN + -(-len(rows) // columns) * (height + MARGIN)),
        PAPER,
    )
    draw_legend(ImageDraw.Draw(sheet), MARGIN, MARGIN, FONT_SIZE)
    for index, row in enumerate(rows):
        across, down = index % columns, index // columns
        picture = _draw_cell(row, f"rows[{index}]", cell, height)
        sheet.paste(picture, (MARGIN + across * (cell + MARGIN), LINE + 2 * MARGIN + down * (height + MARGIN)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _draw_cell(row: Mapping[str, Any], where: str, cell: int, height: int) -> Image.Image:
    prediction: Prediction = row["prediction"]
    target: Target = row["target"]
    picture = Image.new("RGB", (cell, height), PAPER)
    drawn = _draw_overlay(row["image"], prediction, target, where, cell)
    picture.paste(GROUND, (0, 0, cell, cell))
    picture.paste(drawn, ((cell - drawn.width) // 2, (cell - drawn.height) // 2))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    lines = [
        *((line, INK) for line in wrap_text(target.query, font, cell, QUERY_LINES)),
        *((line, PALE) for line in wrap_text(prediction.text, font, cell, TEXT_LINES)),
        (f"Dice {row['dice']:.2f}  {prediction.status.value}", INK),
    ]
    for index, (line, colour) in enumerate(lines):
        draw.text((0, cell + 2 + index * LINE), line, fill=colour, font=font)
    return picture


def _draw_overlay(image: Image.Image, prediction: Prediction, target: Target, where: str, cell: int) -> Image.Image:
    """The image at the size of a cell, with masks and boxes; those are in the pixels of the true mask."""
    if prediction.mask is not None and prediction.mask.shape != target.mask.shape:
        raise DataError(
            f"{where}: the predicted mask has shape {prediction.mask.shape}, the true one {target.mask.shape}; "
            "resize the prediction to original pixels"
        )
    scale = cell / max(target.width, target.height)
    size = max(1, round(target.width * scale)), max(1, round(target.height * scale))
    return draw_overlay(
        image,
        size,
        mask=prediction.mask,
        truth=target.mask,
        boxes=prediction.boxes,
        pixels=(target.width, target.height),
    )
