"""A contact sheet: images with predicted and ground truth masks, the query and the text, in one picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from segrl.errors import DataError
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target
from segrl.reports.drawing import GROUND, INK, PALE, PAPER, draw_legend, draw_overlay, wrap_text

__all__ = ["contact_sheet"]

MARGIN, LINE, FONT_SIZE = 8, 14, 11  # pixels
QUERY_LINES, TEXT_LINES = 3, 8


def contact_sheet(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, columns: int = 4, cell: int = 192
) -> Path:
    """Draw predictions and ground truth, one cell per row of data, into one picture.

    Each cell shows the image with the ground truth mask outlined in green, the predicted mask in translucent red and
    the predicted boxes in yellow; below it the query, the model's text (a long one without its middle), Dice and
    status.

    Args:
        rows: Mappings with "image" (PIL image of any size, the same view as the mask), "prediction" (`Prediction`; a
            mask that is `None` is not drawn), "target" (`Target`) and "dice" (fraction).
        path: Path of the picture; its suffix sets the format, missing folders are created.
        columns: Cells side by side.
        cell: Width of a cell in pixels; images keep their aspect.

    Returns:
        The path.

    Raises:
        DataError: No rows, a missing key, sizes out of range, or a predicted mask of another size than the ground
            truth.

    Example:
        >>> import tempfile
        >>> from segrl.predictions import Frame, parse_completion
        >>> row = {"image": Image.new("L", (8, 8)), "target": Target.from_mask(Image.new("1", (8, 8))), "dice": 0.0}
        >>> row["prediction"] = parse_completion("No cyst.", Frame("original_px", (8, 8)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Image.open(contact_sheet([row] * 3, Path(folder, "sheet.png"), columns=2, cell=64)) as sheet:
        ...         sheet.size
        (152, 514)
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
    """Draw the image at the size of a cell, with masks and boxes, which are in the pixels of the ground truth mask."""
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
        target=target.mask,
        boxes=prediction.boxes,
        pixels=(target.width, target.height),
    )
