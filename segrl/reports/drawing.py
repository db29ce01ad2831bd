"""What the pictures of segrl share: colours, masks and boxes over an image, and text that is drawn as plain text."""

# N boxes, H/W pixels of the original image, h/w pixels of the drawn image

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from segrl.geometry.masks import resize_mask

__all__ = ["draw_legend", "draw_overlay", "wrap_text"]

Colour = tuple[int, int, int]
TRUTH, PREDICTED, BOX = (40, 220, 90), (230, 40, 40), (255, 220, 0)
INK, PALE, PAPER, GROUND, FILL_ALPHA = (25, 25, 25), (95, 95, 95), (255, 255, 255), (20, 20, 20), 0.4
LEGEND = ((TRUTH, "truth"), (PREDICTED, "prediction"), (BOX, "boxes"))
DRAWN_CHARACTERS = 1000  # of a text's start, and of its end: more never fits


def draw_overlay(
    image: Image.Image,
    size: tuple[int, int],
    *,
    mask: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    boxes: np.ndarray | Sequence[Any] = (),
    pixels: tuple[int, int] | None = None,
    line: int = 1,
) -> Image.Image:
    """An image with the predicted mask in translucent red, the truth outlined in green and boxes in yellow.

    Args:
        image: Any mode and size, the same view as the masks.
        size: (w, h) of the drawn image, pixels.
        mask: (H, W) bool predicted mask, or None for none.
        truth: (H, W) bool true mask, or None where it is not known.
        boxes: (N, 4) xyxy half-open, in original pixels.
        pixels: (W, H) of the original image, which boxes are in; by default that of `image`.
        line: Width of outlines and boxes, drawn pixels; they lie inside of what they surround.

    Returns:
        An RGB image of `size`. A box without area is drawn as a dot.
    """
    w, h = size
    drawn = np.array(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    if mask is not None:
        inside = resize_mask(mask, (h, w))
        drawn[inside] = (1 - FILL_ALPHA) * drawn[inside] + FILL_ALPHA * np.array(PREDICTED)
    if truth is not None:
        inside = resize_mask(truth, (h, w))
        drawn[np.logical_xor(inside, ndimage.binary_erosion(inside, iterations=line))] = TRUTH
    picture = Image.fromarray(drawn)
    draw = ImageDraw.Draw(picture)
    across, down = np.array(size) / (pixels or image.size)
    for x1, y1, x2, y2 in np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * (across, down, across, down):
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=BOX, width=line)
    return picture


def draw_legend(
    draw: ImageDraw.ImageDraw, x: float, y: float, font_size: int, entries: Sequence[tuple[Colour, str]] = LEGEND
) -> None:
    """Name colours, from left to right, beginning at (x, y)."""
    font = ImageFont.load_default(font_size)
    for colour, label in entries:
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=colour, outline=INK)
        draw.text((x + 14, y), label, fill=INK, font=font)
        x += 28 + font.getlength(label)


def wrap_text(text: str, font: Any, width: int, most: int) -> list[str]:
    """Lines of plain ASCII, everything else escaped; the middle of a longer text is left out.

    Args:
        text: Anything that a model or a data set may say.
        font: A PIL font.
        width: Of the longest line, pixels.
        most: Number of lines, at least 1.
    """
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
