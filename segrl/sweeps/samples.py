"""A sheet of samples: what several runs drew on the same images, a row a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from segrl.evaluation.comparison import read_records
from segrl.geometry.masks import rle_to_mask
from segrl.reports.drawing import INK, PAPER, draw_legend, draw_overlay, wrap_text
from segrl.scripts.results import SAMPLES

__all__ = ["samples_sheet"]

CELL, LABEL, MARGIN, FONT, MOST = 112, 150, 6, 12, 8  # pixels; the last is a number of samples


def samples_sheet(runs: Mapping[str, Path], path: Path) -> bool:
    """Draw what runs answered about the same images, one row a run, below a row of the images and their ground truth.

    Args:
        runs: Folders of runs on images by what they are called; the first has the images.
        path: Of the picture.

    Returns:
        Whether there was something to draw: runs on volumes, and those of before records held masks, have no samples.
    """
    if not runs:
        return False
    images = sorted((next(iter(runs.values())) / SAMPLES).glob("*.png"))[:MOST]
    records = {name: read_records(folder)[: len(images)] for name, folder in runs.items()}
    first = next(iter(records.values()))
    if not images or not all("target_mask" in record for answers in records.values() for record in answers):
        return False
    asked = [(record.get("name"), record.get("query")) for record in first]
    records = {
        name: answers
        for name, answers in records.items()
        if [(record.get("name"), record.get("query")) for record in answers] == asked
    }
    sheet = Image.new("RGB", (LABEL + len(images) * (CELL + MARGIN), (1 + len(records)) * (CELL + MARGIN) + 24), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    draw_legend(draw, MARGIN, MARGIN, FONT)
    for row, name in enumerate(["image", *records]):
        top = 24 + row * (CELL + MARGIN)
        for line, text in enumerate(wrap_text(name, font, LABEL - 2 * MARGIN, 4)):
            draw.text((MARGIN, top + line * 15), text, fill=INK, font=font)
        for column, file in enumerate(images):
            answer = records[name][column] if row else {**first[column], "predicted_mask": None, "boxes": []}
            with Image.open(file) as image:
                cell = _cell(image, answer, f"{answer['dice']:.2f}" if row else "")
            sheet.paste(cell, (LABEL + column * (CELL + MARGIN), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return True


def _cell(image: Image.Image, record: Mapping[str, Any], text: str) -> Image.Image:
    target = rle_to_mask(record["target_mask"])
    height, width = target.shape
    scale = CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    found = record["predicted_mask"]
    mask = None if found is None else rle_to_mask(found)
    drawn = draw_overlay(image, size, mask=mask, target=target, boxes=record["boxes"], pixels=(width, height))
    cell = Image.new("RGB", (CELL, CELL), (20, 20, 20))
    cell.paste(drawn, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    ImageDraw.Draw(cell).text((3, 2), text, fill=(255, 255, 255), font=ImageFont.load_default(FONT))
    return cell
