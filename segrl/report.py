"""What a run found, for a person to read: the results table, the results file and a sheet of pictures.

Scores are fractions in [0, 1] everywhere in the data; only the printed table multiplies by 100. Model text is drawn or
printed as escaped plain text and never interpreted.
"""

# N boxes, H/W pixels of the original image, h/w pixels of the drawn image

from __future__ import annotations

import json
import math
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import ndimage

import segrl
from segrl.errors import DataError
from segrl.masks import resize_mask
from segrl.metrics import GROUPINGS
from segrl.prediction import Prediction, Target
from segrl.terminal import printable

__all__ = ["contact_sheet", "results_table", "versions", "write_results"]

STAGES = ("baseline", "stage1", "stage2", "model")  # "model": one that is only evaluated
COLUMNS = {"mdice": "mDice %", "miou": "mIoU %", "fail": "Failure Rate %"}
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "sam2")
PLAIN_WIDTH = 100  # columns, where the output is not a terminal: no cell of the table is broken

TRUTH, PREDICTED, BOX = (40, 220, 90), (230, 40, 40), (255, 220, 0)
INK, PALE, PAPER, FILL_ALPHA = (25, 25, 25), (95, 95, 95), (255, 255, 255), 0.4
MARGIN, LINE, FONT_SIZE = 8, 14, 11
QUERY_LINES, TEXT_LINES = 3, 8
DRAWN_CHARACTERS = 1000  # of a text's start, and of its end: more never fits


def results_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the stages of a run with 95 % intervals, over all samples and then by modality and by anatomy.

    Args:
        results: Summaries as `segrl.metrics.summarise` returns them (fractions) under "baseline", "stage1", "stage2"
            and "model" (one that is only evaluated). Any of them may be absent, and so may "ci95" and "groups"; other
            keys are ignored.
        console: Where to print; standard output by default.

    Raises:
        DataError: No stage at all, or a score that is missing or not a fraction; the stage and score are named.
    """
    present = [stage for stage in STAGES if stage in results]
    if not present:
        raise DataError(f"results: expected at least one of {', '.join(STAGES)}, got the keys {sorted(results)}")
    table = Table(title="Mean and 95 % interval", title_justify="left")
    table.add_column("")
    for title in (*COLUMNS.values(), "n"):
        table.add_column(title, justify="right")
    for stage in present:
        table.add_row(stage, *_cells(results[stage], stage))
    for grouping in GROUPINGS:
        groups = {stage: results[stage].get("groups", {}).get(grouping, {}) for stage in present}
        for name in sorted({name for members in groups.values() for name in members}):
            table.add_section()
            table.add_row(Text(f"{grouping}: {printable(name)}", style="bold"))
            for stage in present:
                if name in groups[stage]:
                    table.add_row(f"  {stage}", *_cells(groups[stage][name], f"{stage}, {grouping} {name!r}"))
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=PLAIN_WIDTH)
    console.print(table)


def _cells(summary: Mapping[str, Any], where: str) -> list[Text]:
    """The score cells and the sample count of one row, in percent."""
    cells = []
    for key in COLUMNS:
        shown = [summary.get(key), *summary.get("ci95", {}).get(key, ())]
        for value in shown:
            if value is None or not 0.0 <= value <= 1.0:
                raise DataError(f"{where}: {key} is {value}; expected a fraction in [0, 1], not a percentage")
        mean, *interval = (100 * float(value) for value in shown)
        cells.append(Text(f"{mean:.2f}" + (" [{:.1f}, {:.1f}]".format(*interval) if interval else "")))
    return [*cells, Text(str(summary.get("n", "")))]


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
    _draw_legend(ImageDraw.Draw(sheet))
    for index, row in enumerate(rows):
        across, down = index % columns, index // columns
        picture = _draw_cell(row, f"rows[{index}]", cell, height)
        sheet.paste(picture, (MARGIN + across * (cell + MARGIN), LINE + 2 * MARGIN + down * (height + MARGIN)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _draw_legend(draw: ImageDraw.ImageDraw) -> None:
    font, x = ImageFont.load_default(FONT_SIZE), float(MARGIN)
    for colour, label in ((TRUTH, "truth"), (PREDICTED, "prediction"), (BOX, "boxes")):
        draw.rectangle((x, MARGIN + 2, x + 10, MARGIN + 12), fill=colour, outline=INK)
        draw.text((x + 14, MARGIN), label, fill=INK, font=font)
        x += 28 + font.getlength(label)


def _draw_cell(row: Mapping[str, Any], where: str, cell: int, height: int) -> Image.Image:
    prediction: Prediction = row["prediction"]
    target: Target = row["target"]
    picture = Image.new("RGB", (cell, height), PAPER)
    drawn = _draw_overlay(row["image"], prediction, target, where, cell)
    picture.paste((20, 20, 20), (0, 0, cell, cell))
    picture.paste(drawn, ((cell - drawn.width) // 2, (cell - drawn.height) // 2))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    lines = [
        *((line, INK) for line in _wrap(target.query, font, cell, QUERY_LINES)),
        *((line, PALE) for line in _wrap(prediction.text, font, cell, TEXT_LINES)),
        (f"Dice {row['dice']:.2f}  {prediction.status.value}", INK),
    ]
    for index, (line, colour) in enumerate(lines):
        draw.text((0, cell + 2 + index * LINE), line, fill=colour, font=font)
    return picture


def _draw_overlay(image: Image.Image, prediction: Prediction, target: Target, where: str, cell: int) -> Image.Image:
    """The image at the size of a cell, with masks and boxes; those are in the pixels of the true mask."""
    scale = cell / max(target.width, target.height)
    w, h = max(1, round(target.width * scale)), max(1, round(target.height * scale))
    pixels = np.array(image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC))
    if prediction.mask is not None:
        if prediction.mask.shape != target.mask.shape:
            raise DataError(
                f"{where}: the predicted mask has shape {prediction.mask.shape}, the true one {target.mask.shape}; "
                "resize the prediction to original pixels"
            )
        inside = resize_mask(prediction.mask, (h, w))
        pixels[inside] = (1 - FILL_ALPHA) * pixels[inside] + FILL_ALPHA * np.array(PREDICTED)
    truth = resize_mask(target.mask, (h, w))
    pixels[truth & ~ndimage.binary_erosion(truth)] = TRUTH
    drawn = Image.fromarray(pixels)
    draw = ImageDraw.Draw(drawn)
    for x1, y1, x2, y2 in prediction.boxes * (w / target.width, h / target.height, w / target.width, h / target.height):
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=BOX)
    return drawn


def _wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    """At most `most` lines of at most `width` pixels; the middle of a longer text is left out."""
    if len(text) > 2 * DRAWN_CHARACTERS:
        text = f"{text[:DRAWN_CHARACTERS]} ... {text[-DRAWN_CHARACTERS:]}"
    text = text.encode("unicode_escape").decode("ascii")
    characters = width // 4
    lines = textwrap.wrap(text, characters)
    while characters > 1 and any(font.getlength(line) > width for line in lines):
        characters -= 1
        lines = textwrap.wrap(text, characters)
    if len(lines) <= most:
        return lines
    return [*lines[: most - 3], "...", *lines[-2:]] if most > 3 else [*lines[: most - 1], "..."]
